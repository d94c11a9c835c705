"""The script in a bundle, run as a user runs it: from elsewhere, where there is nothing but onnxruntime, NumPy and Pillow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.bundle import Bundle, write_manifest
from deploy.predict import Predictor, check, file_of, main, report
from supernet.run import Run

GUARD = """
import importlib.abc, sys

ALLOWED = sys.stdlib_module_names | {"onnxruntime", "numpy", "PIL", "preprocess"}
ALLOWED |= {name.partition(".")[0] for name in sys.modules}


class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r} (not in this environment)", name=name)


sys.meta_path.insert(0, Guard())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which no other package can be imported: not torch, not onnx, not ours."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return {**kept, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": ""}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def shipped(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as it reached another machine."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path_factory.mktemp("shipped") / "my model"))


@pytest.fixture(scope="module")
def images(tiny_searched: tuple[Run, Any]) -> Path:
    """The folder of the images in images.json."""
    return tiny_searched[0].path / "images"


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(bare: dict[str, str], elsewhere: Path) -> Script:
    """Runs the script of a bundle."""

    def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, folder / "predict.py", *arguments]
        return subprocess.run(command, cwd=elsewhere, env=bare, capture_output=True, text=True, timeout=60, check=False)

    return run


def some_image(folder: Path) -> Path:
    return sorted(folder.glob("*.png"))[0]


def test_the_environment_of_these_tests_is_bare(bare: dict[str, str], elsewhere: Path) -> None:
    for name in ("torch", "supernet", "deploy", "search", "onnx", "scipy", "pydantic", "yaml"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=elsewhere, env=bare, capture_output=True, check=False
        )
        assert done.returncode == 1, name


@pytest.mark.parametrize("how", ["bundle", "package"])
def test_nothing_is_written_into_the_home_directory(
    how: str, shipped: Path, images: Path, bare: dict[str, str], tmp_path: Path
) -> None:
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    model = f"open({str(shipped / 'model.onnx')!r}, 'rb').read()"
    code = f"from deploy.runtimes.onnxruntime import OnnxRuntime; OnnxRuntime().load({model})"
    command = [shipped / "predict.py", some_image(images)] if how == "bundle" else ["-c", code]
    env = {name: value for name, value in (bare if how == "bundle" else os.environ).items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, *command], env={**env, **home}, capture_output=True, timeout=60, check=True)
    assert [path for path in tmp_path.rglob("*") if "python" not in str(path).lower()] == []


def test_every_listed_image_is_predicted_as_at_export(script: Script, shipped: Path, images: Path, tiny_bundle: Bundle) -> None:
    done = script(shipped, "--check", images)
    assert (done.returncode, done.stderr) == (0, "")
    accuracy = tiny_bundle.manifest["accuracy"]
    assert json.loads(done.stdout) == {
        "images": accuracy["images"],
        "top1": accuracy["top1"],
        "differ": [],
        "same_as_manifest": True,
    }


def test_a_line_of_json_an_image_holds_the_classes_that_the_manifest_lists(
    script: Script, shipped: Path, images: Path, tiny_bundle: Bundle
) -> None:
    listed = json.loads((shipped / "images.json").read_text())["images"]
    files = [str(file_of(row["image"], images)) for row in listed]
    done = script(shipped, "--json", "--top", "99", *files)
    assert (done.returncode, done.stderr) == (0, "")
    expected = tiny_bundle.predict(files)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line, file, row, probabilities in zip(lines, files, listed, expected, strict=True):
        assert line["image"] == file
        found = {entry["class"]: entry["probability"] for entry in line["classes"]}
        assert line["classes"][0]["class"] == row["predicted"]
        assert list(found) == sorted(found, key=lambda name: -found[name])
        np.testing.assert_allclose([found[name] for name in tiny_bundle.classes], probabilities, atol=1e-5)


def test_running_the_script_leaves_the_bundle_as_it_was_exported(script: Script, shipped: Path, images: Path) -> None:
    done = script(shipped, some_image(images))
    assert done.returncode == 0
    assert not (shipped / "__pycache__").exists()
    Bundle.open(shipped)


def test_an_image_that_cannot_be_read_ends_with_2_and_one_line(script: Script, shipped: Path, elsewhere: Path) -> None:
    (elsewhere / "broken.png").write_bytes(b"no image")
    done = script(shipped, "broken.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "broken.png" in done.stderr


# --- the same in this process ---


@pytest.fixture
def here(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one's own, which `main` takes for the one that it lies in."""
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    monkeypatch.setattr("deploy.predict.__file__", str(folder / "predict.py"))
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_missing_file_ends_with_2_and_one_line(
    here: Path, picture: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (here / name).unlink()
    assert main([picture]) == 2
    assert_one_line(capsys, name)


def test_a_missing_list_of_images_ends_with_2_and_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "images.json").unlink()
    assert main(["--check", str(here)]) == 2
    assert_one_line(capsys, "images.json")


@pytest.mark.parametrize("name", ["model.onnx", "images.json"])
def test_a_changed_file_ends_with_2_and_one_line(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / name).write_bytes((here / name).read_bytes() + b" ")
    assert main(["--check", str(here)]) == 2
    assert_one_line(capsys, name, "was changed")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"images": 3}', '{"images": [3]}', '{"images": [{"image": "x"}]}', "[" * 100_000]
)
def test_a_planted_list_that_is_none_ends_with_2_and_one_line(
    here: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (here / "images.json").write_text(content)
    write_manifest(here, json.loads((here / "manifest.json").read_text()))
    assert main(["--check", str(here)]) == 2
    assert_one_line(capsys, "images.json")


def test_a_list_that_lost_its_images_is_not_what_the_manifest_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "images.json").write_text('{"images": []}')
    write_manifest(here, json.loads((here / "manifest.json").read_text()))
    assert main(["--check", str(here)]) == 1
    assert json.loads(capsys.readouterr().out) == {"images": 0, "top1": 0.0, "differ": [], "same_as_manifest": False}


def test_a_manifest_that_boasts_is_found_out(images: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((here / "manifest.json").read_text())
    manifest["accuracy"]["top1"] = 0.999
    write_manifest(here, manifest)
    assert main(["--check", str(images)]) == 1
    assert json.loads(capsys.readouterr().out)["same_as_manifest"] is False


def test_an_image_of_the_check_that_is_missing_ends_with_2(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", str(tmp_path)]) == 2
    assert_one_line(capsys, "there is no such file")


def test_an_image_that_is_predicted_otherwise_ends_the_check_with_1(
    here: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Path(shutil.copytree(images, tmp_path / "images"))
    listed = json.loads((here / "images.json").read_text())["images"]
    one, other = listed[0], next(row for row in listed if row["predicted"] != listed[0]["predicted"])
    shutil.copy(file_of(other["image"], images), file_of(one["image"], changed))
    assert main(["--check", str(changed)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["differ"] == [one["image"]]
    assert result["top1"] < 1


@pytest.mark.parametrize("arguments", [[], ["--top", "0", "x.png"], ["--top", "many", "x.png"], ["--unknown"]])
def test_arguments_that_mean_nothing_end_with_2(here: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2


def test_plain_lines_name_the_file_and_the_likeliest_classes(
    here: Path, picture: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--top", "2", picture, picture]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = tiny_bundle.classes[int(tiny_bundle.predict([picture])[0].argmax())]
    assert len(lines) == 2
    assert all(line.startswith(f"{picture}: {best} ") and line.count("%") == 2 for line in lines)


def test_names_cannot_break_a_line_or_command_a_terminal(
    tiny_bundle: Bundle, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(tiny_bundle.path)
    monkeypatch.setattr(predictor, "classes", ["a\nb", "\x1b[2Jc", "\udcff"])
    strange = Path(picture).with_name("x\ny\x1b.png")
    Path(picture).rename(strange)
    report(predictor, [str(strange)], 3, as_json=False)
    out = capsys.readouterr().out
    assert out.isascii() and out[:-1].isprintable()
    assert all(name in out for name in ("a?b", "?[2Jc", "x?y?.png"))


def test_the_check_reads_files_of_any_suffix_and_adds_png_to_names_without(tmp_path: Path) -> None:
    assert file_of("cat/1.jpg", tmp_path) == tmp_path / "cat" / "1.jpg"
    assert file_of("test/00012", tmp_path) == tmp_path / "test" / "00012.png"


def test_the_number_of_threads_changes_nothing(tiny_bundle: Bundle, images: Path) -> None:
    assert check(Predictor(tiny_bundle.path, threads=2), images) == check(Predictor(tiny_bundle.path), images)
