"""Faults injected into training: steps that are not finite, a loss that collapses, memory that runs out; and what else a run keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supernet import checkpoint
from supernet import train as training
from supernet.data.sources import Source, open_source
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.optimizer import make_optimizer
from supernet.recipe import GuardConfig, SamplingConfig, TrainConfig, load_recipe
from supernet.recipe import MixConfig as Mixing
from supernet.resume import change
from supernet.run import Run
from supernet.space import Space
from supernet.step import ChildResult
from supernet.train import Progress, train

STEPS = 8  # two epochs of four steps


class Stopped(Exception):
    pass


@pytest.fixture
def another(tmp_path: Path, tiny_space: Space, recipe: TrainConfig, images: Source) -> Callable[..., Run]:
    """A run with changes to the recipe."""

    def another(name: str = "run", **changes: Any) -> Run:
        return Run.create(tmp_path / name, tiny_space, recipe.model_copy(update=changes), images)

    return another


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)


@pytest.fixture
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, Any], None]], list[int]]:
    """Have a fault injected after the gradients of each call of the step (numbered from 1) are there."""

    def inject(fault: Callable[[int, Any], None]) -> list[int]:
        calls: list[int] = []
        make = training.train_step

        def faulty(supernet: Any, *arguments: Any, **options: Any) -> list[ChildResult]:
            calls.append(len(calls) + 1)
            results = make(supernet, *arguments, **options)
            fault(calls[-1], supernet)
            return results

        monkeypatch.setattr(training, "train_step", faulty)
        return calls

    return inject


def spoil(supernet: Any) -> None:
    next(p for p in supernet.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")


def events_of(run: Run) -> list[str]:
    events: list[str] = []
    train(run, progress=lambda now: events.extend(now.events))
    return events


def state_of(run: Run) -> dict[str, Any]:
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    found: dict[str, Any] = checkpoint.load(newest).state
    return found


def weights_of(run: Run, group: str = "weights") -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    return dict(checkpoint.load(newest).tensors[group])


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# --- steps that are not finite ---


def test_a_step_that_is_not_finite_is_skipped_counted_and_told(another: Callable[..., Run], step_by_step: Any) -> None:
    step_by_step(lambda call, supernet: spoil(supernet) if call in {3, 6} else None)
    run = another()
    events = events_of(run)
    assert events == [f"step {step}: the loss or the gradient is not finite; the step was skipped" for step in (3, 6)]
    assert state_of(run)["guard"]["skipped"] == 2
    assert all(value.isfinite().all() for value in weights_of(run).values())
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["gradient_norm"] is None for line in lines] == [step in {3, 6} for step in range(1, 9)]


@pytest.mark.usefixtures("saving_always")
def test_a_skipped_step_moves_nothing_not_even_momentum(another: Callable[..., Run], step_by_step: Any) -> None:
    step_by_step(lambda call, supernet: spoil(supernet) if call > 4 else None)
    run = another(guard=GuardConfig(skips=100), validate_epochs=0)
    train(run)
    before, after = (checkpoint.load(path) for path in checkpoint.all_of(run.checkpoints))
    assert (before.step, after.step) == (4, 8)
    for group in ("weights", "optimizer"):
        assert_same(dict(before.tensors[group]), dict(after.tensors[group]))


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_a_run_of_bad_steps_goes_back_lowers_the_rate_and_draws_anew(another: Callable[..., Run], step_by_step: Any) -> None:
    calls = step_by_step(lambda call, supernet: spoil(supernet) if call in {5, 6} else None)
    run = another(guard=GuardConfig(skips=2), validate_epochs=0)
    told: list[Progress] = []
    train(run, progress=told.append)
    assert [now.step for now in told] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert told[5].events[-1] == (
        "step 6: the loss or the gradient of 2 steps in a row was not finite; back to step 4, at 0.5 of the learning rate"
    )
    assert len(calls) == 10
    rollbacks = [json.loads(line) for line in (run.path / "rollbacks.jsonl").read_text().splitlines()]
    assert [(line["at"], line["to"]) for line in rollbacks] == [(6, 4)]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))  # one line a step, of the way that counted
    plain = another("plain", validate_epochs=0)
    train(plain)
    rates = [json.loads(line)["learning_rate"] for line in (plain.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == [*rates[:4], *(rate / 2 for rate in rates[4:])]
    assert run.finished


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_a_run_that_went_back_resumes_as_one_that_was_not_interrupted(another: Callable[..., Run], step_by_step: Any) -> None:
    """Killed after the rollback and before anything is saved: what is left is the old checkpoint and the record."""
    step_by_step(lambda call, supernet: spoil(supernet) if call in {5, 6} else None)
    straight = another("straight", guard=GuardConfig(skips=2), validate_epochs=0)
    train(straight)
    broken = another("broken", guard=GuardConfig(skips=2), validate_epochs=0)

    def kill(now: Progress) -> None:
        if any("back to step" in event for event in now.events):
            raise Stopped

    step_by_step(lambda call, supernet: spoil(supernet) if call in {5, 6} else None)
    with pytest.raises(Stopped):
        train(broken, progress=kill)
    train(Run.open(broken.path))
    assert_same(weights_of(broken), weights_of(straight))


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_a_checkpoint_that_leads_astray_twice_gives_way_to_an_older_one(another: Callable[..., Run], step_by_step: Any) -> None:
    step_by_step(lambda call, supernet: spoil(supernet) if 5 <= call <= 8 else None)
    run = another(guard=GuardConfig(skips=2), validate_epochs=0)
    events = [event for event in events_of(run) if "back to" in event]
    assert [event.partition("back to ")[2] for event in events] == [
        "step 4, at 0.5 of the learning rate",
        "step 3, at 0.25 of the learning rate",
    ]
    assert run.finished


def test_a_run_that_goes_wrong_before_its_first_checkpoint_begins_again(another: Callable[..., Run], step_by_step: Any) -> None:
    step_by_step(lambda call, supernet: spoil(supernet) if call <= 2 else None)
    run = another(guard=GuardConfig(skips=2))
    assert events_of(run)[-1].endswith("back to step 0, at 0.5 of the learning rate")
    assert run.finished


def test_rollbacks_are_bounded_and_the_error_says_what_to_do(another: Callable[..., Run], step_by_step: Any) -> None:
    step_by_step(lambda call, supernet: spoil(supernet))
    run = another(guard=GuardConfig(skips=1, rollbacks=2))
    with pytest.raises(InputError, match=r"step 1: the loss or the gradient of 1 steps in a row was not finite, after 2 rollbacks: "
                                         r"lower learning_rate \(now 0.1, times 0.25 for the rollbacks\)") as raised:  # fmt: skip
        train(run)
    assert "\n" not in str(raised.value)
    assert not run.finished


# --- collapse ---


@pytest.mark.slow
def test_a_supernet_that_collapses_in_mid_training_is_taken_back(
    another: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights stay 0 once it learnt. A checkpoint of the next few steps is bad and cannot be told; an older one saves the run."""
    monkeypatch.setattr(training, "SAVE_EPOCH_SECONDS", -1.0)
    run = another(epochs=20, guard=GuardConfig(rollbacks=2), validate_epochs=0)
    make, lost, losses = training.train_step, [], []

    def collapsing(supernet: Any, *arguments: Any, **options: Any) -> list[ChildResult]:
        results = make(supernet, *arguments, **options)
        losses.append(float(results[0].loss))
        if not lost and len(losses) > 20 and max(losses[-8:]) < 0.5:
            lost.append(supernet)
        if lost and supernet is lost[0]:  # until it is made anew
            with torch.no_grad():
                for parameter in supernet.parameters():
                    parameter.mul_(0)
        return results

    monkeypatch.setattr(training, "train_step", collapsing)
    events = events_of(run)
    assert len(lost) == 1
    assert 1 <= len(events) <= 2
    assert all("the loss of the largest child returned to that of guessing (1.1" in event for event in events)
    assert run.finished
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["children"]["largest"]["loss"] < 0.5
    assert all(value.isfinite().all() for value in weights_of(run).values())


# --- memory ---


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_made_in_smaller_pieces_and_is_the_same(
    another: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, images: Source
) -> None:
    plain = another("plain", batch_size=8, bn_group=2, dropout=0.0, drop_path=0.0)
    train(plain)
    make = training.train_step

    def hungry(supernet: Any, children: Any, images: Any, targets: Any, task: Any, config: Any, **options: Any) -> Any:
        results = make(supernet, children, images, targets, task, config, **options)
        if config.micro_batch is None or config.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")  # in mid-step: some gradients are there
        return results

    monkeypatch.setattr(training, "train_step", hungry)
    run = another("hungry", batch_size=8, bn_group=2, dropout=0.0, drop_path=0.0)
    assert events_of(run) == [f"step 1: out of memory; from here {size} images go through at once" for size in (4, 2)]
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights_of(run)[name], value, rtol=1e-4, atol=1e-6)
    assert state_of(run)["micro_batch"] == 2


def test_a_step_that_never_fits_says_so(another: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "train_step", hungry)
    with pytest.raises(InputError, match="9 images at once need more memory than the device has, and cannot be halved"):
        train(another())


# --- average, best, mixing, candidates ---


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_children_are_taken_from_the_moving_average_and_it_survives_a_resume(another: Callable[..., Run]) -> None:
    straight, broken = another("straight", ema=0.9), another("broken", ema=0.9)
    train(straight)

    def stop(now: Progress) -> None:
        if now.step == 6:
            raise Stopped

    with pytest.raises(Stopped):
        train(broken, progress=stop)
    train(Run.open(broken.path))
    for group in ("weights", "ema"):
        assert_same(weights_of(broken, group), weights_of(straight, group))
    assert_same(dict(Run.open(straight.path).supernet().state_dict()), weights_of(straight, "ema"))
    assert any(not torch.equal(value, weights_of(straight)[name]) for name, value in weights_of(straight, "ema").items())
    plain = another("plain")
    train(plain)
    assert_same(weights_of(plain), weights_of(straight))  # it does not touch what is trained
    assert Run.open(straight.path).weights_hash != Run.open(plain.path).weights_hash


@pytest.mark.slow
@pytest.mark.usefixtures("saving_always")
def test_the_best_checkpoint_is_kept_and_can_be_used(another: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.9, 0.4, 0.5, 0.3])
    monkeypatch.setattr(
        "supernet.validate.Looks.look", lambda self, supernet: dict.fromkeys(("largest", "smallest"), next(scores))
    )
    run = another(epochs=4, validate_epochs=1, keep=2)
    train(run)
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(run.checkpoints)] == [4, 15, 16]
    best = checkpoint.best(run.checkpoints)
    assert best is not None
    assert checkpoint.step_of(best) == 4
    last = run.supernet().state_dict()
    changed, _ = change(run, {"use": "best"})
    assert_same(dict(changed.supernet().state_dict()), dict(checkpoint.load(best).tensors["weights"]))
    assert any(not torch.equal(value, last[name]) for name, value in changed.supernet().state_dict().items())
    assert changed.weights_hash != run.weights_hash
    assert changed.finished


@pytest.mark.slow
def test_looks_are_in_the_log_and_change_nothing(another: Callable[..., Run]) -> None:
    looking, blind = another("looking", validate_epochs=1), another("blind", validate_epochs=0)
    train(looking)
    train(blind)
    assert_same(weights_of(looking), weights_of(blind))
    lines = [json.loads(line) for line in (looking.path / "metrics.jsonl").read_text().splitlines()]
    looks = {line["step"]: line["validation"] for line in lines if "validation" in line}
    assert looks.keys() == {4, 8}
    split, evaluator = looking.dataset.split("search_val"), looking.evaluator()
    for role, arch in (("largest", looking.space.largest), ("smallest", looking.space.smallest)):
        assert looks[8][role] == pytest.approx(float(evaluator.evaluate(arch, split).mean()), abs=1e-6)
    assert "validation" not in (blind.path / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change_",
    [
        {"mix": Mixing(mixup=0.8, cutmix=1.0)},
        {"sampling": SamplingConfig(rule="best_up", bins=4)},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                {"reduction": "mean"}, {"clip_value": 1e-3}, {"repeats": 3}, {"balance": "class"}, {"bn_group": 3},
                {"regularise": "all"}, {"decay_all": True}, {"sampling": SamplingConfig(rule="worst_up", bins=4)},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("saving_always")
def test_each_knob_changes_what_is_learnt_and_resumes_bit_equal(
    another: Callable[..., Run], plain: dict[str, torch.Tensor], change_: dict[str, Any]
) -> None:
    straight, broken = another("straight", **change_), another("broken", **change_)
    train(straight)

    def stop(now: Progress) -> None:
        if now.step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(broken, progress=stop)
    train(Run.open(broken.path))
    assert_same(weights_of(broken), weights_of(straight))
    assert any(not torch.equal(value, plain[name]) for name, value in weights_of(straight).items())


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, tiny_space: Space, recipe: TrainConfig, save_images: Callable[..., Path]
) -> dict[str, torch.Tensor]:
    """What the recipe itself learns."""
    folder = tmp_path_factory.mktemp("plain")
    run = Run.create(folder / "run", tiny_space, recipe, open_source(str(save_images(folder / "images.npz"))))
    train(run)
    return weights_of(run)


def test_pieces_that_do_not_divide_a_small_set_are_an_error(another: Callable[..., Run]) -> None:
    run = another(batch_size=64, bn_group=16)
    with pytest.raises(
        InputError, match=r"the \d+ images of a step in each of 1 processes must be a multiple of bn_group \(16\)"
    ):
        train(run)


def test_the_best_is_kept_whatever_the_clock_says(another: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is due for its time; the best look makes one."""
    scores = iter([0.9, 0.4, 0.95, 0.3])
    monkeypatch.setattr(
        "supernet.validate.Looks.look", lambda self, supernet: dict.fromkeys(("largest", "smallest"), next(scores))
    )
    run = another(epochs=4, validate_epochs=1)
    train(run)
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(run.checkpoints)] == [12, 16]
    best = checkpoint.best(run.checkpoints)
    assert best is not None
    assert checkpoint.step_of(best) == 12


def test_the_best_of_a_run_without_looks_is_an_error(another: Callable[..., Run]) -> None:
    run = another(validate_epochs=0, use="best")
    train(run)
    with pytest.raises(
        InputError, match="use is best, but no checkpoint was looked at: set validate_epochs above 0, or use=last"
    ):
        run.supernet()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_restored_optimizers_have_the_layout_of_their_parameters(tiny: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    """Files know no memory format; kernels that take one for all would read it wrongly in silence."""
    space = Space.from_definition({**tiny, "in_channels": 3})
    recipe = load_recipe("digits", {"optimizer": optimizer, "learning_rate": 0.01})

    def made() -> tuple[Supernet, torch.optim.Optimizer]:
        supernet = Supernet(space).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return supernet, make_optimizer(supernet, recipe)

    def step(supernet: Supernet, optimizer: torch.optim.Optimizer) -> None:
        for number, parameter in enumerate(supernet.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.grad = noise.contiguous(memory_format=torch.channels_last) if noise.ndim == 4 else noise
        optimizer.step()

    supernet, straight = made()
    step(supernet, straight)
    tensors, rest = checkpoint.optimizer_groups(straight)
    saved = checkpoint.Checkpoint(1, {"weights": supernet.state_dict(), "optimizer": tensors}, {"optimizer": rest})
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved))
    again, resumed = made()
    again.load_state_dict(loaded.tensors["weights"])
    checkpoint.restore_optimizer(resumed, loaded.tensors["optimizer"], loaded.state["optimizer"])
    step(supernet, straight)
    step(again, resumed)
    assert_same(dict(again.state_dict()), dict(supernet.state_dict()))
    for parameter, state in resumed.state.items():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride()


@pytest.mark.slow
def test_what_memory_taught_survives_a_resume_until_somebody_asks_for_something_else(
    another: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = another(batch_size=8, bn_group=2)
    make, sizes, most = training.train_step, [], [4]

    def hungry(supernet: Any, children: Any, images: Any, targets: Any, task: Any, config: Any, **options: Any) -> Any:
        if (config.micro_batch or len(images)) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(config.micro_batch)
        return make(supernet, children, images, targets, task, config, **options)

    monkeypatch.setattr(training, "train_step", hungry)
    train(run)
    assert set(sizes) == {4}
    most[0], sizes[:] = 8, []
    longer, _ = change(run, {"epochs": 3})
    train(longer)
    assert set(sizes) == {4}
    sizes.clear()
    whole, told = change(longer, {"epochs": 4, "micro_batch": 8})
    assert told[1] == "micro_batch: None until now, 8 from step 12"
    train(whole)
    assert set(sizes) == {8}


@pytest.mark.slow
def test_candidates_that_do_not_fit_make_the_pieces_smaller_too(
    another: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = another(batch_size=8, bn_group=2, sampling=SamplingConfig(rule="best_up", bins=4))
    make, sizes = training.losses_without_gradients, []

    def hungry(supernet: Any, archs: Any, images: Any, targets: Any, task: Any, config: Any, crops: Any) -> Any:
        if (config.micro_batch or len(images)) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(config.micro_batch)
        return make(supernet, archs, images, targets, task, config, crops)

    monkeypatch.setattr(training, "losses_without_gradients", hungry)
    assert events_of(run) == ["step 1: out of memory; from here 4 images go through at once"]
    assert set(sizes) == {4}


def test_a_run_that_ends_on_skipped_steps_says_so(another: Callable[..., Run], step_by_step: Any) -> None:
    step_by_step(lambda call, supernet: spoil(supernet) if call > 4 else None)
    run = another(guard=GuardConfig(skips=100), validate_epochs=0)
    assert events_of(run)[-1] == "step 8: the run ends on steps that were skipped, or on the loss of guessing"


@pytest.mark.slow
def test_weight_decay_may_be_switched_off_and_on(another: Callable[..., Run]) -> None:
    run = another()
    train(run)
    for epochs, decay in ((3, 0.0), (4, 0.1)):
        run, _ = change(run, {"epochs": epochs, "weight_decay": decay})
        train(run)
        assert {group["weight_decay"] for group in state_of(run)["optimizer"]["groups"]} == {0.0, decay}


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "momentum"])
def test_a_parameter_that_is_touched_later_than_others_is_stepped_as_if_alone(tiny_space: Space, name: str) -> None:
    """Children touch different weights; torch's one-kernel SGD fails on such a mixture by itself."""
    recipe = load_recipe("digits", {"optimizer": name, "learning_rate": 0.01})
    supernet = Supernet(tiny_space)
    optimizer = make_optimizer(supernet, recipe)
    first, second = [p for p in supernet.parameters() if p.ndim == 4][:2]
    alone = second.detach().clone().requires_grad_()
    group = next(group for group in optimizer.param_groups if any(p is second for p in group["params"]))
    kept = {"lr", "momentum", "weight_decay", "nesterov", "betas", "eps"}
    single = type(optimizer)([alone], **{key: value for key, value in group.items() if key in kept})
    first.grad = torch.ones_like(first)
    optimizer.step()
    for _ in range(2):
        second.grad, alone.grad = torch.ones_like(second), torch.ones_like(alone)
        optimizer.step()
        single.step()
    torch.testing.assert_close(second.detach(), alone.detach())
