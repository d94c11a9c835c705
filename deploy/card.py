"""The card of a bundle: what a colleague reads first, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from supernet.space import Space
from supernet.task import task_named


def card(manifest: Mapping[str, Any], space: Space) -> str:
    """Markdown of a manifest."""
    accuracy, parity, preprocessing = manifest["accuracy"], manifest["parity"], manifest["preprocessing"]
    metric, task = accuracy["metric"], manifest.get("task", "classification")
    show, classifies = task_named(task).show, task == "classification"
    kind = f"An image classifier for {len(manifest['classes'])} classes" if classifies else "A network from images to images"
    outputs, meaning = ("logits", "logits") if classifies else ("outputs", "an image, normalised as the input")
    lines = [
        *front_matter(manifest),
        f"# Child {manifest['key']} of {plain(manifest['space']['name'])}",
        "",
        f"{kind} from one weight-sharing supernet, not retrained.",
        "",
        "| | |",
        "|---|---|",
        f"| {metric} | {show(accuracy[metric])} (95 %: {show(accuracy['low'])} to {show(accuracy['high'])}) on {accuracy['images']} "
        f"images of the {accuracy['split']} split |",
        f"| multiply-accumulates | {manifest['macs']:,} |",
        f"| parameters | {manifest['params']:,} |",
        f"| peak activation memory | {manifest['peak_memory_bytes']:,} bytes (fp32, batch 1) |",
        f"| size of the weights | {manifest['model_size_bytes']:,} bytes (fp32) |",
        *(
            f"| latency, {plain(entry['target'])} | {entry['latency_ms']:.4g} ms (up to {entry['high']:.4g}), "
            f"batch 1, {plain(entry['fingerprint']['processor'])}, {plain(entry['fingerprint']['runtime'])}, "
            f"{plain(entry['fingerprint'].get('clock', 'clock not told'))}, {plain(entry['date'])} |"
            for entry in manifest["latency"]
        ),
        f"| input | `{manifest['input']['name']}` {manifest['input']['shape']}, {manifest['input']['type']}, normalised |",
        f"| output | `{manifest['output']['name']}` {manifest['output']['shape']}: {meaning} |",
        f"| format | ONNX opset {manifest['opset']}, {manifest['precision']}, batch norm folded |",
        "",
        "## Use",
        "",
        "    pip install onnxruntime numpy pillow",
        "    python predict.py IMAGE..." if classifies else "    python predict.py IMAGE... --out FOLDER",
        "",
        "## Preprocessing",
        "",
        f"The central square of {preprocessing['crop']:.4g} of the short side, resized to {preprocessing['resolution']} px "
        f"(bicubic, Pillow), divided by 255, less {preprocessing['mean']}, over {preprocessing['std']}: see `preprocess.py`.",
        "",
        "## Architecture",
        "",
        *architecture(manifest, space),
        "",
        *_files(manifest, show),
        "## Verified at export",
        "",
        f"* Supernet child and extracted child: {outputs} differ by {parity['child_difference']:.2e}, {parity['child_images']} images.",
        f"* Extracted child and itself with batch norm folded: {parity['folded_difference']:.2e}.",
        f"* torch and ONNX Runtime, from image files: at most {parity['onnx_difference']:.2e} on {parity['onnx_images']} images, where "
        f"{outputs} reach {_reach(parity)}.",
        f"* `images.json` lists every image with its {'label and prediction' if classifies else metric}; "
        "`python predict.py --check FOLDER` repeats them.",
        "",
    ]
    if classifies:
        lines += ["## Classes", "", ", ".join(f"`{plain(name)}`" for name in manifest["classes"]), ""]
    return "\n".join(lines)


def front_matter(manifest: Mapping[str, Any]) -> list[str]:
    """The YAML that model hubs read (https://huggingface.co/docs/hub/model-cards)."""
    accuracy, classifies = manifest["accuracy"], manifest.get("task", "classification") == "classification"
    task = "image-classification" if classifies else "image-to-image"
    metric = "accuracy" if accuracy["metric"] == "top1" else accuracy["metric"]
    dataset = {"name": str(manifest["training"]["data"]), "type": str(manifest["training"]["data"]), "split": accuracy["split"]}
    result = {"task": {"type": task}, "dataset": dataset, "metrics": [{"type": metric, "value": accuracy[accuracy["metric"]]}]}
    facts = {
        "library_name": "onnx", "pipeline_tag": task, "tags": ["onnx", "onnxruntime", "neural-architecture-search", "nestling"],
        "model-index": [{"name": f"child {manifest['key']}", "results": [result]}],
    }  # fmt: skip
    return ["---", *yaml.safe_dump(facts, sort_keys=False).splitlines(), "---", ""]


def _files(manifest: Mapping[str, Any], show: Callable[[float], str]) -> list[str]:
    """A table of the model files, and what phones make of them; nothing where there is one file."""
    models = manifest.get("models", [])
    if len(models) < 2:
        return []
    lines = [
        "## Files",
        "",
        "| file | bytes | score (confirm images) | against fp32 | latency (ms) | |",
        "|---|---|---|---|---|---|",
    ]
    for each in models:
        parity, latency = each.get("parity"), each.get("latency")
        score = "|"
        if parity:
            span = f"{parity['change_low']:+.4f} to {parity['change_high']:+.4f}"
            score = f"{show(parity['score'])} | {parity['change']:+.4f} ({span})"
        timed = f"{latency['latency_ms']:.4g}" if latency else ""
        lines.append(f"| `{each['file']}` | {each['size_bytes']:,} | {score} | {timed} | {_notes(each)} |")
    for name, reason in manifest.get("refused", {}).items():
        lines += ["", f"`{name}` was not made: {plain(reason)}."]
    if mobile := manifest.get("mobile"):
        lines += ["", "ONNX Runtime's checker, of the model with fixed shapes:", ""]
        lines += [
            f"* {name}: {each['supported']} of {each['nodes']} operators in {each['partitions']} partition(s): {each['verdict']}"
            + (f"; not taken: {', '.join(each['unsupported'])}" if each["unsupported"] else "")
            for name, each in mobile.items()
        ]
    return [*lines, ""]


def _notes(model: Mapping[str, Any]) -> str:
    """What is special about a file."""
    said = [f"for {model['platform']}"] if "platform" in model else []
    said += ["one image at a time"] if model.get("batch") == 1 else []
    said += ["uint8 pixels in, NHWC; preprocessing inside"] if "input" in model else []
    if "recipe" in model:
        said.append(f"{model['recipe']}, {model['operators']} operators, {model['calibration']}")
        said += [f"in fp32: {', '.join(plain(name) for name in model['fp32_layers'])}"] if model["fp32_layers"] else []
    return "; ".join(said)


def _reach(parity: Mapping[str, Any]) -> str:
    if "agreement" in parity:
        return f"{parity['largest_logit']:.3g}; the same class on {parity['agreement']:.2%}"
    return f"{parity['largest_output']:.3g}: {parity['relative_difference']:.2e} of the largest"


def architecture(manifest: Mapping[str, Any], space: Space) -> list[str]:
    """A Markdown table with a row a stage."""
    rows = space.family.rows({name: (choice,) for name, choice in manifest["arch"].items()})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*table, *("| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows)]


def cell(value: object) -> str:
    """A choice as text: one value plain, several in a row."""
    values = value if isinstance(value, list | tuple) else (value,)
    return ", ".join(str(item) for item in dict.fromkeys(values))


def plain(text: object) -> str:
    """Text that cannot break out of a Markdown line or table cell, nor start a tag."""
    cleaned = " ".join(str(text).encode("utf-8", "replace").decode().split())  # names of files may hold lone surrogates
    return cleaned.replace("`", "'").replace("|", "/").replace("<", "(").replace(">", ")")
