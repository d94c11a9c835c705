"""The command line: help, exit codes, JSON, and the whole way on a folder of images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import nestling
from deploy.bundle import Bundle
from search.store import Store
from supernet.run import Run

ROOT = Path(__file__).parents[1]
VERBS = (
    "spaces",
    "describe",
    "train",
    "evaluate",
    "search",
    "report",
    "dashboard",
    "export",
    "verify",
    "predict",
    "measure",
    "profile",
    "run",
    "demo",
)
TINY = """strategy: coarse_to_fine
options: {coarse: 3}
evaluations: 5
random: 1
polish: 1
batch: 2
finalists: 1
profile_children: 8
zones: 2
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `nestling ARGUMENTS` in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nestling", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            nestling.main()
        out, err = capsys.readouterr()
        code = raised.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return run


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch, fake_target: Any) -> None:
    """Commands measure on a target that needs no time."""

    def local(threads: int = 1, **_: Any) -> Any:
        return fake_target()

    for where in ("deploy.targets", "deploy.places", "search.whole"):
        monkeypatch.setattr(f"{where}.Local", local)


@pytest.fixture
def tiny_search(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def image_folder(folder: Path, classes: dict[str, int], size: int = 40, seed: int = 0) -> Path:
    """Colour images, one hue a class, half of them JPEG."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 80, (size, size + index % 7, 3)).astype(np.uint8)
            pixels[..., number % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{index}.{'jpg' if index % 2 else 'png'}")
    return folder


# --- help ---


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(command: Command, verb: str) -> None:
    code, out, err = command(verb, "--help")
    assert (code, err) == (0, "")
    assert f"Example: nestling {verb}" in " ".join(out.split())
    assert command(verb, "-h")[1] == out


def test_the_list_of_verbs_is_complete(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    registered = {entry.name or entry.callback.__name__ for entry in nestling.app.registered_commands if entry.callback}
    registered |= {group.name for group in nestling.app.registered_groups if group.name}
    assert registered == set(VERBS)
    assert all(re.search(rf"\b{verb}\b", out) for verb in VERBS)


def test_the_version_is_that_of_the_package(command: Command) -> None:
    assert command("--version") == (0, f"{nestling.__version__}\n", "")
    assert f'version = "{nestling.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_help_loads_no_heavy_library() -> None:
    text = "import sys, nestling\nsys.argv = ['nestling', '--help']\ntry:\n    nestling.main()\nexcept SystemExit:\n    pass\n"
    text += "print(sorted({'torch', 'onnx', 'onnxruntime', 'scipy', 'plotly', 'sklearn', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- results for programs ---


def test_spaces_as_json(command: Command) -> None:
    code, out, err = command("spaces", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert {row["space"] for row in rows} == {path.stem for path in (ROOT / "configs" / "spaces").glob("*.yaml")}
    assert all({"archs", "resolution", "macs", "params"} <= set(row) for row in rows)


@pytest.mark.parametrize("arch", ["smallest", "largest"])
def test_describe_an_arch_as_json(command: Command, arch: str) -> None:
    code, out, err = command("describe", "--space", "attentivenas", "--arch", arch, "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)
    assert {"key", "macs", "params", "peak_memory_bytes"} <= set(value)
    assert re.fullmatch("[0-9a-f]{12}", value["key"])
    assert all(isinstance(value[name], int) and value[name] > 0 for name in ("macs", "params", "peak_memory_bytes"))


def test_describe_a_space_as_json_gives_an_arch_that_can_be_described(command: Command, tmp_path: Path) -> None:
    value = json.loads(command("describe", "--space", "digits", "--classes", "3", "--json")[1])
    assert set(value["smallest"]) == {"key", "macs", "params", "peak_memory_bytes", "model_size_bytes"}
    path = tmp_path / "arch.json"
    path.write_text(json.dumps({name: choices[0] for name, choices in value["dimensions"].items()}))
    again = json.loads(command("describe", "--space", "digits", "--classes", "3", "--arch", path, "--json")[1])
    assert {name: again[name] for name in value["smallest"]} == value["smallest"]


def test_describe_for_people_shows_every_stage(command: Command) -> None:
    code, out, err = command("describe", "--space", "digits", "--arch", "largest")
    assert (code, err) == (0, "")
    assert all(stage in out for stage in ("stem", "stage1", "stage2", "stage3", "head"))


def test_evaluate_counts_reads_of_the_test_split(command: Command, run_copy: Run) -> None:
    for split, reads in (("search_val", 0), ("confirm", 0), ("test", 1)):
        code, out, _ = command("evaluate", run_copy.path, "--arch", "largest", "--split", split, "--json")
        value = json.loads(out)
        assert code == 0
        assert (value["split"], value["test_reads"]) == (split, reads)
        assert value["top1_low"] <= value["top1"] <= value["top1_high"]
        assert {"key", "macs", "params", "peak_memory_bytes", "images"} <= set(value)


def test_evaluate_takes_the_best_of_the_search_and_the_keys_that_show_tells(command: Command, searched_copy: Run) -> None:
    code, out, _ = command("evaluate", searched_copy.path, "--arch", "best", "--json")
    best = json.loads(out)
    assert code == 0
    code, out, _ = command("evaluate", searched_copy.path, "--arch", best["key"], "--json")
    assert code == 0 and json.loads(out) == best
    code, out, err = command("evaluate", searched_copy.path, "--arch", "0123456789ab")
    assert code == 2 and "search show" in err


def test_search_as_json_and_for_people(command: Command, searched_copy: Run, fake_clock: None, tiny_search: Path) -> None:
    code, out, _ = command("search", searched_copy.path, "--budget", "macs<=500K", "--search", tiny_search, "--json")
    assert code == 0
    value = json.loads(out)
    assert {"best", "answers", "smallest", "largest", "front", "budgets", "evaluated", "spent", "notes"} <= set(value)
    assert value["best"]["costs"]["macs"] <= 500_000
    code, out, _ = command("search", searched_copy.path, "--budget", "macs<=500K", "--search", tiny_search)
    assert code == 0
    assert value["best"]["key"] in out
    assert f"Next: nestling export {searched_copy.path}" in out


@pytest.mark.slow
def test_export_verify_and_predict_as_json(command: Command, searched_copy: Run, tmp_path: Path) -> None:
    code, out, _ = command("export", searched_copy.path, "--out", tmp_path / "model", "--json")
    assert code == 0
    exported = json.loads(out)
    assert {"bundle", "key", "macs", "params", "peak_memory_bytes", "model_size_bytes", "accuracy", "parity", "latency"} == set(
        exported
    )
    images = searched_copy.path / "images"
    code, out, err = command("verify", tmp_path / "model", "--run", searched_copy.path, "--images", images, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["top1"] == exported["accuracy"]["top1"]
    files = sorted(images.glob("*.png"))[:2]
    code, out, err = command("predict", tmp_path / "model", *files, "--json", "--top", "2")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(file) for file in files]
    assert all(len(line["classes"]) == 2 for line in lines)


def test_report_writes_one_file(command: Command, searched_copy: Run, tmp_path: Path) -> None:
    code, out, _ = command("report", searched_copy.path, "--out", tmp_path / "page.html")
    assert (code, out.strip()) == (0, str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_a_proof_that_fails_ends_with_1_and_one_line(command: Command, searched_copy: Run, bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    (bundle_copy / "manifest.json").write_text(json.dumps({**manifest, "classes": manifest["classes"][::-1]}))
    code, out, err = command("verify", bundle_copy, "--images", searched_copy.path / "images")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1


# --- mistakes ---


@pytest.fixture
def place(tmp_path: Path, easy_npz: Path, run_copy: Run, searched_copy: Run, bundle_copy: Path) -> Path:
    """A folder with much that is amiss; `run`, `searched` and `bundle` are whole."""
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copy(easy_npz, tmp_path / "lines.npz")
    (tmp_path / "broken.npz").write_bytes(easy_npz.read_bytes()[:3000])
    image_folder(tmp_path / "one class", {"cat": 12}, 8)
    image_folder(tmp_path / "one image", {"cat": 12, "dog": 1}, 8)
    corrupt = image_folder(tmp_path / "corrupt", {"cat": 12, "dog": 12}, 8)
    (corrupt / "dog" / "4.png").write_bytes((corrupt / "dog" / "4.png").read_bytes()[:40])
    arch = searched_copy.space.smallest.as_dict()
    for name, text in {
        "list.json": "[1]", "text.json": "{", "choice.json": json.dumps({**arch, "resolution": 13}), "lack.json": "{}",
        "more.json": json.dumps({**arch, "stage9.width": 8}), "space.yaml": "name: x\nfamily: mbconv\n", "recipe.yaml": "epochs: 0\n",
        "search.yaml": "evaluations: many\n", "bomb.yaml": "a: &a [x, x]\nb: [*a, *a]\n", "family.yaml": "name: x\nfamily: os.system\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    return tmp_path


MISTAKES: dict[str, tuple[str, ...]] = {
    "no data": ("train", "--out", "{}/new"),
    "unknown data": ("train", "--data", "mnits", "--out", "{}/new"),
    "a folder that is not there": ("train", "--data", "{}/none/", "--out", "{}/new"),
    "a file instead of a folder": ("train", "--data", "{}/file.txt", "--out", "{}/new"),
    "an empty folder": ("train", "--data", "{}/empty", "--out", "{}/new"),
    "one class": ("train", "--data", "{}/one class", "--out", "{}/new"),
    "a class of one image": ("train", "--data", "{}/one image", "--out", "{}/new"),
    "a corrupt image": ("train", "--data", "{}/corrupt", "--out", "{}/new"),
    "a broken npz": ("train", "--data", "{}/broken.npz", "--out", "{}/new"),
    "data that would be downloaded": ("train", "--data", "cifar10", "--out", "{}/new"),
    "an unknown space": ("train", "--data", "digits", "--space", "resnets", "--out", "{}/new"),
    "a space without stages": ("train", "--data", "digits", "--space", "{}/space.yaml", "--out", "{}/new"),
    "a family that is code": ("train", "--data", "digits", "--space", "{}/family.yaml", "--out", "{}/new"),
    "an unknown recipe": ("train", "--data", "digits", "--recipe", "digit", "--out", "{}/new"),
    "a recipe without epochs": ("train", "--data", "digits", "--recipe", "{}/recipe.yaml", "--out", "{}/new"),
    "a yaml bomb": ("train", "--data", "digits", "--recipe", "{}/bomb.yaml", "--out", "{}/new"),
    "an override without a value": ("train", "--data", "digits", "--set", "epochs", "--out", "{}/new"),
    "an override of nothing": ("train", "--data", "digits", "--set", "epoch=3", "--out", "{}/new"),
    "an override of another type": ("train", "--data", "digits", "--set", "epochs=many", "--out", "{}/new"),
    "an unknown device": ("train", "--data", "digits", "--device", "tpu", "--out", "{}/new"),
    "a run directory in use": ("train", "--data", "digits", "--out", "{}/run"),
    "a file for a run": ("train", "--data", "{}/lines.npz", "--out", "{}/file.txt"),
    "a file above a run": ("train", "--data", "{}/lines.npz", "--out", "{}/file.txt/run"),
    "nothing to resume": ("train", "--resume", "--out", "{}/new"),
    "resume with other data": ("train", "--resume", "--data", "digits", "--out", "{}/run"),
    "describe an unknown space": ("describe", "--space", "digit"),
    "describe an unknown arch": ("describe", "--space", "digits", "--arch", "medium"),
    "an arch that is a list": ("describe", "--space", "digits", "--arch", "{}/list.json"),
    "an arch that is no JSON": ("describe", "--space", "digits", "--arch", "{}/text.json"),
    "an arch of another space": ("describe", "--space", "digits", "--arch", "{}/choice.json"),
    "an arch that lacks all": ("describe", "--space", "digits", "--arch", "{}/lack.json"),
    "an arch with more": ("describe", "--space", "digits", "--arch", "{}/more.json"),
    "evaluate what is no run": ("evaluate", "{}/empty", "--arch", "smallest"),
    "evaluate a file": ("evaluate", "{}/file.txt", "--arch", "smallest"),
    "evaluate an unknown split": ("evaluate", "{}/run", "--arch", "smallest", "--split", "val"),
    "search what is no run": ("search", "{}/none"),
    "an unknown budget": ("search", "{}/run", "--budget", "flops<=3"),
    "a budget the wrong way round": ("search", "{}/run", "--budget", "macs=>3"),
    "a lower bound that nothing reaches": ("search", "{}/run", "--budget", "macs>=3G"),
    "bounds that leave nothing": ("search", "{}/run", "--budget", "macs>=500K", "--budget", "params<=10K"),
    "a latency of an unknown target": ("search", "{}/run", "--budget", "latency_ms@pi4<=3"),
    "a target that is none": ("search", "{}/run", "--target", "pi4"),
    "a target of no threads": ("search", "{}/run", "--target", "pi4=local:0"),
    "one target twice": ("search", "{}/run", "--target", "a=local", "--target", "a=local:2"),
    "a child for no budgets": ("search", "{}/run", "--child", "small"),
    "an impossible child": ("search", "{}/run", "--child", "macs<=10"),
    "one child twice": ("search", "{}/run", "--child", "macs<=1M", "--child", "macs<=1000K"),
    "an unknown strategy": ("search", "{}/run", "--set", "strategy=evolve"),
    "an unknown option of a strategy": ("search", "{}/run", "--set", "options.parent=3"),
    "an unknown objective": ("search", "{}/run", "--set", "objective=f1"),
    "unknown workers": ("search", "{}/run", "--workers", "dask"),
    "show what was not searched": ("search", "show", "{}/run"),
    "show an unknown stage": ("search", "show", "{}/searched", "--stage", "none"),
    "sort by an unknown column": ("search", "show", "{}/searched", "--sort", "size"),
    "export a search to an unknown form": ("search", "export", "{}/searched", "--out", "{}/new.xlsx"),
    "export samples to a sheet": ("search", "export", "{}/searched", "--out", "{}/new.csv", "--samples"),
    "a dashboard of what was not searched": ("dashboard", "{}/run"),
    "export a front that was not searched for": ("export", "{}/searched", "--front", "3"),
    "a budget of nothing": ("search", "{}/run", "--budget", "macs<=0"),
    "a budget of text": ("search", "{}/run", "--budget", "macs<=many"),
    "two budgets of a metric": ("search", "{}/run", "--budget", "macs<=1M", "--budget", "macs<=2M"),
    "an impossible budget": ("search", "{}/run", "--budget", "macs<=10"),
    "an unknown search": ("search", "{}/run", "--search", "defaults"),
    "a search of text": ("search", "{}/run", "--search", "{}/search.yaml"),
    "a report of no run": ("report", "{}/empty"),
    "a report below a file": ("report", "{}/searched", "--out", "{}/file.txt/page.html"),
    "export what was not searched": ("export", "{}/run"),
    "export an unknown arch": ("export", "{}/run", "--arch", "tiny"),
    "export with training images": ("export", "{}/searched", "--split", "train"),
    "export over something else": ("export", "{}/searched", "--out", "{}/one class"),
    "export over a file": ("export", "{}/searched", "--out", "{}/file.txt"),
    "verify what is no bundle": ("verify", "{}/empty"),
    "verify against what is no run": ("verify", "{}/bundle", "--run", "{}/empty"),
    "verify with other images": ("verify", "{}/bundle", "--images", "{}/empty"),
    "predict without a bundle": ("predict", "{}/empty", "{}/file.txt"),
    "predict what is no image": ("predict", "{}/bundle", "{}/file.txt"),
    "predict what is not there": ("predict", "{}/bundle", "{}/none.png"),
    "predict a folder": ("predict", "{}/bundle", "{}/empty"),
    "measure nothing": ("measure",),
    "measure what is no bundle": ("measure", "{}/empty"),
    "measure on a target that is none": ("measure", "{}/bundle", "--target", "pi4"),
    "measure on no threads": ("measure", "{}/bundle", "--target", "local:0"),
    "a card over something else": ("measure", "{}/bundle", "--out", "{}/list.json"),
    "a card over the manifest": ("measure", "{}/bundle", "--out", "{}/bundle/manifest.json"),
    "verify what is no card": ("measure", "{}/bundle", "--verify", "{}/list.json"),
    "run without a class": ("run", "--data", "{}/one class", "--out", "{}/new"),
    "run with a bad budget": ("run", "--data", "{}/lines.npz", "--out", "{}/new", "--budget", "latency<=8"),
    "run with an unknown search": ("run", "--data", "{}/lines.npz", "--out", "{}/new", "--search", "x"),
    "export in an unknown format": ("export", "{}/run", "--out", "{}/new", "--arch", "smallest", "--format", "onnx,tflite"),
    "export that may gain": (
        "export",
        "{}/run",
        "--out",
        "{}/new",
        "--arch",
        "smallest",
        "--format",
        "int8",
        "--most-loss",
        "-1",
    ),
    "a search in an unknown precision": ("search", "{}/run", "--precision", "int4"),
    "demo on an unknown device": ("demo", "--out", "{}/new", "--device", "gpu"),
}


def assert_a_mistake(result: tuple[int, str, str]) -> str:
    """Exit code 2, nothing on standard output, last one line that is ours (progress may stand before it), no traceback."""
    code, out, err = result
    lines = err.splitlines()
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert lines[-1].startswith("nestling: ") and len(lines[-1]) > 30
    assert sum(line.startswith("nestling: ") for line in lines) == 1
    return lines[-1]


@pytest.mark.slow
def test_every_mistake_ends_with_2_and_one_line(command: Command, place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    for what, arguments in MISTAKES.items():
        try:
            result = command(*(argument.replace("{}", str(place)) for argument in arguments))
            line = assert_a_mistake(result)
            assert len(result[2].splitlines()) == 1 or arguments[0] in {"search", "run"}
        except BaseException as error:
            raise AssertionError(f"{what}: {error!r}") from error
        assert len(line) < 1000, what
        assert sorted(path.name for path in place.iterdir()) == before, what
    assert Run.open(place / "run").test_reads == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"], ["train"], ["train", "--out"], ["train", "--out", "x", "--epochs", "0"], ["train", "--out", "x", "--epochs", "a"],
        ["search", "run", "--threads", "0"], ["predict", "bundle"], ["describe"], ["run", "--out", "x"], ["spaces", "extra"],
        ["predict", "bundle", "image", "--top", "0"], ["describe", "--space", "digits", "--classes", "-1"], ["--what"],
    ],
)  # fmt: skip
def test_arguments_that_do_not_parse_end_with_2(command: Command, arguments: list[str]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err and "Error" in err


def test_a_gpu_that_is_not_there_is_named(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = assert_a_mistake(command("train", "--data", "digits", "--device", "cuda", "--out", tmp_path / "new"))
    assert "--device cpu" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(command: Command, easy_npz: Path, tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir(mode=0o500)
    line = assert_a_mistake(command("train", "--data", easy_npz, "--out", tmp_path / "sealed" / "run"))
    assert "sealed" in line


def test_a_line_break_in_a_name_does_not_break_the_line(command: Command, tmp_path: Path) -> None:
    assert_a_mistake(command("search", tmp_path / "a\nb\r\nc"))


DAMAGE: dict[str, tuple[str, tuple[str, ...]]] = {
    "config": ("searched/config.json", ("search", "{}/searched")),
    "config, when it is reported": ("searched/config.json", ("report", "{}/searched")),
    "splits": ("searched/splits.json", ("evaluate", "{}/searched", "--arch", "smallest")),
    "outcome of the search": ("searched/search/found.json", ("export", "{}/searched")),
    "outcome, when it is reported": ("searched/search/found.json", ("report", "{}/searched")),
    "store": ("searched/search/search.sqlite", ("search", "{}/searched")),
    "manifest": ("bundle/manifest.json", ("predict", "{}/bundle", "x.png")),
    "manifest, when it is verified": ("bundle/manifest.json", ("verify", "{}/bundle")),
    "model": ("bundle/model.onnx", ("predict", "{}/bundle", "x.png")),
    "environment": ("searched/environment.json", ("report", "{}/searched")),
    "result": ("searched/result.json", ("report", "{}/searched")),
}
CONTENTS = {
    "half": None,
    "null": b"null",
    "noise": bytes(range(256)),
    "another format": b'{"format": 9}',
}


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_ends_with_2_and_names_the_file(
    command: Command, searched_copy: Run, bundle_copy: Path, what: str, content: str
) -> None:
    name, arguments = DAMAGE[what]
    place = bundle_copy.parent
    file = place / name
    whole = file.read_bytes() if file.exists() else b'{"seconds": {"train": 1.0}, "chosen": {"key": "x"}}'
    file.write_bytes(CONTENTS[content] or b"" if content != "half" else whole[: len(whole) // 2])
    code, out, err = command(*(argument.replace("{}", str(place)) for argument in arguments))
    if (what, content) in HARMLESS:
        assert code == 0, err
        return
    line = assert_a_mistake((code, out, err))
    assert file.stem in line or "holds a run of other data" in line


HARMLESS = {("result", "null"), ("result", "another format")}
"""A result that is of another search, or of none, is not shown."""


def test_a_bug_of_ours_is_a_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("supernet.costs.arch_costs", broken)
    monkeypatch.setattr(sys, "argv", ["nestling", "describe", "--space", "digits"])
    with pytest.raises(RuntimeError, match="a bug"):
        nestling.main()


def test_a_bug_ends_the_process_with_1_and_a_mistake_with_2() -> None:
    from textwrap import dedent

    for error, expected in (("RuntimeError", 1), ("OSError", 2)):
        text = dedent(f"""
            import nestling

            def app():
                raise {error}("as planted")

            nestling.app = app
            nestling.main()
        """)
        done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == expected
        assert ("Traceback (most recent call last)" in done.stderr) == (expected == 1)
        assert "as planted" in done.stderr


# --- the whole way ---


def probed(bench: Any, arch: Any) -> Any:
    from deploy.probe import probe
    from deploy.targets import Model

    space = bench.run.space
    return Model(probe(space, arch), space.family.in_channels, space.resolution(arch))


def check_result(result: dict[str, Any]) -> None:
    for name in ("chosen", "smallest", "largest"):
        child = result[name]
        assert {"key", "top1", "top1_low", "top1_high", "macs", "params", "latency_ms", "latency_ms_high"} <= set(child)
        assert 0 <= child["top1_low"] <= child["top1"] <= child["top1_high"] <= 1
        assert 0 < child["latency_ms"] <= child["latency_ms_high"]
        assert isinstance(child["macs"], int) and isinstance(child["params"], int)
    assert result["smallest"]["macs"] <= result["chosen"]["macs"] <= result["largest"]["macs"]
    assert {"train", "search", "export", "test", "report"} <= set(result["seconds"])


def test_the_whole_way_and_once_more(
    command: Command, easy_npz: Path, tmp_path: Path, tiny_search: Path, fake_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.finalists.Bench._exported", probed)  # finalists take as long as their probes
    out = tmp_path / "run"
    arguments = ("run", "--data", easy_npz, "--out", out, "--epochs", "2", "--search", tiny_search, "--budget", "macs<=500K")
    code, text, _ = command(*arguments)
    assert code == 0
    assert "chosen" in text and str(out / "bundle") in text
    result = json.loads((out / "result.json").read_text())
    check_result(result)
    assert result["budgets"] == ["macs<=500K"]
    assert result["chosen"]["macs"] <= 500_000
    assert (out / "report.html").is_file()
    assert result["test_reads"] == Run.open(out).test_reads == 2
    bundle = Bundle.open(out / "bundle")
    assert bundle.manifest["key"] == result["chosen"]["key"]
    kept = {path: path.stat().st_mtime_ns for path in [*(out / "checkpoints").rglob("*"), *(out / "bundle").rglob("*")]}
    with Store.existing(out / "search" / "search.sqlite") as store:
        rows = store.rows()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("done before")

    for heavy in ("supernet.evaluate.Evaluator.evaluate", "deploy.export.to_onnx", "supernet.step.train_step"):
        monkeypatch.setattr(heavy, again)
    code, text, _ = command(*arguments, "--json")
    assert code == 0
    repeated = json.loads(text)
    assert {**repeated, "seconds": 0} == {**result, "seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with Store.existing(out / "search" / "search.sqlite") as store:
        assert store.rows() == rows


def test_the_whole_way_refuses_to_continue_with_other_data_or_options(
    command: Command, searched_copy: Run, easy_npz: Path, tmp_path: Path, fake_clock: None, tiny_search: Path
) -> None:
    same = ("run", "--data", easy_npz, "--out", searched_copy.path, "--search", tiny_search, "--budget", "macs<=10")
    assert "smallest reachable" in assert_a_mistake(command(*same, "--epochs", "3"))
    for other in (("--epochs", "4"), ("--epochs", "3", "--set", "seed=1")):
        assert "is continued as it was configured" in assert_a_mistake(command(*same, *other))
    for other in (("--space", "cifar-mbconv"), ("--recipe", "cifar"), ("--init", "timm:resnet50d")):
        assert "other data, space, recipe or initial weights" in assert_a_mistake(command(*same, *other))
    shutil.copy(easy_npz, tmp_path / "other.npz")
    elsewhere = ("run", "--data", tmp_path / "other.npz", "--out", searched_copy.path, "--epochs", "3")
    assert "other data" in assert_a_mistake(command(*elsewhere))


def test_a_run_that_train_began_is_not_taken_for_one_of_other_data(
    command: Command, run_copy: Run, tmp_path: Path, fake_clock: None, tiny_search: Path
) -> None:
    line = assert_a_mistake(
        command("run", "--data", "digits", "--out", run_copy.path, "--search", tiny_search, "--budget", "macs<=10")
    )
    assert "other data" in line


@pytest.mark.slow
def test_an_impossible_weight_ends_the_whole_way_before_training(command: Command, easy_npz: Path, tmp_path: Path) -> None:
    line = assert_a_mistake(command("run", "--data", easy_npz, "--out", tmp_path / "run", "--budget", "resident_bytes<=1M"))
    assert "the smallest child's resident_bytes, the smallest reachable, is" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("budget", "said"), [
    ("latency_ms<=0.001", "smallest reachable latency_ms is 0.0113"), ("load_ms@phone<=9", "measures on this machine alone"),
])  # fmt: skip
def test_an_impossible_budget_ends_the_whole_way_before_training(
    command: Command, easy_npz: Path, tmp_path: Path, fake_clock: None, budget: str, said: str
) -> None:  # fmt: skip
    line = assert_a_mistake(command("run", "--data", easy_npz, "--out", tmp_path / "run", "--budget", budget))
    assert said in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_real_folder_of_images_goes_the_whole_way_and_its_bundle_predicts(tmp_path: Path, tiny_search: Path) -> None:
    photos = image_folder(tmp_path / "photos", {"berry": 30, "leaf": 30, "sky": 30})
    out = tmp_path / "run"
    arguments = ["run", "--data", str(photos), "--out", str(out), "--epochs", "1", "--search", str(tiny_search), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def nestling_command(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nestling", *given],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    first = nestling_command(*arguments)
    assert first.returncode == 0, first.stderr
    result = json.loads((out / "result.json").read_text())
    assert json.loads(first.stdout) == result
    check_result(result)
    again = nestling_command(*arguments)
    assert again.returncode == 0, again.stderr
    assert {**json.loads(again.stdout), "seconds": 0} == {**result, "seconds": 0}
    predicted = nestling_command("predict", str(out / "bundle"), str(photos / "leaf" / "0.png"))
    assert predicted.returncode == 0, predicted.stderr
    assert re.match(r".*0\.png: (berry|leaf|sky) [0-9.]+%, ", predicted.stdout)
    listed = json.loads((out / "bundle" / "images.json").read_text())["images"]
    assert {Path(row["image"]).parts[0] for row in listed} == {"berry", "leaf", "sky"}
    checked = nestling_command("verify", str(out / "bundle"), "--run", str(out), "--images", str(photos), "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["top1"] == result["chosen"]["top1"]
    limit = result["smallest"]["latency_ms_high"] * 1.5
    tighter = nestling_command(
        "search", str(out), "--budget", f"latency_ms<={limit:.4g}", "--search", str(tiny_search), "--json"
    )
    assert tighter.returncode == 0, tighter.stderr
    assert json.loads(tighter.stdout)["best"]["latencies"]["latency_ms"]["high"] <= limit
