"""`torchrun -m nestling train` in two real processes: what one learns, also after a process was killed, and who says what.

Every job costs the seconds in which two processes import torch, so each test makes one and looks at all that it left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import nestling
from supernet import checkpoint
from supernet import start as starting
from supernet import train as training
from supernet.distributed import ENDED, World, world
from supernet.errors import InputError
from supernet.run import Run

ROOT = Path(__file__).parents[2]
STEPS, KILLED_AT = 10, 6  # two epochs of five steps
TOLERANCE = 1e-5
PLAIN = {"batch_size": 12, "calibration_images": 36, "guard.skips": 5}
MIXED = {
    **PLAIN, "bn_group": 3, "mix.mixup": 0.4, "mix.cutmix": 0.6, "sampling.rule": "best_up", "sampling.bins": 4,
    "validate_epochs": 1, "ema": 0.9,
}  # fmt: skip


class Stopped(Exception):
    """Stands for whatever may end a run."""


# --- what a process of a job runs, where it is not the command line as it is ---


def killed() -> None:
    """The command line, saving after every step; in the second process until it is killed in the middle of one."""
    training.SAVE_SECONDS = -1.0
    reduce_gradients, steps = training.reduce_gradients, 0

    def reduce(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if os.environ["RANK"] == "1" and steps == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        reduce_gradients(*arguments)

    training.reduce_gradients = reduce
    nestling.main()


def taken_up() -> None:
    """Train the runs that are named, one after the other."""
    with world("cpu") as all_:
        for name in sys.argv[1:]:
            path = Path(name)
            run = starting.together(all_, path, lambda path=path: starting.resume(path)).run  # type: ignore[misc]
            training.train(run, world=all_)


JOB = "import sys; sys.path[:0] = [{root!r}, {folder!r}]; import test_train_distributed as it; it.{name}()"


# --- what the tests do ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_images: Callable[..., Path]) -> Path:
    """A folder with images to learn, 64 of them to train on."""
    folder = tmp_path_factory.mktemp("jobs")
    save_images(folder / "images.npz", count=100)
    return folder


@pytest.fixture(scope="module")
def space(folder: Path, tiny_space: Any) -> str:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(dict(tiny_space.definition)))
    return str(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def begin(folder: Path, space: str) -> Callable[..., Run]:
    """A run that is not trained yet."""

    def begin(name: str, recipe: Mapping[str, Any]) -> Run:
        images = str(folder / "images.npz")
        return starting.start(images, folder / name, space=space, recipe="digits", epochs=2, overrides=recipe).run

    return begin


@pytest.fixture(scope="module")
def alone(begin: Callable[..., Run]) -> Run:
    """What one process makes of `MIXED`."""
    run = begin("alone", MIXED)
    training.train(run)
    return run


def options(folder: Path, space: str, recipe: Mapping[str, Any]) -> list[str]:
    """The same run as `begin` makes, on the command line."""
    changes = [part for key, value in recipe.items() for part in ("--set", f"{key}={value}")]
    return ["--data", str(folder / "images.npz"), "--space", space, "--recipe", "digits", "--epochs", "2", "--device", "cpu",
            *changes]  # fmt: skip


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two processes; one that waited for the other as long as it may (10 minutes) would not end in time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("NESTLING_TIMEOUT_S", None)
    whole = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=400)


def job(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of the function `name` of this file."""
    script = folder / f"{name}.py"
    script.write_text(JOB.format(root=str(ROOT), folder=str(Path(__file__).parent), name=name))
    return torchrun(str(script), *arguments)


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def learnt(run: Run) -> dict[str, Tensor]:
    """All tensors of the last checkpoint."""
    path = checkpoint.latest(run.checkpoints)
    assert path is not None
    assert checkpoint.step_of(path) == STEPS
    return {f"{group}.{key}": value for group, values in checkpoint.load(path).tensors.items() for key, value in values.items()}


def distance(found: Run, wanted: Run) -> float:
    """Largest difference of a group of tensors (weights, average, optimizer), relative to its norm."""
    these, those = learnt(found), learnt(wanted)
    assert these.keys() == those.keys()

    def flat(tensors: Mapping[str, Tensor], group: str) -> Tensor:
        return torch.cat([value.double().flatten() for key, value in sorted(tensors.items()) if key.startswith(f"{group}.")])

    groups = {key.partition(".")[0] for key in those}
    assert {"weights", "optimizer"} <= groups
    return max(float((flat(these, group) - flat(those, group)).norm() / flat(those, group).norm()) for group in groups)


def assert_same_log(found: Run, wanted: Run) -> None:
    these, those = metrics(found), metrics(wanted)
    assert [line["step"] for line in these] == list(range(1, STEPS + 1))
    assert any("validation" in line for line in those)
    for this, that in zip(these, those, strict=True):
        assert this.keys() == that.keys()
        assert this["learning_rate"] == that["learning_rate"]
        assert this["gradient_norm"] == pytest.approx(that["gradient_norm"], rel=1e-4)
        for name in ("children", "validation"):
            numbers, wanted_numbers = (dict(_numbers(line.get(name, {}))) for line in (this, that))
            assert numbers == pytest.approx(wanted_numbers, rel=TOLERANCE, abs=2e-6)  # rounded to six places


def _numbers(value: Any, name: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _numbers(inner, f"{name}.{key}")]
    return [(name, value)]


def words(said: str) -> list[str]:
    """What Nestling says of errors; a traceback through Nestling is never among it."""
    assert str(ROOT / "supernet") not in said
    assert str(ROOT / "nestling.py") not in said
    return [line for line in said.splitlines() if "nestling:" in line]


@pytest.mark.slow
def test_two_processes_learn_and_log_what_one_does_and_the_first_speaks(
    folder: Path, space: str, alone: Run, begin: Callable[..., Run]
) -> None:
    out = folder / "together"
    found = torchrun("-m", "nestling", "train", *options(folder, space, MIXED), "--out", str(out), "--json")
    assert found.returncode == 0, found.stderr
    together = Run.open(out)
    assert distance(together, alone) < TOLERANCE
    assert_same_log(together, alone)
    assert json.loads(found.stdout)["weights_sha256"] == together.weights_hash
    for said in ("data: 100 images (64 to train)", "train ..."):
        assert found.stderr.count(said) == 1
    assert words(found.stderr) == []

    in_pieces = begin("in_pieces", {**MIXED, "micro_batch": 6})
    training.train(in_pieces)
    assert distance(together, in_pieces) < TOLERANCE
    for name, other in {
        "ungrouped": {"bn_group": None},
        "uniform": {"sampling.rule": "uniform"},
        "whole": {"mix.mixup": 0.0},
    }.items():
        changed = begin(name, {**MIXED, **other})
        training.train(changed)
        assert distance(changed, alone) > 100 * TOLERANCE, other  # so that the equalities above say something


@pytest.mark.slow
def test_two_processes_take_up_what_one_began_and_synchronised_norms_see_the_whole_batch(
    folder: Path, alone: Run, begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(now: training.Progress) -> None:
        if now.step == KILLED_AT:
            raise Stopped

    begun, synchronised, plain = (
        begin("begun", MIXED),
        begin("synchronised", {**PLAIN, "bn_group": "sync"}),
        begin("plain", PLAIN),
    )
    with monkeypatch.context() as patched:
        patched.setattr(training, "SAVE_SECONDS", -1.0)
        with pytest.raises(Stopped):
            training.train(begun, progress=stop)
    found = job(folder, "taken_up", str(begun.path), str(synchronised.path))
    assert found.returncode == 0, found.stderr
    assert words(found.stderr) == []

    assert distance(begun, alone) < TOLERANCE
    assert_same_log(begun, alone)
    training.train(plain)
    assert distance(synchronised, plain) < TOLERANCE
    assert_same_log(synchronised, plain)


@pytest.mark.slow
def test_a_process_is_killed_the_other_says_what_to_do_and_one_process_goes_on(
    folder: Path, space: str, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "killed"
    found = job(folder, "killed", "train", *options(folder, space, MIXED), "--out", str(out))
    assert found.returncode != 0
    (line,) = words(found.stderr)
    assert line.startswith("nestling: ")
    assert line.endswith(
        "then start the same command again (a training: `nestling train --resume --out RUN`), on any number of processes"
    )
    kept = checkpoint.all_of(out / "checkpoints")
    assert checkpoint.step_of(kept[-1]) == KILLED_AT - 1
    assert [checkpoint.verify(path) for path in kept] == [None] * len(kept)

    monkeypatch.setattr(sys, "argv", ["nestling", "train", "--resume", "--out", str(out), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        nestling.main()
    assert not ended.value.code
    resumed = Run.open(out)
    assert resumed.finished
    assert distance(resumed, alone) < TOLERANCE
    assert_same_log(resumed, alone)


@pytest.mark.slow
def test_a_job_that_cannot_begin_ends_with_one_message(folder: Path, space: str, alone: Run) -> None:
    before = {path: path.read_bytes() for path in alone.path.rglob("*") if path.is_file()}
    found = torchrun("-m", "nestling", "train", *options(folder, space, MIXED), "--out", str(alone.path))
    assert found.returncode != 0
    (line,) = words(found.stderr)
    assert line.startswith(f"nestling: {alone.path} holds a run already: continue it with `nestling train --resume")
    assert {path: path.read_bytes() for path in alone.path.rglob("*") if path.is_file()} == before


class Said(World):
    """One of two processes; what the main one broadcasts is the answer."""

    answer: Any = None

    def broadcast(self, value: Any) -> Any:
        if self.main:
            type(self).answer = value
        return self.answer


@pytest.mark.parametrize("error", [InputError("no such data"), PermissionError(13, "Permission denied", "runs")], ids=repr)
def test_the_main_process_says_why_it_cannot_begin_and_the_others_end_in_silence(tmp_path: Path, error: Exception) -> None:
    def refuse() -> starting.Start:
        raise error

    with pytest.raises(type(error), match=r"no such data|Permission denied"):
        starting.together(Said(0, 2), tmp_path, refuse)
    with pytest.raises(SystemExit) as ended:
        starting.together(Said(1, 2), tmp_path, refuse)
    assert ended.value.code == 2


DEAF = """
import ctypes, os, signal, threading
from supernet.distributed import _last_words
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
with _last_words():
    assert lock(mutex) == 0
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    lock(mutex)  # forever, and no signal interrupts it
"""


@pytest.mark.slow
def test_a_process_that_waits_in_c_still_has_its_last_words() -> None:
    found = subprocess.run(
        [sys.executable, "-c", DEAF], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (128 + signal.SIGTERM, ENDED)
