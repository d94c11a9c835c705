"""What holds on a GPU, for whoever has one (`-m gpu`); and that `benchmarks/gpu_check.py`, which sees more, runs anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supernet import checkpoint
from supernet import train as training
from supernet.arch import Arch
from supernet.data.sources import open_source
from supernet.evaluate import Evaluator
from supernet.model import Supernet, plain
from supernet.optimizer import limit_gradient, make_optimizer
from supernet.recipe import load_recipe
from supernet.run import Run
from supernet.sandwich import sandwich, step_rng
from supernet.slicing import part_of
from supernet.space import Space
from supernet.step import StepConfig, train_step
from supernet.task import Classification
from supernet.train import Progress, train

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[1]
BATCH, SIZE = 8, 12
task = Classification()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])


@pytest.fixture
def space() -> Space:
    return Space.from_definition({
        "name": "small", "family": "mbconv", "resolution": [8, SIZE], "stem": {"width": [8, 16], "stride": 1},
        "stages": [{"width": [8, 16], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [1, 2], "stride": 2,
                    "squeeze_excite": True}],
        "head": {"expand_ratio": 2, "width": [16, 24]}, "classes": 3, "in_channels": 1,
    })  # fmt: skip


@pytest.fixture
def new_run(space: Space, tmp_path: Path) -> Callable[..., Run]:
    """A run of 4 steps an epoch on 60 grey images whose brightness tells their class."""
    labels = np.arange(60) % 3
    pixels = np.random.default_rng(0).integers(0, 100, (60, SIZE, SIZE)) + 70 * labels[:, None, None]
    np.savez(tmp_path / "images.npz", images=pixels.astype(np.uint8), labels=labels)
    given = {"epochs": 2, "batch_size": 8, "calibration_images": 36, "validate_epochs": 0, "augment.flip": 0.5}

    def new_run(name: str, **changes: Any) -> Run:
        recipe = load_recipe("digits", given | changes)
        return Run.create(tmp_path / name, space, recipe, open_source(str(tmp_path / "images.npz")))

    return new_run


def made(space: Space, device: str, dtype: torch.dtype = torch.float64) -> Supernet:
    """Laid out as for training, with no weight at 0."""
    supernet, generator = Supernet(space, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    supernet.to(device=device, dtype=dtype)
    return supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def shown(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return images.to(device=device, dtype=dtype, memory_format=torch.channels_last), (torch.arange(BATCH) % 3).to(device)


def alone(supernet: Supernet, arch: Arch) -> nn.Sequential:
    """The child as an ordinary network of its own."""
    stored = dict(supernet.named_parameters())
    some = next(supernet.parameters())
    network = plain(supernet.space, arch, baked=False).to(device=some.device, dtype=some.dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(stored[name][part_of(stored[name].shape, parameter.shape)])
    return network


def gradients(supernet: Supernet) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}


def gradients_of_plain(supernet: Supernet, children: Sequence[tuple[str, Arch]], config: StepConfig) -> dict[str, Tensor]:
    """Of the same step, made with ordinary networks, and added up where the supernet keeps their weights."""
    networks = {arch: alone(supernet, arch) for _, arch in children}
    images, labels = shown(*_kind(supernet))
    train_step(supernet, children, images, labels, task, config, child=lambda arch, **_: networks[arch])
    stored, total = dict(supernet.named_parameters()), {}
    for network in networks.values():
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            whole = total.setdefault(name, torch.zeros_like(stored[name]))
            whole[part_of(whole.shape, parameter.shape)] += parameter.grad
    return total


def _kind(supernet: Supernet) -> tuple[str, torch.dtype]:
    some = next(supernet.parameters())
    return some.device.type, some.dtype


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


# --- a step ---


@on_gpu
def test_a_step_equals_that_of_plain_networks(space: Space, device: str) -> None:
    supernet, children = made(space, device), sandwich(space, 4, step_rng(0, 0))
    train_step(supernet, children, *shown(device), task, StepConfig())
    assert_close(gradients(supernet), gradients_of_plain(supernet, children, StepConfig()), rtol=1e-9, atol=1e-11)


@on_gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_in_lower_precision_a_step_is_as_near_as_that_of_plain_networks(space: Space, device: str, bf16: bool) -> None:
    children, config = sandwich(space, 4, step_rng(0, 0)), StepConfig(bf16=bf16)
    wanted = flat(gradients_of_plain(made(space, device), children, StepConfig()))
    supernet = made(space, device, torch.float32)
    train_step(supernet, children, *shown(device, torch.float32), task, config)
    found = gradients(supernet)
    assert {value.dtype for value in found.values()} == {torch.float32}
    apart = [
        float((flat(each) - wanted).norm() / wanted.norm()) for each in (found, gradients_of_plain(supernet, children, config))
    ]
    assert 0 < apart[0] <= 3 * apart[1] + 1e-6
    assert apart[0] < (0.2 if bf16 else 0.01)  # the second with TF32


@on_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("part", "groups"), [((6, 4, 3, 3), 1), ((6, 4, 1, 1), 1), ((6, 1, 3, 3), 6)])
def test_convolutions_over_views_equal_those_over_copies(
    device: str, layout: torch.memory_format, part: tuple[int, ...], groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = (8, 1 if groups > 1 else 6, *(size + 2 for size in part[2:]))
    stored = torch.randn(whole, generator=generator).double().to(device).contiguous(memory_format=layout)
    images = torch.randn(4, part[1] * groups, 9, 9, generator=generator).double().to(device).contiguous(memory_format=layout)
    view = stored[part_of(whole, part)]
    assert not view.is_contiguous()
    assert not view.is_contiguous(memory_format=torch.channels_last)
    found = []
    for weight in (nn.Parameter(view), nn.Parameter(view.contiguous())):
        leaf = images.clone().requires_grad_()
        outputs = F.conv2d(leaf, weight, padding=part[-1] // 2, groups=groups)
        outputs.square().sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert weight.grad is not None
        found.append((outputs.detach(), leaf.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@on_gpu
def test_children_follow_the_storage_to_the_gpu_and_back(space: Space, device: str) -> None:
    supernet = made(space, "cpu")
    before = supernet.child(space.largest)
    for there in (device, "cpu", device):
        supernet.to(there)
        child = supernet.child(space.largest)
        stored = dict(supernet.named_parameters())
        assert child[0] is not before[0]
        for name, parameter in child.named_parameters():
            assert parameter.device.type == there
            assert parameter.untyped_storage().data_ptr() == stored[name].untyped_storage().data_ptr()
        supernet.zero_grad()
        task.label_loss(child(shown(there)[0]), shown(there)[1]).backward()  # type: ignore[no-untyped-call]
        assert {value.device.type for value in gradients(supernet).values()} == {there}
        network = alone(supernet, space.largest)
        task.label_loss(network(shown(there)[0]), shown(there)[1]).backward()  # type: ignore[no-untyped-call]
        wanted = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found = {name: p.grad for name, p in child.named_parameters() if p.grad is not None}
        assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        for name, gradient in gradients(supernet).items():
            torch.testing.assert_close(gradient[part_of(gradient.shape, found[name].shape)], found[name], rtol=0, atol=0)
        before = child


@on_gpu
def test_the_gradient_buffer_lies_on_the_gpu_and_gives_back_what_it_gathered(space: Space, device: str) -> None:
    supernet = made(space, device, torch.float32)
    images, _ = shown(device, torch.float32)
    supernet.child(space.smallest)(images).square().mean().backward()
    wanted = gradients(supernet)
    assert wanted.keys() < dict(supernet.named_parameters()).keys()  # the smallest child has not every block
    for buffer in supernet.gradient_buffers():
        assert buffer.flat.device.type == device
        buffer.gather()
        buffer.flat.mul_(2)
        buffer.spread()
    assert_close(gradients(supernet), {name: 2 * value for name, value in wanted.items()}, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_a_child_can_be_a_cuda_graph(space: Space) -> None:
    supernet, eager = made(space, "cuda"), made(space, "cuda")
    images, labels = shown("cuda")
    network, stream, graph = supernet.child(space.largest), torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step(network: nn.Module) -> None:
        task.label_loss(network(images), labels).backward()  # type: ignore[no-untyped-call]

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(network)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step(network)
    images.mul_(0.5)
    for buffer in supernet.gradient_buffers():
        buffer.flat.zero_()
    graph.replay()
    step(eager.child(space.largest))
    assert_close(gradients(supernet), gradients(eager), rtol=1e-9, atol=1e-11)


@on_gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimizer_does_what_the_plain_one_does(space: Space, device: str, name: str) -> None:
    recipe = load_recipe("digits", {"optimizer": name, "learning_rate": 0.01, "clip_norm": 0.5})
    children, weights = sandwich(space, 4, step_rng(0, 0)), []
    for fused in (True, False):
        supernet = made(space, device)
        optimizer = make_optimizer(supernet, recipe)
        if not fused:
            assert all(group["fused"] for group in optimizer.param_groups)
            for group in optimizer.param_groups:
                group |= {"fused": False, "foreach": False}
        for count in (4, 2, 1):
            supernet.zero_grad()
            train_step(supernet, children[:count], *shown(device), task, StepConfig())
            limit_gradient(supernet, recipe)
            optimizer.step()
        weights.append({key: value.detach() for key, value in supernet.named_parameters()})
    assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)
    assert not torch.equal(flat(weights[0]), flat({key: p.detach() for key, p in made(space, device).named_parameters()}))


# --- a run ---


class Stopped(Exception):
    """Stands for whatever may end a run."""


def weights_of(run: Run) -> dict[str, Tensor]:
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    return checkpoint.load(newest).tensors["weights"]


@on_gpu
def test_a_resumed_run_goes_on_as_an_uninterrupted_one(
    new_run: Callable[..., Run], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    straight, broken, seen = new_run("straight"), new_run("broken"), []
    train(straight, device=device)

    def stop(now: Progress) -> None:
        if now.step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(broken, device=device, progress=stop)
    begun = flat(weights_of(broken))
    train(Run.open(broken.path), device=device, progress=lambda now: seen.append(now.step))
    whole = flat(weights_of(straight))
    assert seen == list(range(6, straight.recipe.epochs * (len(straight.dataset.splits.train) // 8) + 1))
    assert (flat(weights_of(broken)) - whole).norm() < 0.05 * (begun - whole).norm()


@on_gpu
def test_a_step_that_does_not_fit_is_made_in_smaller_pieces(
    new_run: Callable[..., Run], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own error, raised by an allocation that is larger than its memory, in the middle of a step."""
    changes = {"bn_group": 2, "dropout": 0.0, "drop_path": 0.0, "epochs": 1}
    plain_run, tight, told = new_run("plain", **changes), new_run("tight", **changes), []
    train(plain_run, device=device)
    make = training.train_step

    def hungry(supernet: Any, children: Any, images: Any, targets: Any, task: Any, config: StepConfig, **options: Any) -> Any:
        results = make(supernet, children, images, targets, task, config, **options)
        if config.micro_batch is None:
            torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device=device)
        return results

    monkeypatch.setattr(training, "train_step", hungry)
    train(tight, device=device, progress=lambda now: told.extend(now.events))
    assert told == ["step 1: out of memory; from here 4 images go through at once"]
    one, other = flat(weights_of(plain_run)), flat(weights_of(tight))
    assert (one - other).norm() < 0.01 * one.norm()


@on_gpu
def test_a_child_is_calibrated_and_scored_as_on_the_cpu(new_run: Callable[..., Run], device: str) -> None:
    run, found = new_run("run"), []
    split = run.dataset.split("train")
    for there in (device, "cpu"):
        network = Evaluator(made(run.space, there, torch.float32), task, split, 36).calibrated(run.space.largest)
        outputs = network(shown(there, torch.float32)[0]).detach()
        statistics = {name: value.cpu() for name, value in network.named_buffers() if value.is_floating_point()}
        found.append((flat(statistics), outputs.cpu()))
    assert len(found[0][0]) > 0
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()  # with TF32


# --- the script ---


@pytest.fixture
def script() -> ModuleType:
    import importlib

    return importlib.import_module("benchmarks.gpu_check")


def test_the_script_names_its_checks_and_takes_their_names(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(script.CHECKS)
    given = script.parser().parse_args(["--device", "cpu", "--quick", "--check", "views", "--check", "world"])
    assert (given.device, given.quick, given.check) == ("cpu", True, ["views", "world"])
    with pytest.raises(SystemExit):
        script.parser().parse_args(["--check", "nothing"])
    assert "views" in capsys.readouterr().err


@pytest.mark.slow
def test_a_check_that_fails_or_lacks_something_or_takes_too_long_stops_no_other(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = pytest.importorskip("benchmarks.gpu_checks_common")

    def fails(bench: Any) -> None:
        bench.figures["before"] = 1
        raise ValueError("told\nin two lines")

    def wrong(bench: Any) -> None:
        bench.expect(False, "not as it should be")
        bench.expect(True, "never told")

    def lacks(bench: Any) -> None:
        import no_such_package_here  # noqa: F401

    def skips(bench: Any) -> None:
        bench.need_cuda()

    def lasts(bench: Any) -> None:
        while True:
            pass

    checks = {call.__name__: call for call in (fails, wrong, lacks, skips, lasts)}
    for call in checks.values():
        monkeypatch.setattr(common, call.__name__, call, raising=False)
    monkeypatch.setattr(script, "CHECKS", {name: script.Check("common", name, 0.2) for name in checks})
    assert script.main(["--device", "cpu", "--seconds", "60"]) == 1
    *rows, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["checks"]
    assert {name: each["state"] for name, each in found.items()} == {
        "fails": "failed", "wrong": "failed", "lacks": "skipped", "skips": "skipped", "lasts": "failed",
    }  # fmt: skip
    assert found["fails"]["reason"] == "ValueError: told in two lines"
    assert found["fails"]["before"] == 1
    assert found["wrong"]["reason"] == "not as it should be"
    assert found["lacks"]["reason"] == "there is no package no_such_package_here"
    assert "stopped after" in found["lasts"]["reason"]
    assert [row.split()[0] for row in rows if row.split() and row.split()[0] in checks] == list(checks)


@pytest.mark.slow
@pytest.mark.parametrize("said", ['row\n{"checks": {"later": {"state": "ok", "took_s": 1.0}}}', "", "no JSON"])
def test_where_an_error_takes_the_device_along_the_others_run_in_a_fresh_process(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    common, commands = pytest.importorskip("benchmarks.gpu_checks_common"), []

    def breaks(bench: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fresh(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(common, "breaks", breaks, raising=False)
    monkeypatch.setattr(
        script, "CHECKS", {"first": script.Check("common", "breaks", 5), "later": script.Check("common", "breaks", 5)}
    )
    monkeypatch.setattr(script, "usable", lambda device: False)
    monkeypatch.setattr(script, "machine", lambda device: {"torch": "any"})
    monkeypatch.setattr(script.subprocess, "run", fresh)
    assert script.main(["--device", "cpu", "--quick"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    assert found["first"]["state"] == "failed"
    assert found["later"]["state"] == ("ok" if said.startswith("row") else "failed")
    assert commands[0][-2:] == ["--check", "later"]


@pytest.mark.slow
@pytest.mark.parametrize("check", ["views", "world"])
def test_the_script_runs_without_what_training_does_not_need(check: str) -> None:
    absent = ("fvcore", "onnx", "onnxruntime", "onnxscript", "sklearn", "scipy", "plotly", "typer", "rich")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); sys.path.insert(0, {str(ROOT)!r}); "
        f"from benchmarks.gpu_check import main; sys.exit(main(['--device', 'cpu', '--quick', '--check', {check!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["checks"][check]["state"] == "ok"
