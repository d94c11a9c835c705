"""Disks that are full, read-only or damaged, under the real command line: one line says so, nothing whole is lost, `--resume` goes on.

The command runs in this process (`nestling.main`), with a checkpoint after every step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import nestling
from supernet import checkpoint
from supernet import train as training
from supernet.errors import InputError
from supernet.run import Run

pytestmark = pytest.mark.slow

STEPS = 8  # two epochs of four steps
RECIPE = {"batch_size": 9, "calibration_images": 36, "dropout": 0.2, "drop_path": 0.2, "ema": 0.9, "validate_epochs": 1}


class Stopped(Exception):
    """Stands for whatever may end a run."""


@pytest.fixture(autouse=True)
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)


@pytest.fixture(scope="module")
def options(
    tmp_path_factory: pytest.TempPathFactory, tiny_space: Any, save_images: Callable[..., Path]
) -> list[str]:  # fmt: skip
    """What a run begins with, but for --out."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(dict(tiny_space.definition)))
    changes = [part for key, value in RECIPE.items() for part in ("--set", f"{key}={value}")]
    return ["--data", str(save_images(folder / "images.npz")), "--space", str(folder / "tiny.yaml"), "--recipe", "digits",
            "--epochs", "2", *changes]  # fmt: skip


@pytest.fixture
def nestle(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`nestling train` on the CPU: its exit code and all that it says. What it does not expect would come out as an exception."""

    def nestle(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nestling", "train", "--device", "cpu", *arguments])
        with pytest.raises(SystemExit) as ended:
            nestling.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return nestle


Nestle = Callable[..., tuple[int, str]]


def learnt(path: Path) -> dict[str, Any]:
    """The last checkpoint, byte for byte, and the log but for the speed."""
    newest = checkpoint.latest(path / "checkpoints")
    assert newest is not None
    files = {file.name: file.read_bytes() for file in newest.iterdir()}
    return {"files": files, "log": [{**line, "images_per_s": 0} for line in metrics(path)]}


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def error_in(said: str) -> str:
    """The one line that tells the error, which is the last."""
    lines = said.rstrip("\n").splitlines()
    assert [line for line in lines if line.startswith("nestling:")] == lines[-1:]
    return lines[-1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["nestling", "train", "--device", "cpu", "--out", str(out), *options])
        with pytest.raises(SystemExit):
            nestling.main()
    return out


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory, straight: Path) -> Path:
    """The same run, interrupted after 5 of its 8 steps."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(training, "SAVE_SECONDS", -1.0)
        training.train(Run.open(out), progress=_stop)
    return out


def _stop(now: training.Progress) -> None:
    if now.step == 5:
        raise Stopped


@pytest.fixture
def stopped(tmp_path: Path, stopped_once: Path) -> Path:
    """A copy of `stopped_once` of one's own."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def newest(run: Path) -> Path:
    return checkpoint.all_of(run / "checkpoints")[-1]


# --- no room ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_but(disk: Path, room: int) -> Path:
    """Fill the disk but for `room` bytes; gives the file that does."""
    ballast, found = disk / "ballast", os.statvfs(disk)
    ballast.write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - room)))
    return ballast


def size_of(folder: Path) -> int:
    """Bytes of its files, in pages."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "checkpoints", [*(pytest.param(room, marks=pytest.mark.slow) for room in (0.0, 0.3, 0.7, 2.9)), 1.5, 3.6]
)
def test_a_disk_that_gets_full_ends_the_run_in_one_line_and_it_goes_on_bit_equal(
    small_disk: Path, straight: Path, options: list[str], nestle: Nestle, checkpoints: float
) -> None:
    """With room for so many checkpoints; two and the best are kept, and another is written before one of them goes."""
    out, before = small_disk / "run", size_of(straight) - size_of(straight / "checkpoints")
    ballast = fill_but(small_disk, before + int(checkpoints * size_of(newest(straight))))
    code, said = nestle("--out", str(out), *options)
    assert code == 2
    assert "cannot be written (No space left on device): " in error_in(said)
    assert str(out) in error_in(said)
    kept = checkpoint.all_of(out / "checkpoints")
    assert [checkpoint.verify(path) for path in kept] == [None] * len(kept)
    assert len(kept) >= int(checkpoints)
    if kept:
        assert f"make room there, then `nestling train --resume --out {out}`" in error_in(said)

    assert nestle("--out", str(out), "--resume")[0] == 2  # still full
    assert checkpoint.all_of(out / "checkpoints") == kept
    ballast.unlink()
    assert nestle("--out", str(out), "--resume")[0] == 0
    assert learnt(out) == learnt(straight)


def test_a_disk_that_is_full_from_the_beginning_leaves_no_run(small_disk: Path, options: list[str], nestle: Nestle) -> None:
    ballast = fill_but(small_disk, 0)
    code, said = nestle("--out", str(small_disk / "run"), *options)
    assert code == 2
    assert "No space left on device" in error_in(said)
    ballast.unlink()
    assert nestle("--out", str(small_disk / "run"), *options)[0] == 0


# --- a place that is none ---


def test_a_place_that_does_not_allow_writing_is_refused_at_once(small_disk: Path, options: list[str], nestle: Nestle) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk, small_disk / "deep" / "run"):
        code, said = nestle("--out", str(out), *options)
        assert code == 2
        assert error_in(said) == (
            f"nestling: {out} cannot be written, for {small_disk} does not allow it: choose another --out, or allow it"
        )


def test_a_run_on_a_disk_that_became_read_only_goes_on_when_it_is_writable_again(
    small_disk: Path, stopped: Path, straight: Path, nestle: Nestle
) -> None:
    out = shutil.copytree(stopped, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, said = nestle("--out", str(out), "--resume")
    assert code == 2
    assert f"{out / 'train.lock'} cannot be written (Read-only file system): " in error_in(said)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert nestle("--out", str(out), "--resume")[0] == 0
    assert learnt(out) == learnt(straight)


@pytest.mark.parametrize("deeper", ["", "run", "deep/run"])
def test_a_file_in_the_place_of_the_run_is_refused_and_stays(
    tmp_path: Path, options: list[str], nestle: Nestle, deeper: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    out = file / deeper
    code, said = nestle("--out", str(out), *options)
    assert code == 2
    assert error_in(said) == f"nestling: {out} cannot be a folder, for {file} is a file: choose another --out"
    assert file.read_text() == "mine"


# --- damaged checkpoints ---


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


FILES = ("weights.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_told_and_the_older_checkpoint_taken(
    stopped: Path, straight: Path, nestle: Nestle, name: str
) -> None:  # fmt: skip
    assert sorted(FILES) == sorted(file.name for file in newest(stopped).iterdir())
    flip(newest(stopped) / name, random.Random(name).randrange(8 * (newest(stopped) / name).stat().st_size))
    problem = checkpoint.verify(newest(stopped))
    code, said = nestle("--out", str(stopped), "--resume")
    assert code == 0, said
    assert f"step-000000005 is damaged ({problem}): going back to step-000000004" in said
    assert learnt(stopped) == learnt(straight)


@pytest.mark.parametrize("name", FILES)
def test_no_bit_of_a_checkpoint_may_flip(stopped: Path, name: str) -> None:
    file, bits = newest(stopped) / name, random.Random(name)
    whole = file.read_bytes()
    for bit in bits.sample(range(8 * len(whole)), 100):
        flip(file, bit)
        assert checkpoint.verify(newest(stopped)) is not None, bit
        file.write_bytes(whole)
    assert checkpoint.verify(newest(stopped)) is None


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_with_the_reason(stopped: Path, nestle: Nestle) -> None:
    for path in checkpoint.all_of(stopped / "checkpoints"):
        flip(path / "state.json", 100)
    before = {file: file.read_bytes() for file in stopped.rglob("step-*/*")}
    code, said = nestle("--out", str(stopped), "--resume")
    assert code == 2
    assert error_in(said).startswith(
        f"nestling: no checkpoint of {stopped} is whole (state.json was changed since it was written)"
    )
    assert {file: file.read_bytes() for file in stopped.rglob("step-*/*")} == before


def rewritten(path: Path, **changes: Any) -> None:
    """Change the state of a checkpoint and sign it anew."""
    saved = checkpoint.load(path)
    checkpoint.remove(path)
    checkpoint.save(path.parent, checkpoint.Checkpoint(saved.step, saved.tensors, {**saved.state, **changes}), keep=9)


def test_a_checkpoint_of_another_space_is_refused(stopped: Path, nestle: Nestle) -> None:
    rewritten(newest(stopped), space="0123456789abcdef")
    code, said = nestle("--out", str(stopped), "--resume")
    assert code == 2
    assert error_in(said).startswith("nestling: the checkpoint was written for the space 0123456789abcdef, this run has ")


def test_checkpoints_of_another_format_are_refused_with_the_reason(stopped: Path, nestle: Nestle) -> None:
    for path in checkpoint.all_of(stopped / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": checkpoint.FORMAT - 1}))
    code, said = nestle("--out", str(stopped), "--resume")
    assert code == 2
    assert f"it has format {checkpoint.FORMAT - 1}, this version reads {checkpoint.FORMAT}" in error_in(said)


# --- damaged logs ---

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda log: log[:-20],
    "torn, then a line": lambda log: log[:-20] + b"\n",
    "zeros": lambda log: log[:-50] + bytes(50),
    "not text": lambda log: log[:-50] + b"\xff" * 49 + b"\n",
    "other values": lambda log: log + b'5\n"step"\n[]\nnull\n{}\n{"step": "6"}\n{"step": NaN}\n',
    "empty": lambda log: b"",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_log_does_not_stop_a_run_and_its_whole_lines_stay(
    stopped: Path, straight: Path, nestle: Nestle, kind: str
) -> None:
    log = (stopped / "metrics.jsonl").read_bytes()
    (stopped / "metrics.jsonl").write_bytes(DAMAGE[kind](log))
    code, said = nestle("--out", str(stopped), "--resume")
    assert code == 0, said
    steps = [line["step"] for line in metrics(stopped)]
    lost = {"other values": [], "empty": [1, 2, 3, 4, 5]}.get(kind, [5])
    assert steps == [step for step in range(1, STEPS + 1) if step not in lost]
    assert learnt(stopped)["files"] == learnt(straight)["files"]


def test_a_rollback_that_its_file_forgot_is_not_forgotten(stopped: Path, nestle: Nestle) -> None:
    """Without it the run would go on at the full rate, with the draws that led astray."""
    rollbacks = stopped / "rollbacks.jsonl"
    line = json.dumps({"at": 4, "to": 3, "reason": "the weights are not finite"}) + "\n"
    rollbacks.write_text(line)
    with pytest.raises(Stopped):
        training.train(Run.open(stopped), progress=lambda now: _stop_at(now, 6))
    assert metrics(stopped)[-1]["step"] == 6
    for damaged in (None, "", line[:-9], "\0" * len(line)):
        rollbacks.unlink(missing_ok=True)
        if damaged is not None:
            rollbacks.write_text(damaged)
        code, said = nestle("--out", str(stopped), "--resume")
        assert code == 2
        assert error_in(said) == (
            f"nestling: {rollbacks} tells of 0 rollbacks, but step-000000006 was saved after 1: restore it, or add a line {{}} for "
            "each that it lacks"
        )
    rollbacks.write_text("{}\n")
    assert nestle("--out", str(stopped), "--resume")[0] == 0
    assert metrics(stopped)[-1]["step"] == STEPS


def _stop_at(now: training.Progress, step: int) -> None:
    if now.step == step:
        raise Stopped


# --- a damaged configuration ---


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", bytes(300), b"[" * 100_000])
def test_a_configuration_that_is_none_is_refused_and_stays(stopped: Path, nestle: Nestle, content: bytes) -> None:
    (stopped / "config.json").write_bytes(content)
    code, said = nestle("--out", str(stopped), "--resume")
    assert code == 2
    assert str(stopped / "config.json") in error_in(said)
    assert (stopped / "config.json").read_bytes() == content


@pytest.mark.parametrize("name", ["config.json", "splits.json"])
def test_a_flipped_bit_of_what_a_run_was_told_is_refused_or_changes_a_word(stopped: Path, name: str) -> None:
    file, bits, refused = stopped / name, random.Random(name), 0
    whole = file.read_bytes()
    for bit in bits.sample(range(8 * len(whole)), 150):
        flip(file, bit)
        try:
            _ = Run.open(stopped).dataset
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
        file.write_bytes(whole)
    assert refused > 75
