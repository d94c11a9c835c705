"""Commands of this package: export, verify, predict, measure, profile. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.profile import profile

if TYPE_CHECKING:
    from deploy.bundle import Bundle
    from deploy.formats import Wanted
    from deploy.targets import Target
    from supernet.arch import Arch
    from supernet.run import Run
    from supernet.task import Task

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder or .zip that `nestling export` wrote.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(epilog="Example: nestling export runs/digits --out my-model")(export)
    app.command(epilog="Example: nestling verify my-model --run runs/digits")(verify)
    app.command(epilog="Example: nestling predict my-model photo.jpg other.png --top 3")(predict)
    app.command(epilog="Example: nestling measure my-model --target local:4")(measure)
    app.command(epilog="Example: nestling profile runs/digits --target ssh://pi@192.0.2.7?threads=4")(profile)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where the bundle goes; RUN/bundle if left out.")] = None,
    arch: Annotated[str, typer.Option("--arch", help="best (of the latest search), smallest, largest, or a JSON file.")] = "best",
    split: Annotated[str, typer.Option("--split", help="Images for the accuracy: test (reads are counted) or confirm.")] = "test",
    front: Annotated[int, typer.Option("--front", min=0, help="Export the children of a search with --front, each to a folder.")] = 0,
    formats: Annotated[
        str, typer.Option("--format", help="More files, such as fixed,pixels,fp16,int8,ort; model.onnx is always there.")
    ] = "onnx",
    target: Annotated[
        str | None, typer.Option("--target", help="The device that int8 and ort are for, and all files are timed on, such as local.")
    ] = None,
    most_loss: Annotated[
        float | None, typer.Option("--most-loss", help="What int8 and fp16 may cost: points of accuracy (0.5 if left out), or dB.")
    ] = None,
    zipped: Annotated[bool, typer.Option("--zip", help="Also pack the bundle into a .zip beside it.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Export a child to a verified bundle: ONNX model, manifest, card, and a script that predicts."""
    from deploy.archive import pack
    from supernet.console import print_json
    from supernet.run import Run
    from supernet.space import read_arch

    found, where = Run.open(run), out or run / ("bundles" if front else "bundle")
    how = _how(found, formats, target, most_loss)
    if front:
        wanted = front_of(found, front)
        refuse_strangers(where, set(wanted))
        bundles = [_shipped(found, child, where / name, split, how) for name, child in wanted.items()]
    else:
        bundles = [_shipped(found, best_of(found) if arch == "best" else (read_arch(found.space, arch), []), where, split, how)]
    for bundle in bundles if zipped else ():
        pack(bundle.path, bundle.path.with_name(f"{bundle.path.name}.zip"))
    if as_json:
        results = [{"bundle": str(bundle.path), **_short(bundle.manifest)} for bundle in bundles]
        print_json(results if front else results[0])
        return
    for bundle in bundles:
        _tell(found, bundle)
    classifies = "agreement" in bundles[0].manifest["parity"]
    print(f"Next: nestling predict {bundles[0].path} IMAGE" + ("" if classifies else " --out FOLDER"))


def refuse_strangers(folder: Path, names: set[str]) -> None:
    """Raise `InputError` where a folder of bundles holds one that is not to be written now: it would seem to be of this search."""
    from supernet.errors import InputError

    others = sorted(path.name for path in folder.glob("front-*") if path.name not in names)
    if others:
        raise InputError(f"{folder} holds {others[0]} of another search: remove it, or choose another --out")


def _how(run: Run, formats: str, target: str | None, most_loss: float | None) -> tuple[Wanted, Target | None]:
    """What files are to be made, and for which device."""
    from deploy.formats import wanted
    from deploy.places import parse_target
    from supernet.errors import InputError

    if most_loss is not None and not 0 <= most_loss < float("inf"):
        raise InputError(f"--most-loss is 0 or more points of accuracy (of a regression, dB), but got {most_loss:g}")
    place = parse_target(target) if target else None
    unit = 100 if most_loss is not None and run.task.unit == "%" else 1
    return wanted(formats, place, None if most_loss is None else most_loss / unit), place


def _shipped(
    run: Run, child: tuple[Arch, list[Mapping[str, Any]]], out: Path, split: str, how: tuple[Wanted, Target | None]
) -> Bundle:
    from deploy.ship import ship

    return ship(run, child[0], out, split=split, latencies=child[1], wanted=how[0], target=how[1])


def _tell(run: Run, bundle: Bundle) -> None:
    """What was exported, and what proves it."""
    accuracy, parity = bundle.manifest["accuracy"], bundle.manifest["parity"]
    show = run.task.show
    print(f"{bundle.path}: child {bundle.manifest['key']}, {accuracy['metric']} {show(accuracy[accuracy['metric']])} "
          f"({show(accuracy['low'])} to {show(accuracy['high'])}) on {accuracy['images']} {accuracy['split']} images")  # fmt: skip
    proof = (
        f"same class on {parity['agreement']:.2%} of"
        if "agreement" in parity
        else f"{parity['relative_difference']:.2e} of the largest, on"
    )
    print(f"verified: supernet child to extracted child {parity['child_difference']:.2e}, torch to ONNX Runtime "
          f"{parity['onnx_difference']:.2e}, {proof} {parity['onnx_images']} images")  # fmt: skip
    if len(bundle.manifest["models"]) > 1:
        print("\n".join(model_line(each, run.task) for each in bundle.manifest["models"]))
    for name, reason in bundle.manifest.get("refused", {}).items():
        print(f"{name} was not made: {reason}")


def model_line(model: Mapping[str, Any], task: Task) -> str:
    """A file of a bundle in a line: size, score and latency."""
    from deploy.gate import written

    line = f"{model['file']}: {model['size_bytes']:,} bytes"
    if parity := model.get("parity"):
        change = written(parity["change"], task)
        line += f", score {task.show(parity['score'])} ({change} against fp32, {parity['images']} confirm images)"
    if latency := model.get("latency"):
        line += f", {latency['latency_ms']:.4g} ms" + ("" if latency["stable"] else " (not stable)")
    if kept := model.get("fp32_layers"):
        line += f", {len(kept)} layers in fp32"
    return line


def verify(
    bundle: BundlePath,
    run: Annotated[Path | None, typer.Option("--run", help="The run it is from: repeats the whole proof.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder of the images in images.json: repeats predictions.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Check a bundle: hashes always; against its run, the whole proof; against image files, every prediction.

    Ends with 1 where a proof fails.
    """
    from deploy.again import verify_again
    from deploy.verify import VerificationError
    from supernet.console import print_json
    from supernet.errors import say

    try:
        result = verify_again(bundle, run, images)
    except VerificationError as error:
        say(error)
        raise typer.Exit(1) from error
    if as_json:
        print_json(result)
    else:
        print("; ".join(f"{name}: {value}" for name, value in result.items()))


def predict(
    bundle: BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Classes printed for each image.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the images that a regression makes.")] = None,
    model: Annotated[str, typer.Option("--model", help="Another model of the bundle, such as model.int8.onnx.")] = "model.onnx",
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each image.")] = False,
) -> None:
    """Print classes and probabilities of images, or make images of images, with ONNX Runtime, NumPy and Pillow alone."""
    from deploy import predict as predicting
    from deploy.bundle import Bundle
    from supernet.errors import InputError

    opened = Bundle.open(bundle) if bundle.is_file() else None  # a .zip
    try:
        predictor = predicting.Predictor(opened.path if opened else bundle, model=model)
        predicting.report(predictor, [str(image) for image in images], top, as_json, out)
    except ValueError as error:
        raise InputError(str(error)) from error


def measure(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="A folder or .zip that `nestling export` wrote.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Where: local, local:THREADS, local?runtime=openvino.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once for the throughput; latency is at batch 1.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", help="The card, X.json; into the bundle if left out.")] = None,
    most_seconds: Annotated[float | None, typer.Option("--most-seconds", help="For the latency, at most; 20 if left out.")] = None,
    check: Annotated[Path | None, typer.Option("--verify", help="A card: measure again, and say whether it is as fast.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a bundle on a device: latency, memory, loading, throughput. Writes a card, which --verify measures again.

    With --verify it ends with 1 where the file is another or the latency differs by more than noise.
    """
    from deploy.bundle import Bundle
    from deploy.measure import measured
    from deploy.measurement import Measurement
    from deploy.remeasure import bundle_of, measure_again
    from supernet.console import print_json
    from supernet.errors import InputError

    if check is not None:
        again = measure_again(
            Measurement.open(check), Bundle.open(bundle) if bundle else bundle_of(check), target, most_seconds
        )
        if as_json:
            print_json([each.as_dict() for each in again])
        else:
            print("\n".join(line for each in again for line in each.sentences()))
        if not all(each.holds for each in again):
            raise typer.Exit(1)
        return
    if bundle is None:
        raise InputError("nestling measure takes the BUNDLE that is to be measured, or --verify with a card, but got neither")
    card, path = measured(Bundle.open(bundle), target or "local", batch, most_seconds, out)
    if as_json:
        print_json({"card": str(path), **card.as_dict()})
        return
    print("\n".join(card.sentences()))
    elsewhere = "" if path.parent.resolve() == bundle.resolve() else f" {bundle}"
    print(f"card: {path} and {path.with_suffix('.md').name}; again: nestling measure --verify {path}{elsewhere}")


def best_of(run: Run) -> tuple[Arch, list[Mapping[str, Any]]]:
    """The child that the latest search of a run chose, and its measured latencies."""
    return children_of(run)["best"]


def children_of(run: Run) -> dict[str, tuple[Arch, list[Mapping[str, Any]]]]:
    """The children that the latest search of a run found, by what they were found for, with their measured latencies."""
    from deploy.targets import Latency
    from supernet.errors import InputError

    path = run.path / "search" / "found.json"
    if not path.is_file():
        raise InputError(f"{run.path} was not searched yet: run `nestling search {run.path}` first, or give --arch")
    try:
        value = json.loads(path.read_text())
        if value["format"] != 2:
            raise InputError(f"{path} has format {value['format']!r}, this version reads 2: search again")
        if value["weights_sha256"] != run.weights_hash:
            raise InputError(f"{path} is of other weights than {run.path} has now: search again")
        found: dict[str, tuple[Arch, list[Mapping[str, Any]]]] = {}
        for answer in ({"name": "best", "child": value["best"]}, *value["answers"]):
            child = answer["child"]
            latencies: list[Mapping[str, Any]] = [
                Latency.from_dict(latency).as_dict() for latency in child["latencies"].values()
            ]
            found[str(answer["name"])] = run.space.arch(child["arch"], str(path)), latencies
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error!r}): search again, which repeats no evaluation") from error


def front_of(run: Run, count: int) -> dict[str, tuple[Arch, list[Mapping[str, Any]]]]:
    """The `count` children of a search with `--front`, cheapest first, by names for their folders; equal ones once."""
    from supernet.errors import InputError

    found = {name: child for name, child in children_of(run).items() if re.fullmatch(rf"front \d+ of {count}", name)}
    if not found:
        raise InputError(
            f"the latest search of {run.path} was not for a front of {count}: run `nestling search {run.path} --front {count}`"
        )
    once = {child[0]: (name, child) for name, child in reversed(found.items())}
    return {f"front-{number}": child for number, (_, child) in enumerate(reversed(once.values()), 1)}


def _short(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: manifest[name]
        for name in ("key", "macs", "params", "peak_memory_bytes", "model_size_bytes", "accuracy", "parity", "latency")
    }
