"""Several processes against one: the file is the tests, and (run as a program) one of the processes.

Networks compute in fp64 and losses in fp32, so gradients agree to about 1e-7 where they are the same.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist

from supernet.data.dataset import SplitImages
from supernet.data.sources import open_source
from supernet.distributed import ProcessLost, World, reduce_gradients, world
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.model import Supernet
from supernet.norms import BatchNorm, Statistics
from supernet.sandwich import sandwich, step_rng
from supernet.space import Space, load_space
from supernet.step import StepConfig, train_step
from supernet.task import TASKS, Regression

ROOT = Path(__file__).parents[2]
BATCH, GROUP = 24, 4
Tensors = dict[str, Tensor]

MBCONV: dict[str, Any] = {
    "format": 1, "name": "small-mbconv", "family": "mbconv", "in_channels": 1, "classes": 10, "resolution": [12, 16],
    "stem": {"width": [8, 16], "stride": 1},
    "stages": [
        {"width": [8, 16], "depth": [1, 2], "kernel_size": [3], "expand_ratio": [1], "stride": 1},
        {"width": [16, 24], "depth": [1, 3], "kernel_size": [3, 5], "expand_ratio": [3, 4], "stride": 2, "squeeze_excite": True},
    ],
    "head": {"expand_ratio": 2, "width": [24, 32]},
}  # fmt: skip
MLP: dict[str, Any] = {
    "format": 1, "name": "tiny-mlp", "family": "mlp", "in_channels": 2, "classes": 3, "resolution": 5, "depth": [1, 3],
    "width": [6, 9, 11], "activation": ["relu", "swish"],
}  # fmt: skip
VIT: dict[str, Any] = {
    "format": 1, "name": "tiny-vit", "family": "vit", "classes": 3, "in_channels": 2, "resolution": [4, 6], "patch_size": 2,
    "embed_dim": [7, 10], "depth": [1, 2], "heads": [1, 3], "mlp_ratio": [0.5, 1.3], "head_dim": 5,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "format": 1, "name": "tiny-autoencoder", "family": "autoencoder", "in_channels": 1, "resolution": [8, 12],
    "stem": {"width": [3, 6]}, "bottleneck": {"width": [4, 7]},
    "stages": [{"width": [5, 8], "depth": [1, 2], "decoder_depth": [1, 3], "kernel_size": [1, 3]}],
}  # fmt: skip
SPACES: dict[str, Callable[[], Space]] = {
    "digits": lambda: load_space("digits"),
    "mbconv": lambda: Space.from_definition(MBCONV),
    "mlp": lambda: Space.from_definition(MLP),
    "vit": lambda: Space.from_definition(VIT),
    "autoencoder": lambda: Space.from_definition(AUTOENCODER),
}
KINDS = {"grouped": Statistics(group=GROUP), "synchronised": Statistics(synchronised=True), "plain": Statistics()}


def spaces_of(processes: int) -> list[str]:
    """All in two processes; a few in more."""
    return list(SPACES) if processes == 2 else ["digits", "vit"]


# --- what one process and several do alike; `job_*` are what a process of several does ---


def store(name: str) -> Supernet:
    """In fp64, every weight away from its initial 0."""
    supernet, generator = Supernet(SPACES[name](), seed=1).double(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return supernet


def batch_of(space: Space) -> tuple[Tensor, Tensor]:
    generator, size = torch.Generator().manual_seed(3), space.largest_resolution
    images = torch.randn(BATCH, space.family.in_channels, size, size, generator=generator, dtype=torch.float64)
    images *= torch.linspace(0.3, 3, BATCH, dtype=torch.float64).view(
        -1, 1, 1, 1
    )  # halves of the batch have statistics of their own
    return images, torch.arange(BATCH) % (space.family.classes or 1)


def add_step(
    supernet: Supernet, statistics: Statistics, world: World, *, micro_batch: int | None = None, step: int = 0
) -> None:
    """The gradients of a step with distillation, of this process's share of the batch."""
    images, labels = batch_of(supernet.space)
    own = slice(len(images) * world.rank // world.size, len(images) * (world.rank + 1) // world.size)
    config = StepConfig(
        soft_weight=0.5, label_smoothing=0.1, statistics=statistics, micro_batch=micro_batch, share=1 / world.size
    )
    task = TASKS[supernet.space.family.task]()
    train_step(supernet, sandwich(supernet.space, 4, step_rng(5, step)), images[own], labels[own], task, config)


def gradients(supernet: Supernet) -> Tensors:
    return {name: parameter.grad.clone() for name, parameter in supernet.named_parameters() if parameter.grad is not None}


def normalised_by(statistics: Statistics, x: Tensor, towards: Tensor) -> Tensors:
    """Output of a batch norm and its gradients."""
    norm = nn.BatchNorm2d(x.shape[1]).to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, x.shape[1]))
        norm.bias.copy_(torch.linspace(3, -1, x.shape[1]))
    if statistics != Statistics():
        norm = BatchNorm(norm, statistics)  # type: ignore[assignment]
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * towards).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    return {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}


def maps(dtype: torch.dtype, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """7 images, which divide into no equal parts, far apart in mean and scale."""
    x, towards = torch.randn(2, 7, 5, 3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = x * torch.linspace(1, 4, 7, dtype=x.dtype).view(-1, 1, 1, 1) + torch.linspace(0, 9, 7, dtype=x.dtype).view(-1, 1, 1, 1)
    return (x + shift).to(dtype).contiguous(memory_format=torch.channels_last), towards.to(dtype)


MAPS = {"fp64": (torch.float64, 0.0), "fp32": (torch.float32, 0.0), "far": (torch.float32, 1e4), "bf16": (torch.bfloat16, 0.0)}


def evaluator(path: Path, name: str, world: World, images: int) -> tuple[Evaluator, SplitImages]:
    """Of `images` images to score, and 60 to calibrate on in batches of 8."""
    source, space = open_source(str(path / "images.npz")), SPACES[name]()
    splits = [
        SplitImages(each, source, np.random.default_rng(7).permutation(60), 1.0, (0.5,), (0.3,))
        for each in ("train", "confirm")
    ]
    splits[1].indices = splits[1].indices[:images]
    task = Regression((0.3,)) if space.family.task == "regression" else TASKS[space.family.task]()
    return Evaluator(store(name).float(), task, splits[0], calibration_images=59, batch_size=7, world=world), splits[1]


EVALUATED = [("mbconv", 60), ("mbconv", 1), ("autoencoder", 7)]


def evaluations(path: Path, world: World) -> Tensors:
    import supernet.evaluate

    supernet.evaluate.CALIBRATION_BATCH = 8  # 7 batches of 8
    found = {}
    for name, images in EVALUATED:
        made, split = evaluator(path, name, world, images)
        for arch in (made.supernet.space.smallest, made.supernet.space.largest):
            scores = made.evaluate(arch, split)
            found[f"{name}.{images}.{arch.key}"] = torch.from_numpy(scores.copy())
        for key, value in made.calibrated(made.supernet.space.largest).state_dict().items():
            found[f"{name}.{images}.state.{key}"] = value.contiguous()
    return found


def job_together(path: Path, world: World) -> Tensors:
    """Everything that takes no harm from happening in one process after another."""
    found: Tensors = {"size": torch.tensor([world.size, world.rank])}
    found |= _talk(world)
    for name in spaces_of(world.size):
        for kind, statistics in KINDS.items():
            if kind == "plain" and name != "digits":
                continue
            supernet = store(name)
            add_step(supernet, statistics, world)
            with counted() as calls:
                reduce_gradients(supernet, world)
            found[f"calls.{name}.{kind}"] = torch.tensor(calls)
            found |= {f"gradients.{name}.{kind}.{key}": value for key, value in gradients(supernet).items()}
    for name, (dtype, shift) in MAPS.items():
        x, towards = (part[world.rank * 7 // world.size : (world.rank + 1) * 7 // world.size] for part in maps(dtype, shift))
        for key, value in normalised_by(Statistics(synchronised=True), x, towards).items():
            found[f"norm.{name}.{key}"] = value.contiguous()
    found |= {f"trained.{key}": value for key, value in _trained(world).items()}
    found |= {f"uneven.{key}": value for key, value in _touched_unevenly(world).items()}
    return found | {f"scores.{key}": value for key, value in evaluations(path, world).items()}


def _talk(world: World) -> Tensors:
    gathered = world.gather(b"ab" * world.rank)
    nothing = world.gather(b"")
    said = world.broadcast({"from": world.rank, "third": 1 / 3, "words": ["ä", None]})
    tensor = world.broadcast(torch.tensor([1.5 + world.rank, 2.5]))
    summed = world.sum_(torch.tensor([world.rank, 10]))
    world.barrier()
    assert gathered == [b"ab" * rank for rank in range(world.size)] and nothing == [b""] * world.size
    assert said == {"from": 0, "third": 1 / 3, "words": ["ä", None]}
    assert world.main == (world.rank == 0)
    return {"broadcast": tensor, "summed": summed, "share": torch.tensor(list(world.share(7)))}


class counted:
    """The sizes of what is reduced meanwhile."""

    def __enter__(self) -> list[int]:
        self.real, self.calls = dist.all_reduce, list[int]()

        def spy(tensor: Tensor, *args: Any, **more: Any) -> Any:
            self.calls.append(tensor.numel())
            return self.real(tensor, *args, **more)

        dist.all_reduce = spy
        return self.calls

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.real


def _trained(world: World) -> Tensors:
    """Weights after some steps, in which each step leaves something of the one before in the buffer."""
    supernet = store("digits")
    optimizer = torch.optim.SGD(supernet.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        add_step(supernet, KINDS["grouped"], world, step=step, micro_batch=GROUP if world.rank else None)
        reduce_gradients(supernet, world)
        optimizer.step()
    return {key: value.clone() for key, value in supernet.state_dict().items()}


def _touched_unevenly(world: World) -> Tensors:
    """After a step of the largest child, the main process trains the smallest, others a larger one without the last block."""
    supernet, images = store("digits"), batch_of(SPACES["digits"]())[0]
    supernet.child(supernet.space.largest)(images).square().sum().backward()
    reduce_gradients(supernet, world)
    supernet.zero_grad()
    supernet.child(uneven(supernet.space)[0 if world.main else 1])(images[:4]).square().sum().backward()
    reduce_gradients(supernet, world)
    first = gradients(supernet)
    supernet.child(supernet.space.largest)(images).square().sum().backward()  # what was reduced is added to
    return {f"first.{key}": value for key, value in first.items()} | {
        f"then.{key}": value for key, value in gradients(supernet).items()
    }


def uneven(space: Space) -> list[Any]:
    """The smallest arch, and another that stands deeper only in a stage."""
    rng = np.random.default_rng(0)
    depths = {arch: set(space.plan(arch)) for arch in (space.sample(rng) for _ in range(50))}
    least, all_ = set(space.plan(space.smallest)), set(space.plan(space.largest))
    return [space.smallest, next(arch for arch, slots in depths.items() if least < slots < all_)]


def job_lost(path: Path, world: World) -> Tensors:
    """One process is killed, another has an error of its own."""
    world.sum_(torch.ones(1))
    if world.rank == 1:
        raise InputError("this one cannot read its images")
    if world.rank == 2:
        os._exit(7)
    for _ in range(100):
        world.sum_(torch.ones(100_000))
    return {}


def job_stuck(path: Path, world: World) -> Tensors:
    """One process answers no more."""
    world.sum_(torch.ones(1))
    if world.rank == 1:
        time.sleep(8)
    world.barrier()
    return {}


# --- processes ---


def start(job: str, path: Path, size: int, *, missing: int = 0, **more: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    made = []
    for rank in range(size - missing):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "NESTLING_TIMEOUT_S": "120",
            "PYTHONPATH": str(ROOT), **more,
        }  # fmt: skip
        command = [sys.executable, "-W", "error", __file__, job, str(path)]
        made.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return made


def finish(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and what was said, of each."""
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out + err) for process, (out, err) in zip(started, said, strict=True)]


def main(job: str, path: Path) -> int:
    try:
        with world("cpu") as all_:
            found = globals()[f"job_{job}"](path, all_)
            save_file(found, path / f"{job}-{all_.size}-{all_.rank}.safetensors")
    except InputError as error:
        print(json.dumps({"kind": type(error).__name__, "says": str(error)}))
        return 2
    assert not dist.is_initialized()
    return 0


# --- tests ---


def part(found: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(f"{prefix}."): value for key, value in found.items() if key.startswith(f"{prefix}.")}


def distance(found: Tensors, wanted: Tensors) -> float:
    """Largest difference of a parameter's gradient, relative to its norm; gradients that are 0 by theory relative to all."""
    assert found.keys() == wanted.keys()
    floor = 1e-4 * max(float(value.norm()) for value in wanted.values())
    return max(float((found[key] - wanted[key]).norm()) / max(float(wanted[key].norm()), floor) for key in wanted)


def alone(name: str, statistics: Statistics, micro_batch: int | None = None) -> Tensors:
    supernet = store(name)
    add_step(supernet, statistics, World(), micro_batch=micro_batch)
    return gradients(supernet)


def check_that_processes_talk_and_hold_the_same_numbers(together: list[Tensors]) -> None:
    size = len(together)
    for rank, found in enumerate(together):
        assert found["size"].tolist() == [size, rank]
        assert found["broadcast"].tolist() == [1.5, 2.5]
        assert found["summed"].tolist() == [size * (size - 1) / 2, 10 * size]
    assert torch.cat([found["share"] for found in together]).tolist() == list(range(7))
    own = ("size", "share", "norm.")  # all but these are reduced
    for key, value in together[0].items():
        if not key.startswith(own):
            assert all(torch.equal(found[key], value) for found in together[1:]), key


def check_that_a_step_is_that_of_one_process(together: list[Tensors]) -> None:
    """In groups as in one process in groups; synchronised as in one process on the whole batch."""
    for name in spaces_of(len(together)):
        for kind, of_one in (("grouped", "grouped"), ("synchronised", "plain")):
            found = part(together[0], f"gradients.{name}.{kind}")
            assert distance(found, alone(name, KINDS[of_one])) < 1e-5, (name, kind)


def check_that_statistics_matter_here(together: list[Tensors]) -> None:
    """So that the equalities above say something: statistics of each process's images give other gradients."""
    whole = alone("digits", KINDS["plain"])
    assert distance(part(together[0], "gradients.digits.plain"), whole) > 0.01
    assert distance(alone("digits", KINDS["grouped"]), whole) > 0.01
    assert distance(alone("digits", KINDS["plain"], GROUP), whole) > 0.01


def check_that_gradients_are_reduced_once_a_step(together: list[Tensors]) -> None:
    calls = {key: value for key, value in together[0].items() if key.startswith("calls.")}
    assert len(calls) > 4
    for key, value in calls.items():
        parameters = list(store(key.split(".")[1]).parameters())
        assert value.tolist() == [sum(each.numel() for each in parameters) + len(parameters)]  # and a mark each


def check_that_weights_stay_those_of_one_process_over_steps(together: list[Tensors]) -> None:
    found, wanted = part(together[0], "trained"), _trained(World())
    assert distance(found, wanted) < 1e-5
    assert distance(found, store("digits").state_dict()) > 0.001


def check_that_what_any_process_touched_has_a_gradient_everywhere_and_what_none_did_has_none(together: list[Tensors]) -> None:
    supernet, images = store("digits"), batch_of(SPACES["digits"]())[0]
    for arch, times in zip(uneven(supernet.space), (1, len(together) - 1), strict=True):
        (times * supernet.child(arch)(images[:4]).square().sum()).backward()
    wanted = gradients(supernet)
    assert len(wanted) < len(list(supernet.parameters()))
    assert distance(part(together[0], "uneven.first"), wanted) < 1e-9
    supernet.child(supernet.space.largest)(images).square().sum().backward()
    assert distance(part(together[0], "uneven.then"), gradients(supernet)) < 1e-9


def check_that_a_synchronised_norm_and_its_gradients_are_those_of_the_whole_batch(together: list[Tensors]) -> None:
    """Also with parts of unequal sizes, with a mean far above the deviation (where a sum of squares would give nonsense), in bf16."""
    for name, tolerance in {"fp64": 1e-10, "fp32": 1e-5, "far": 1e-2, "bf16": 2e-2}.items():
        wanted = normalised_by(Statistics(), *(value.double() for value in maps(*MAPS[name])))
        found = [part(each, f"norm.{name}") for each in together]
        assert found[0]["y"].dtype == found[0]["x"].dtype == MAPS[name][0]
        for key in ("y", "x"):
            whole = torch.cat([each[key] for each in found]).double()
            torch.testing.assert_close(whole, wanted[key], rtol=tolerance, atol=tolerance)
        for key in ("weight", "bias"):
            total = torch.stack([each[key] for each in found]).double().sum(0)
            torch.testing.assert_close(total, wanted[key], rtol=tolerance, atol=10 * tolerance)


def check_that_evaluation_is_that_of_one_process(together: list[Tensors], path: Path) -> None:
    wanted, found = evaluations(path, World()), part(together[0], "scores")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    scored = [value for key, value in wanted.items() if ".state." not in key]
    assert [len(value) for value in scored] == [60, 60, 1, 1, 7, 7]
    assert 0 < scored[1].float().mean() < 1
    tracked = [value for key, value in found.items() if key.endswith("num_batches_tracked")]
    assert tracked and all(value == 7 for value in tracked)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.nightly)])
def test_several_processes_do_what_one_does(
    size: int, tmp_path: Path, save_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job for all checks: each of its processes takes seconds to import torch."""
    save_images(tmp_path / "images.npz", classes=10)
    for code, said in finish(start("together", tmp_path, size)):
        assert code == 0, said
    found = [load_file(tmp_path / f"together-{size}-{rank}.safetensors") for rank in range(size)]
    check_that_processes_talk_and_hold_the_same_numbers(found)
    check_that_a_step_is_that_of_one_process(found)
    check_that_statistics_matter_here(found)
    check_that_gradients_are_reduced_once_a_step(found)
    check_that_weights_stay_those_of_one_process_over_steps(found)
    check_that_what_any_process_touched_has_a_gradient_everywhere_and_what_none_did_has_none(found)
    check_that_a_synchronised_norm_and_its_gradients_are_those_of_the_whole_batch(found)
    monkeypatch.setattr("supernet.evaluate.CALIBRATION_BATCH", 8)
    check_that_evaluation_is_that_of_one_process(found, tmp_path)


def assert_told(said: str) -> None:
    told = json.loads(said)
    assert told["kind"] == "ProcessLost"
    assert told["says"].startswith("another process of this job ended or does not answer (")
    assert told["says"].endswith("(a training: `nestling train --resume --out RUN`), on any number of processes")
    assert "\n" not in told["says"]


@pytest.mark.slow
def test_who_loses_another_process_says_so_and_an_error_of_its_own_stays_its_own(tmp_path: Path) -> None:
    (code, said), (failed, its), (killed, _) = finish(start("lost", tmp_path, 3))
    assert (code, failed, killed) == (2, 2, 7)
    assert_told(said)
    assert json.loads(its) == {"kind": "InputError", "says": "this one cannot read its images"}


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    (code, said), _ = finish(start("stuck", tmp_path, 2, NESTLING_TIMEOUT_S="3"))
    assert code == 2
    assert "Timed out waiting 3000ms" in said
    assert_told(said)


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so(tmp_path: Path) -> None:
    [(code, said)] = finish(start("lost", tmp_path, 2, missing=1, NESTLING_TIMEOUT_S="2"))
    told = json.loads(said)
    assert code == 2
    assert told["kind"] == "ProcessLost"
    assert told["says"].startswith("the 2 processes of this job did not meet at 127.0.0.1:")
    assert "\n" not in told["says"]


# --- alone ---


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NESTLING_TIMEOUT_S"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    assert not dist.is_initialized()


def test_alone_nothing_is_set_up_and_everything_is_the_same_object(environment: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor([1.0, 2.0])
    with world("cpu") as one:
        assert one == World(0, 1, "cpu")
        assert one.main
        assert not dist.is_initialized()
        assert one.sum_(tensor) is tensor
        assert one.broadcast(tensor) is tensor
        assert one.gather(b"x") == [b"x"]
        assert one.share(3) == range(3)
        one.barrier()
    assert tensor.tolist() == [1, 2]


def test_what_is_broadcast_comes_back_from_json_also_alone() -> None:
    assert World().broadcast({"a": (1, 2.5)}) == {"a": [1, 2.5]}
    with pytest.raises(TypeError):
        World().broadcast({"a": object()})


@pytest.mark.parametrize(
    "name", [pytest.param("digits", marks=pytest.mark.slow), *(name for name in SPACES if name != "digits")]
)
def test_in_groups_micro_batches_have_the_gradients_of_the_whole_batch(name: str) -> None:
    whole = alone(name, KINDS["grouped"])
    for micro_batch in (GROUP, BATCH // 2):
        assert distance(alone(name, KINDS["grouped"], micro_batch), whole) < 1e-5
    if name != "vit":  # which has no batch norm
        assert distance(alone(name, KINDS["plain"], GROUP), alone(name, KINDS["plain"])) > 0.01


def test_alone_gradients_are_left_as_they_are() -> None:
    supernet = store("mlp")
    add_step(supernet, Statistics(), World())
    before = {name: parameter.grad for name, parameter in supernet.named_parameters()}
    reduce_gradients(supernet, World())
    assert all(parameter.grad is before[name] for name, parameter in supernet.named_parameters())


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> World:
    """As if another process had the very same gradients."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    return World(0, 2)


def test_what_an_earlier_step_left_is_not_summed(twins: World) -> None:
    supernet = store("mlp")
    images = batch_of(supernet.space)[0]
    supernet.child(supernet.space.largest)(images).square().sum().backward()
    supernet.zero_grad()
    supernet.child(supernet.space.smallest)(images).square().sum().backward()
    wanted = {name: 2 * value for name, value in gradients(supernet).items()}
    reduce_gradients(supernet, twins)
    found = gradients(supernet)
    assert found.keys() == wanted.keys() != dict(supernet.named_parameters()).keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    supernet.zero_grad()
    reduce_gradients(supernet, twins)
    assert gradients(supernet) == {}


def test_gradients_that_somebody_else_put_there_are_summed_too(twins: World) -> None:
    supernet = store("mlp")
    first, second, *_ = supernet.parameters()
    first.grad = torch.ones_like(first)
    second.requires_grad_(False)
    reduce_gradients(supernet, twins)
    assert first.grad.eq(2).all()
    assert [p.grad is not None for p in supernet.parameters()].count(True) == 1


@pytest.mark.parametrize("change", ["float", "channels_last"])
def test_gradients_are_summed_also_after_the_storage_moved(change: str, twins: World) -> None:
    supernet = store("autoencoder")
    add_step(supernet, Statistics(), World())
    supernet.to(**{"float": {"dtype": torch.float32}, "channels_last": {"memory_format": torch.channels_last}}[change])
    wanted = {name: 2 * value for name, value in gradients(supernet).items()}
    reduce_gradients(supernet, twins)
    assert len(wanted) > 10
    assert distance(gradients(supernet), wanted) == 0


def test_each_dtype_of_parameters_is_reduced_once(twins: World) -> None:
    supernet = store("mlp")
    next(supernet.children()).float()
    with counted() as calls:
        reduce_gradients(supernet, twins)
    assert len(calls) == 2
    assert sum(calls) == sum(p.numel() + 1 for p in supernet.parameters())


COMPLETE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "a process of several needs the environment that torchrun sets, but RANK is not set"),
        ({"WORLD_SIZE": None}, "but WORLD_SIZE is not set"),
        ({"MASTER_ADDR": None}, "but MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "but MASTER_PORT is not set: start by torchrun"),
        ({"RANK": "first"}, "the environment variable RANK is a number, but is 'first'"),
        ({"NESTLING_TIMEOUT_S": "0"}, "NESTLING_TIMEOUT_S is a number of seconds above 0, but is '0'"),
        ({"NESTLING_TIMEOUT_S": "soon"}, "but is 'soon'"),
        ({"NESTLING_TIMEOUT_S": "nan"}, "but is 'nan'"),
        ({"NESTLING_TIMEOUT_S": "inf"}, "but is 'inf'"),
    ],
)  # fmt: skip
def test_an_incomplete_environment_is_refused(
    change: dict[str, str | None], message: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in (COMPLETE | change).items():
        if value is not None:
            environment.setenv(name, value)
    with pytest.raises(InputError, match=message), world("cpu"):
        pass


def test_two_processes_on_one_gpu_are_refused(environment: pytest.MonkeyPatch) -> None:
    for name, value in (COMPLETE | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}).items():
        environment.setenv(name, value)
    environment.setattr("torch.cuda.device_count", lambda: 1)
    message = (
        "each process needs a GPU of its own, but 2 run on this machine and torch sees 1 here: give torchrun --nproc-per-node 1"
    )
    with pytest.raises(InputError, match=message), world("cuda"):
        pass


def test_only_errors_of_the_connection_are_said_to_be_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: str) -> Callable[..., None]:
        def raises(*_: object) -> None:
            raise RuntimeError(message)

        return raises

    monkeypatch.setattr(
        dist, "all_reduce", fails("[/a/b/pair.cc:5] Connection closed by peer [127.0.0.1]:1. Good luck!\nand a trace")
    )
    with pytest.raises(
        ProcessLost, match=r"another process .* \(Connection closed by peer \[127.0.0.1\]:1\): look for its message"
    ):
        World(0, 2).sum_(torch.ones(1))
    monkeypatch.setattr(dist, "all_reduce", fails("Tensors must be contiguous"))
    with pytest.raises(RuntimeError, match="Tensors must be contiguous"):
        World(0, 2).sum_(torch.ones(1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
