"""The training loop: interrupted anywhere it goes on bit-equal, and nothing it does gets lost or in the way."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from supernet import checkpoint, state
from supernet import train as training
from supernet.data.batches import Augment, TrainingBatches
from supernet.data.sources import Source, open_source
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.optimizer import make_optimizer
from supernet.recipe import GuardConfig, TrainConfig, load_recipe
from supernet.run import Run
from supernet.space import Space
from supernet.step import StepConfig, train_step
from supernet.train import Progress, train

ROOT = Path(__file__).parents[2]
STEPS = 8  # two epochs of four steps


class Stopped(Exception):
    """Stands for whatever may end a run."""


def stop_after(step: int) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.step == step:
            raise Stopped

    return progress


def learnt(run: Run) -> dict[str, bytes]:
    """Weights, optimizer state and log of a run, byte for byte, save how fast it was."""
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    files = [*newest.glob("*.safetensors"), newest / "state.json"]
    log = [{name: value for name, value in line.items() if name != "images_per_s"} for line in metrics(run)]
    return {newest.name: b"", "log": json.dumps(log).encode(), **{file.name: file.read_bytes() for file in files}}


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def assert_whole_and_finite(run: Run) -> None:
    for path in checkpoint.all_of(run.checkpoints):
        assert checkpoint.verify(path) is None
        for group in checkpoint.load(path).tensors.values():
            assert all(value.isfinite().all() for value in group.values() if value.is_floating_point())


@pytest.fixture
def another(tmp_path: Path, tiny_space: Space, recipe: TrainConfig, images: Source) -> Callable[..., Run]:
    """Another run of the same data, with changes to the recipe."""

    def another(name: str, **changes: Any) -> Run:
        return Run.create(tmp_path / name, tiny_space, recipe.model_copy(update=changes), images)

    return another


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_space: Space, recipe: TrainConfig, save_images: Callable[..., Path]
) -> dict[str, bytes]:
    """What an uninterrupted run learns."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run.create(folder / "run", tiny_space, recipe, open_source(str(save_images(folder / "images.npz"))))
    train(run)
    return learnt(run)


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)


@pytest.fixture
def saving_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EPOCH_SECONDS", -1.0)


# --- the rule ---


def written_out(run: Run) -> dict[str, torch.Tensor]:
    """The weights after the recipe of the digits, step by step, with nothing of the loop but its parts."""
    recipe, space = run.recipe, run.space
    batches = TrainingBatches(
        run.source, run.dataset.splits.train, batch_size=9, resolution=8, augment=Augment(min_area=0.7, rotate_degrees=8), seed=0
    )  # fmt: skip
    supernet = Supernet(space, seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    small = [p for name, p in supernet.named_parameters() if name.endswith("bias") or ".norm." in name]
    large = [p for name, p in supernet.named_parameters() if not (name.endswith("bias") or ".norm." in name)]
    groups = [{"params": small, "weight_decay": 0.0}, {"params": large, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for step, (pixels, labels, _) in enumerate(batches.batches(0, STEPS)):
        rate = 0.1 * (step + 1) / 4 if step < 4 else 0.1 * (1 + math.cos(math.pi * (step - 4) / 3)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng([0, step])
        random_ones = [("random", arch) for arch in space.sample_apart(recipe.children - 2, rng)]
        images = ((pixels / 255 - run.dataset.mean[0]) / run.dataset.std[0]).contiguous(memory_format=torch.channels_last)
        weight = min(1.0, max(0.0, (step / STEPS - 0.2) / 0.4))
        config = StepConfig(soft_weight=weight, label_smoothing=0.1)
        optimizer.zero_grad()
        train_step(
            supernet, [("largest", space.largest), ("smallest", space.smallest), *random_ones], images, labels, run.task, config
        )  # fmt: skip
        torch.nn.utils.clip_grad_norm_(supernet.parameters(), 0.5)
        optimizer.step()
    return supernet.state_dict()


def test_training_is_the_recipe_step_by_step(another: Callable[..., Run]) -> None:
    run = another("plain", dropout=0.0, drop_path=0.0, clip_norm=0.5)
    train(run)
    trained = run.supernet().state_dict()
    for name, value in written_out(run).items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("change", [{"dropout": 0.0}, {"drop_path": 0.0}, {"seed": 1}, {"precision": "bf16"}], ids=str)
def test_a_change_of_the_recipe_changes_what_is_learnt(
    another: Callable[..., Run], whole: dict[str, bytes], change: dict[str, Any]
) -> None:
    run = another("changed", **change)
    train(run)
    assert learnt(run)["weights.safetensors"] != whole["weights.safetensors"]


# --- interrupted and resumed ---


def test_the_same_run_twice_learns_the_same(run: Run, whole: dict[str, bytes]) -> None:
    train(run)
    assert learnt(run) == whole


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
@pytest.mark.parametrize("steps", [[1], [STEPS - 1], [STEPS], [2, 3, 5]])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(run: Run, whole: dict[str, bytes], steps: list[int]) -> None:
    for step in steps:
        with pytest.raises(Stopped):
            train(Run.open(run.path), progress=stop_after(step))
        assert Run.open(run.path).finished == (step == STEPS)
    train(Run.open(run.path))
    assert learnt(run) == whole
    assert Run.open(run.path).finished


@pytest.mark.usefixtures("saving_every_epoch")
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_stopped_in_mid_epoch_goes_back_to_its_last_checkpoint_and_the_log_with_it(
    run: Run, whole: dict[str, bytes], step: int
) -> None:
    with pytest.raises(Stopped):
        train(run, progress=stop_after(step))
    assert [line["step"] for line in metrics(run)] == list(range(1, step + 1))
    steps = []
    train(Run.open(run.path), progress=lambda now: steps.append(now.step))
    assert steps[0] == (1 if step < 4 else 5)
    assert learnt(run) == whole


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(run: Run, whole: dict[str, bytes], name: str) -> None:
    with pytest.raises(Stopped):
        train(run, progress=stop_after(5))
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    (newest / name).write_bytes((newest / name).read_bytes()[:-9])
    steps = []
    train(Run.open(run.path), progress=lambda now: steps.append(now.step))
    assert steps == [5, 6, 7, 8]
    assert learnt(run) == whole


@pytest.mark.usefixtures("saving_always")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_in_silence(run: Run) -> None:
    with pytest.raises(Stopped):
        train(run, progress=stop_after(5))
    kept = checkpoint.all_of(run.checkpoints)
    for path in kept:
        (path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"no checkpoint of .* is whole \(weights.safetensors was changed since it was written\): start"
    ):
        train(Run.open(run.path))
    assert checkpoint.all_of(run.checkpoints) == kept


def test_a_first_checkpoint_that_was_never_finished_is_begun_anew(run: Run, whole: dict[str, bytes]) -> None:
    torn = run.checkpoints / "step-000000008"
    torn.mkdir(parents=True)
    (torn / ".weights.safetensors.abc").write_bytes(b"half")
    (run.path / "metrics.jsonl").write_text('{"step": 1, "left": "over"}\n{"st')
    train(run)
    assert learnt(run) == whole


def test_a_finished_run_is_left_as_it_is(run: Run, whole: dict[str, bytes]) -> None:
    train(run)
    steps: list[int] = []
    train(Run.open(run.path), progress=lambda now: steps.append(now.step))
    assert steps == []
    assert learnt(run) == whole


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_another_optimizer_resumes_bit_equal_too(another: Callable[..., Run]) -> None:
    changes = {"optimizer": "adamw", "learning_rate": 0.01, "channels_last": False, "schedule": "exponential"}
    straight, broken = another("straight", **changes), another("broken", **changes)
    train(straight)
    with pytest.raises(Stopped):
        train(broken, progress=stop_after(4))
    train(Run.open(broken.path))
    assert learnt(broken) == learnt(straight)


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_a_bf16_run_resumes_bit_equal(another: Callable[..., Run]) -> None:
    straight, broken = another("straight", precision="bf16"), another("broken", precision="bf16")
    train(straight)
    with pytest.raises(Stopped):
        train(broken, progress=stop_after(3))
    train(Run.open(broken.path))
    assert learnt(broken) == learnt(straight)


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_the_number_of_workers_changes_nothing(run: Run, whole: dict[str, bytes]) -> None:
    with pytest.raises(Stopped):
        train(run, workers=2, progress=stop_after(3))
    train(Run.open(run.path), workers=1)
    assert learnt(run) == whole


# --- killed ---

DRIVER = """
import sys
from supernet import train
train.SAVE_SECONDS = 0.05
import nestling
nestling.main()
"""


def nestling(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def wait_for_line(log: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not (log.exists() and log.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def assert_refused_meanwhile(process: subprocess.Popen[str], out: Path) -> None:
    process.send_signal(signal.SIGSTOP)
    refused = nestling("--out", str(out), "--resume")
    message = refused.communicate()[1]
    process.send_signal(signal.SIGCONT)
    assert refused.returncode == 2
    assert f"is in use by another process (pid {process.pid}): wait for it or stop it" in message


@pytest.mark.nightly
def test_a_run_killed_in_mid_epoch_again_and_again_ends_like_one_that_was_not(
    tmp_path: Path, tiny: dict[str, Any], save_images: Callable[..., Path]
) -> None:
    """Real processes, ended by SIGKILL at random moments; meanwhile a second trainer of the same run is refused."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    options = ["--space", str(tmp_path / "tiny.yaml"), "--recipe", "digits", "--epochs", "60", "--device", "cpu",
               "--set", "batch_size=9", "--set", "dropout=0.2", "--set", "calibration_images=36"]  # fmt: skip
    data, out = save_images(tmp_path / "images.npz"), tmp_path / "killed"
    finished(nestling("--data", str(data), "--out", str(tmp_path / "straight"), *options))

    moments, resumed_at = random.Random(4), []
    process = nestling("--data", str(data), "--out", str(out), *options)
    for step in sorted(moments.sample(range(20, 220), 3)):
        wait_for_line(out / "metrics.jsonl", step, process)
        time.sleep(moments.uniform(0, 0.02))
        if not resumed_at:
            assert_refused_meanwhile(process, out)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        newest = checkpoint.latest(out / "checkpoints")
        resumed_at.append(int(newest.name.removeprefix("step-")) if newest else 0)
        process = nestling("--out", str(out), "--resume")
    finished(process)

    assert 0 < resumed_at[0] < resumed_at[-1] < 240
    assert any(step % 4 for step in resumed_at)  # in the middle of an epoch
    assert learnt(Run.open(out)) == learnt(Run.open(tmp_path / "straight"))


def test_a_second_trainer_of_the_same_run_is_refused_and_the_first_goes_on(run: Run, whole: dict[str, bytes]) -> None:
    refused = []

    def progress(now: Progress) -> None:
        if now.step == 3:
            with pytest.raises(InputError, match=f"is in use by another process \\(pid {os.getpid()}\\)") as caught:
                train(Run.open(run.path))
            refused.append(caught)

    train(run, progress=progress)
    assert len(refused) == 1
    assert learnt(run) == whole


# --- what goes wrong ---


@pytest.mark.usefixtures("saving_always")
def test_a_rate_that_no_rollback_can_save_ends_the_run_and_the_checkpoints_stay_good(another: Callable[..., Run]) -> None:
    run = another("diverging", learning_rate=1e25, clip_norm=None, guard=GuardConfig(skips=2, rollbacks=2), validate_epochs=0)
    said = r"after 2 rollbacks: lower learning_rate \(now 1e\+25, times 0.25 for the rollbacks\) or set clip_norm, raise guard"
    with pytest.raises(InputError, match=said):
        train(run)
    assert len((run.path / "rollbacks.jsonl").read_text().splitlines()) == 2
    assert_whole_and_finite(run)
    assert not run.finished


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
@pytest.mark.parametrize("step", [2, STEPS])
def test_weights_that_are_not_finite_are_never_saved(run: Run, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the last step, after which no loss is computed any more; the run goes back, and makes it the second time."""
    make, spoilt = state.make_optimizer, []

    def spoiling(*arguments: Any) -> torch.optim.Optimizer:
        optimizer, done = make(*arguments), 0
        update = optimizer.step

        def spoil(*given: Any) -> None:
            nonlocal done
            done += 1
            update(*given)
            if done == step and not spoilt:
                spoilt.append(step)
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].view(-1)[0] = float("inf")

        monkeypatch.setattr(optimizer, "step", spoil)
        return optimizer

    monkeypatch.setattr(state, "make_optimizer", spoiling)
    events: list[str] = []
    train(run, progress=lambda now: events.extend(now.events))
    assert spoilt == [step]
    assert len(events) == 1
    assert re.fullmatch(rf"step {step}: the weights are not finite; back to step [1-7], at 0.5 of the learning rate", events[0])
    assert_whole_and_finite(run)
    assert run.finished


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(
    run: Run, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, left = checkpoint.save, 4

    def failing(*arguments: Any, **options: Any) -> Path:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", failing)
        with pytest.raises(OSError, match="No space left"):
            train(run)
    train(Run.open(run.path))
    assert learnt(run) == whole


def test_checkpoints_of_another_space_are_refused(
    run: Run, another: Callable[..., Run], tiny: dict[str, Any], images: Source
) -> None:
    train(run)
    other = Run.create(run.path.parent / "other", Space.from_definition({**tiny, "resolution": [6, 7]}), run.recipe, images)
    shutil.copytree(run.checkpoints, other.checkpoints)
    with pytest.raises(InputError, match="the checkpoint was written for the space"):
        train(other)


# --- what it leaves alone, and what it writes ---


def test_no_shared_generator_and_no_number_of_threads_is_moved(run: Run, another: Callable[..., Run]) -> None:
    def states() -> list[object]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        assert isinstance(numpy, dict)
        return [torch.get_rng_state().tolist(), numpy["state"]["key"].tolist(), random.getstate(), torch.get_num_threads()]

    before = states()
    train(run)
    assert states() == before
    with pytest.raises(Stopped):
        train(another("stopped"), progress=stop_after(2))
    assert states() == before


def test_shared_generators_do_not_move_the_run(run: Run, whole: dict[str, bytes]) -> None:
    def progress(_: Progress) -> None:
        torch.manual_seed(random.randrange(2**32))
        np.random.seed(random.randrange(2**32))  # noqa: NPY002

    with torch.random.fork_rng():
        train(run, progress=progress)
    assert learnt(run) == whole


def test_every_line_of_the_log_tells_step_epoch_rate_and_children(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    train(run, progress=lambda now: told.append((now.step, now.steps, now.line)))
    lines = metrics(run)
    assert [step for step, _, _ in told] == [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line for _, _, line in told] == lines
    assert {steps for _, steps, _ in told} == {STEPS}
    assert [line["epoch"] for line in lines] == [step / 4 for step in range(1, STEPS + 1)]
    for line in lines:
        assert line["children"].keys() == {"largest", "smallest", "random"}
        assert all(child["loss"] > 0 and 0 <= child["top1"] <= 1 for child in line["children"].values())
    assert lines[3]["learning_rate"] == run.recipe.learning_rate


def test_a_long_run_writes_a_bounded_log_and_always_its_last_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_LINES", 3)
    train(run)
    assert [line["step"] for line in metrics(run)] == [2, 4, 6, 8]


@pytest.mark.usefixtures("saving_always")
def test_two_checkpoints_are_kept(another: Callable[..., Run]) -> None:
    run = another("unlooked", validate_epochs=0)
    train(run)
    kept = [checkpoint.step_of(path) for path in checkpoint.all_of(run.checkpoints)]
    assert len(kept) == 2
    assert kept[-1] == 8
    assert all(checkpoint.verify(path) is None for path in checkpoint.all_of(run.checkpoints))


@pytest.mark.slow
def test_training_learns_to_tell_bright_images_from_dark_ones(another: Callable[..., Run]) -> None:
    run = another("long", epochs=12)
    train(run)
    lines = metrics(run)
    for role in ("largest", "smallest"):
        assert lines[-1]["children"][role]["loss"] < 0.7 * lines[0]["children"][role]["loss"]
    for arch in (run.space.smallest, run.space.largest):
        assert run.evaluator().evaluate(arch, run.dataset.split("train")).mean() > 0.8


def test_training_never_reads_the_test_split(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = {int(i) for name in ("confirm", "test") for i in getattr(run.dataset.splits, name)}
    seen: set[int] = set()
    image = type(run.source).image

    def spy(self: Source, i: int) -> object:
        seen.add(i)
        return image(self, i)

    monkeypatch.setattr(type(run.source), "image", spy)
    train(run)
    assert seen
    assert not seen & held_out
    assert run.test_reads == 0


def test_weight_decay_is_for_weights_and_not_for_biases_and_norms(tiny_space: Space) -> None:
    supernet = Supernet(tiny_space)
    optimizer = make_optimizer(supernet, load_recipe("digits"))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in supernet.parameters()}
    for name, parameter in supernet.named_parameters():
        assert (id(parameter) in decayed) == (name.endswith("weight") and ".norm." not in name), name


def test_weights_that_no_child_used_are_not_moved(another: Callable[..., Run]) -> None:
    """Momentum and decay must not touch what had no gradient; here only the largest child ever learns."""
    run = another("alone", children=1)
    fresh = dict(Supernet(run.space, seed=run.recipe.seed).named_parameters())
    train(run)
    trained = dict(run.supernet().named_parameters())
    used = {name for name, _ in Supernet(run.space).extract(run.space.largest).named_parameters()}
    unused = fresh.keys() - used
    assert unused  # the shortcut of a change of width that the largest child does not make
    assert all(torch.equal(fresh[name], trained[name]) for name in unused)
    assert not any(torch.equal(fresh[name], trained[name]) for name in used if name.endswith("conv.weight"))
