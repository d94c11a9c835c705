"""Kits: one that is run as a user runs it, and results that are not what a kit writes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy import far, kit, runner
from deploy.kit import Kit, hash_of, read_results, write_kit
from deploy.probe import probe
from deploy.targets import Local, Model
from deploy.timing import Timing
from supernet.durable import WriteError
from supernet.errors import InputError
from supernet.space import load_space


def models(count: int) -> list[Model]:
    space = load_space("digits")
    return [Model(probe(space, arch), 1, space.resolution(arch)) for arch in [space.smallest] * (count - 1) + [space.largest]]


def run(path: Path, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """As its user does: elsewhere, without our packages."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, "-W", "error", str(path)],
        cwd=path.parent,
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Of a kit with three models, whose results are in results.json."""
    return write_kit(tmp_path / "kit.zip", [(model, {}) for model in models(3)], Kit(), width=10.0, most_seconds=0.1)


@pytest.fixture
def results(job: dict[str, Any], make_timing: Callable[..., Timing]) -> dict[str, Any]:
    return {
        "format": runner.FORMAT,
        "job": job["hash"],
        "fingerprint": {"processor": "a board", "machine": "aarch64", "cores": 4, "runtime": "onnxruntime 1.23.0"},
        "conditions_before": {},
        "timings": {str(at): make_timing(1.0 + at).as_dict() for at in range(3)},
    }


def test_a_kit_runs_as_a_zip_and_unpacked_and_its_results_are_read(tmp_path: Path, job: dict[str, Any]) -> None:
    done = run(tmp_path / "kit.zip")
    assert (done.returncode, done.stderr) == (0, "")
    found = read_results(tmp_path / "results.json", job)
    assert set(found.timings) == {0, 1, 2}
    assert found.fingerprint == Local().fingerprint()
    folder = tmp_path / "a folder"
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        archive.extractall(folder)
    (folder / "results.json").write_bytes((tmp_path / "results.json").read_bytes())
    again = run(folder)
    assert again.returncode == 0 and "3 timed already" in again.stdout
    assert read_results(folder / "results.json", job).timings == found.timings


def test_a_kit_is_complete_and_always_the_same(tmp_path: Path, job: dict[str, Any]) -> None:
    write_kit(tmp_path / "again.zip", [(model, {}) for model in models(3)], Kit(), width=10.0, most_seconds=0.1)
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "kit.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert json.loads(archive.read("job.json")) == job
        assert archive.read(job["models"][2]["file"]) == models(3)[2].data
        text = archive.read("README.txt").decode()
    assert {"__main__.py", "deploy/timing.py", "deploy/runner.py", "deploy/__init__.py", "README.txt"} <= set(names)
    assert "pip install numpy onnxruntime" in text and "3 models, 1 thread" in text
    assert job["hash"] == hash_of(job) and job["format"] == runner.FORMAT


@pytest.mark.parametrize("change", [{"threads": 2}, {"precision": "int8"}, {"runtime": "openvino"}])
def test_other_settings_are_another_job(tmp_path: Path, job: dict[str, Any], change: dict[str, Any]) -> None:
    assert (
        write_kit(tmp_path / "other.zip", [(model, {}) for model in models(3)], Kit(**change), width=10.0, most_seconds=0.1)[
            "hash"
        ]
        != job["hash"]
    )


def test_a_kit_without_models_and_one_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a kit holds models"):
        write_kit(tmp_path / "kit.zip", [], Kit())
    with pytest.raises(WriteError, match="cannot be written"):
        write_kit(tmp_path / "no" / "kit.zip", [(models(1)[0], {})], Kit())


def test_the_target_of_a_kit_says_that_it_is_measured_elsewhere() -> None:
    for ask in (Kit().fingerprint, lambda: Kit().measure([]), Kit().conditions):
        with pytest.raises(InputError, match=r"write a kit, run it there, and import its results.json"):
            ask()


@pytest.mark.slow
def test_a_kit_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    count = runner.AT_ONCE + 4
    job = write_kit(tmp_path / "kit.zip", [(model, {}) for model in models(count)], Kit(), width=0.0, most_seconds=1.0)
    out = tmp_path / "results.json"
    process = subprocess.Popen([sys.executable, str(tmp_path / "kit.zip")], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not out.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_results(out, job, partly=True).timings
    assert 0 < len(before) < count
    with pytest.raises(
        InputError, match=f"holds {len(before)} of {count} models, {count - len(before)} are missing: run the kit again"
    ):
        read_results(out, job)
    done = run(tmp_path / "kit.zip")
    assert done.returncode == 0, done.stderr
    after = read_results(out, job).timings
    assert {at: after[at] for at in before} == before and len(after) == count


@pytest.mark.slow
def test_results_of_another_kit_beside_a_kit_are_not_taken_over(
    tmp_path: Path, job: dict[str, Any], results: dict[str, Any]
) -> None:
    for text in (json.dumps({**results, "job": "another"}), json.dumps(results), "{", "[]", '{"timings": 3}'):
        (tmp_path / "results.json").write_text(text)  # the second is of another machine
        assert "0 timed already" in run(tmp_path / "kit.zip").stdout


@pytest.mark.slow
def test_a_damaged_model_and_missing_packages_end_in_a_line(tmp_path: Path, job: dict[str, Any]) -> None:
    folder = tmp_path / "kit"
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        archive.extractall(folder)
    (folder / "models" / "00000.onnx").write_bytes(b"other")
    done = run(folder)
    assert (done.returncode, done.stderr) == (2, "error: models/00000.onnx is damaged: unpack the kit anew\n")
    (folder / "numpy.py").write_text("raise ImportError('none here')")
    done = run(folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: numpy cannot be imported by") and "pip install numpy" in done.stderr
    (folder / "job.json").write_text('{"format": 9}')
    assert run(folder).stderr == f"error: this kit has format 9, its runner reads {runner.FORMAT}\n"


# --- what comes back ---


def told(path: Path, job: dict[str, Any], value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(InputError) as caught:
        read_results(path, job)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600 and str(path) in str(caught.value)
    return str(caught.value)


def test_whole_results_are_read(tmp_path: Path, job: dict[str, Any], results: dict[str, Any]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = read_results(tmp_path / "results.json", job)
    assert [found.timings[at].latency_ms for at in range(3)] == [1.0, 2.0, 3.0]
    assert found.fingerprint["processor"] == "a board" and len(found.fingerprint["hash"]) == 12


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"format": 99}, "has format 99"),
    ({"format": None}, "has format None"),
    ({"job": "0123"}, "is of another kit"),
    ({"job": None}, "is of another kit"),
    ({"timings": None}, "there are no timings"),
    ({"timings": []}, "there are no timings"),
    ({"timings": {}}, "3 are missing"),
    ({"fingerprint": None}, "what no kit writes"),
    ({"fingerprint": {"processor": "p"}}, "what no kit writes"),
    ({"fingerprint": {"processor": "p", "machine": "m", "cores": -4, "runtime": "onnxruntime 1"}}, "1 or more cores"),
    ({"fingerprint": {"processor": "p", "machine": "m", "cores": 4, "runtime": "openvino 1"}}, "of the runtime openvino"),
]


@pytest.mark.parametrize("change, said", CHANGES)
def test_results_that_are_not_this_kits_are_told(
    tmp_path: Path, job: dict[str, Any], results: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    assert said in told(tmp_path / "results.json", job, {**results, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"latency_ms": math.nan}, {"latency_ms": math.inf}, {"latency_ms": -1.0}, {"latency_ms": 0.0}, {"latency_ms": "1"},
        {"low_ms": 2.0, "high_ms": 0.5}, {"clock": "wall"}, {"clock": "sun"}, {"samples": 0}, {"why": "a\nb"}, {"more": 1},
    ],
)  # fmt: skip
def test_timings_that_cannot_be_are_told(
    tmp_path: Path, job: dict[str, Any], results: dict[str, Any], change: dict[str, Any]
) -> None:
    results["timings"]["0"].update(change)
    assert "what no kit writes" in told(tmp_path / "results.json", job, results)


@pytest.mark.parametrize("key", ["3", "-1", "01", "x", "", "1.0", "٢", "9" * 30, " 1"])
def test_models_that_are_not_in_the_kit_are_told(
    tmp_path: Path, job: dict[str, Any], results: dict[str, Any], key: str
) -> None:
    results["timings"][key] = results["timings"]["0"]
    assert "there is no model" in told(tmp_path / "results.json", job, results)


def test_a_missing_model_is_counted_and_a_part_can_be_read(
    tmp_path: Path, job: dict[str, Any], results: dict[str, Any]
) -> None:
    del results["timings"]["1"]
    assert "holds 2 of 3 models, 1 are missing: run the kit again, it goes on" in told(tmp_path / "results.json", job, results)
    assert set(read_results(tmp_path / "results.json", job, partly=True).timings) == {0, 2}


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[1]", "7", '{"format": 1, "format": 1}', "[" * 100_000, "\x00", '"' + "a" * 100]
)
def test_what_is_no_json_of_results_is_told(tmp_path: Path, job: dict[str, Any], text: str) -> None:
    assert "results.json" in told(tmp_path / "results.json", job, text)


def test_a_huge_file_a_folder_and_none_are_told(tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(kit.MOST_BYTES + 1)
    with pytest.raises(InputError, match="results have at most 67108864"):
        read_results(huge, job)
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="cannot be read"):
            read_results(path, job)


def test_a_torn_results_file_is_told_at_every_length(tmp_path: Path, job: dict[str, Any], results: dict[str, Any]) -> None:
    text = json.dumps(results)
    for end in range(0, len(text), 37):
        assert "no whole results.json" in told(tmp_path / "results.json", job, text[:end])


# --- other Pythons ---

PYTHONS = sorted(
    path for version in ("3.9", "3.10", "3.12", "3.13") for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
)


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS or [Path("none")], ids=lambda path: path.parent.parent.name)
def test_a_kit_runs_under_other_pythons(tmp_path: Path, job: dict[str, Any], python: Path) -> None:
    if (
        not python.exists()
        or subprocess.run([python, "-c", "import numpy, onnxruntime"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"{python} has no numpy and onnxruntime")
    done = run(tmp_path / "kit.zip", str(python))
    assert done.returncode == 0, done.stderr
    assert len(read_results(tmp_path / "results.json", job).timings) == 3


@pytest.mark.slow
def test_a_python_that_is_too_old_is_told(tmp_path: Path, job: dict[str, Any]) -> None:
    old = next((path for path in Path.home().glob(".pyenv/versions/[23].[678]*/bin/python")), None)
    if old is None:
        pytest.skip("no Python before 3.9 is at ~/.pyenv/versions")
    done = run(tmp_path / "kit.zip", str(old))
    assert done.stderr.startswith(f"error: this kit needs Python {far.OLDEST[0]}.{far.OLDEST[1]} or later, but")


@pytest.mark.nightly
def test_a_kit_runs_on_another_processor(tmp_path: Path, job: dict[str, Any]) -> None:
    """Emulated: that it works, and says where. Its times are those of the emulator.

    $NESTLING_ARM64 names a folder with `root` (`debootstrap --arch=arm64 --foreign --include=python3`, its packages unpacked by
    `dpkg-deb -x`) and `site` (wheels of numpy and onnxruntime 1.23.2 for manylinux_2_28_aarch64, unpacked).
    """
    given, emulator = os.environ.get("NESTLING_ARM64"), shutil.which("qemu-aarch64-static")
    if given is None or emulator is None:
        pytest.skip("$NESTLING_ARM64 names no folder with an arm64 system, or qemu-aarch64-static is not here")
    root = Path(given) / "root"
    python = next(path for path in sorted((root / "usr" / "bin").glob("python3.*")) if path.suffix[1:].isdigit())
    command = [emulator, "-cpu", "cortex-a72", "-L", str(root), str(python), str(tmp_path / "kit.zip")]
    done = subprocess.run(command, env={"PYTHONPATH": f"{given}/site"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_results(tmp_path / "results.json", job)
    assert found.fingerprint["machine"] == "aarch64" and len(found.timings) == 3
