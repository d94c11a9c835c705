"""Warm starts: a network that is a child of the space is that child from the start; what does not fit is told, never guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from supernet.calibrate import calibrate
from supernet.donor import Donor, donor_of_network, donor_of_state, read_donor
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.run import Run
from supernet.slicing import part_of
from supernet.space import Space, load_space
from supernet.start import resume, start
from supernet.train import train
from supernet.warm import arch_of, fill

SPACE = load_space("digits")


def trained(space: Space, seed: int, arch_seed: int = 3) -> tuple[nn.Sequential, Tensor]:
    """A child with weights and statistics of its own, and images for it."""
    net, rng = Supernet(space, seed=seed), np.random.default_rng(arch_seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    arch = space.sample(rng)
    size = space.resolution(arch)
    images = torch.randn(16, space.family.in_channels, size, size, generator=generator)
    return calibrate(net.extract(arch), [images]), images


@pytest.mark.parametrize("arch_seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_child_of_the_space_is_that_child_from_the_start_with_its_statistics(arch_seed: int) -> None:
    network, images = trained(SPACE, 5, arch_seed)
    fresh = Supernet(SPACE, seed=9)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    begun = fill(fresh, donor_of_state(SPACE, "a child", network.state_dict()))
    assert not begun.left and begun.arch is not None
    assert torch.equal(begun.network(fresh)(images), network(images))
    taken = dict(network.named_parameters())
    for name, value in fresh.named_parameters():
        outside = torch.ones_like(value, dtype=torch.bool)
        if name in taken:  # zero-gamma is off for what was taken
            outside[part_of(value.shape, taken[name].shape)] = False
            assert torch.equal(value[part_of(value.shape, taken[name].shape)], taken[name])
        assert torch.equal(value[outside], before[name][outside]), name


@pytest.mark.slow
def test_the_arch_is_read_from_the_shapes_alone() -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        arch = SPACE.sample(rng)
        shapes = {name: value.shape for name, value in Supernet(SPACE).extract(arch).named_parameters()}
        found = arch_of(SPACE, shapes, SPACE.resolution(arch))
        assert found == arch
        assert arch_of(SPACE, {**shapes, "stage9_9.weight": torch.Size([3])}) is None
        name = next(iter(shapes))
        assert arch_of(SPACE, {**shapes, name: torch.Size([size + 1 for size in shapes[name]])}) is None


def test_other_classes_and_channels_leave_only_what_depends_on_them_fresh() -> None:
    network, _ = trained(SPACE, 5)
    other = load_space("digits", classes=7, in_channels=3)
    begun = fill(Supernet(other), donor_of_state(other, "a child", network.state_dict()))
    assert begun.left == {
        "stem.conv.weight": "it is for 1 image channels, the space has 3",
        "head.classifier.weight": "it is for 10 classes, the space has 7",
        "head.classifier.bias": "it is for 10 classes, the space has 7",
    }
    assert begun.arch is not None and begun.statistics  # the rest is still that child
    text = "\n".join(begun.told())
    assert "it is for 10 classes" in text and begun.arch.key in text


def test_a_network_that_is_too_large_is_taken_in_part_and_has_no_arch() -> None:
    network, _ = trained(load_space("digits"), 5)
    state = dict(network.state_dict())
    state["stage2_0.depthwise.conv.weight"] = torch.zeros(9, 1, 7, 7)
    state["stage1_0.project.conv.weight"] = torch.full_like(state["stage1_0.project.conv.weight"], torch.nan)
    state["stage1_0.depthwise.conv.weight"] = torch.zeros(8, 1, 2, 2)
    state["stem.conv.weight"] = torch.zeros(8)
    state["stem.act.weight"] = torch.zeros(8)
    fresh = Supernet(SPACE)
    begun = fill(fresh, Donor("it", state))
    assert begun.arch is None and not begun.statistics
    reasons = ["larger than", "not finite", "another centre", "it has 1 axes", "no such part", "it stays 0"]
    assert {"stage1_0.project.norm.weight", "stage2_0.project.norm.weight"} <= begun.left.keys()
    assert not fresh.get_parameter("stage2_0.project.norm.weight").any()
    assert len(begun.left) == 7 and all(any(reason in text for text in begun.left.values()) for reason in reasons)
    assert all(torch.isfinite(value).all() for value in fresh.parameters())
    with pytest.raises(InputError, match="is no child of the space digits"):
        begun.network(fresh)


def test_another_supernet_gives_the_part_that_both_have(tiny_run: Run) -> None:
    wide = tiny_run.supernet()
    definition = json.loads(json.dumps(tiny_run.space.definition))
    definition["stages"][1]["width"], definition["classes"] = [8, 48], 5
    other = Space.from_definition(definition)
    begun = fill(fresh := Supernet(other, seed=4), read_donor(other, str(tiny_run.path)))
    assert begun.arch is None and set(begun.left) == {"head.classifier.weight", "head.classifier.bias"}
    name = "stage2_0.project.conv.weight"  # 24 channels there, 48 here
    assert torch.equal(fresh.get_parameter(name)[:24], wide.get_parameter(name))
    assert torch.equal(fresh.get_parameter(name)[24:], Supernet(other, seed=4).get_parameter(name)[24:])


@pytest.mark.parametrize("resolution", [[8, 12], [8, 16], [4]])
def test_positions_of_another_grid_are_interpolated_and_never_cut(resolution: list[int]) -> None:
    definition = {"name": "tiny", "family": "vit", "classes": 3, "in_channels": 1, "resolution": [8], "patch_size": 2, "embed_dim": [8],
                  "depth": [1], "heads": [2], "mlp_ratio": [2.0], "head_dim": 4}  # fmt: skip
    donor = Supernet(Space.from_definition(definition), seed=3)
    space = Space.from_definition({**definition, "resolution": resolution})
    network = donor.extract(donor.space.smallest)
    begun = fill(fresh := Supernet(space, seed=5), donor_of_state(space, "a child", network.state_dict()))
    assert not begun.left and begun.arch is None
    size = resolution[-1] // 2
    expected = interpolate(donor.get_parameter("embed.position")[None], (size, size), mode="bicubic", antialias=True)[0]
    assert torch.equal(fresh.get_parameter("embed.position"), expected)
    again = fill(same := Supernet(donor.space, seed=5), donor_of_state(donor.space, "a child", network.state_dict()))
    assert again.arch == donor.space.smallest and torch.equal(same.get_parameter("embed.position"), network.embed.position)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_needs_their_file_no_more(easy_npz: Path, tmp_path: Path, tiny_run: Run) -> None:
    network, _ = trained(tiny_run.space, 6)
    save_file(network.state_dict(), tmp_path / "child.safetensors")
    options = {"batch_size": 48, "calibration_images": 64, "learning_rate": 1e-12, "weight_decay": 0.0}
    begun = start(str(easy_npz), tmp_path / "run", epochs=1, overrides=options, init=str(tmp_path / "child.safetensors"))
    assert any("it is the child" in reason for reason in begun.reasons)
    (tmp_path / "child.safetensors").unlink()
    train(resume(tmp_path / "run").run)
    run = Run.open(tmp_path / "run")
    kept = json.loads((run.path / "init" / "init.json").read_text())
    arch = run.space.arch(kept["arch"])
    for name, value in run.supernet().extract(arch).named_parameters():
        torch.testing.assert_close(value, network.get_parameter(name), rtol=0, atol=1e-6)
    statistics = load_file(run.path / "init" / "statistics.safetensors")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in statistics.items())


def test_a_run_whose_initial_weights_changed_is_refused(easy_npz: Path, tmp_path: Path, tiny_run: Run) -> None:
    begun = start(str(easy_npz), tmp_path / "run", epochs=1, init=str(tiny_run.path)).run
    path = begun.path / "init" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"weights\.safetensors is missing or was changed since the run began"):
        train(begun)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:efficientnet_b00", r"timm has no network 'efficientnet_b00'. Did you mean 'efficientnet_b0'\?"),
        ("nowhere", "--init is timm:NAME, a safetensors file or the directory of a run, but got 'nowhere'"),
        ("pickle.pt", r"weights are taken from .safetensors files only; pickled ones .* are never opened"),
        ("other.safetensors", "hardly anything of .* fits into the space digits"),
        ("untrained", "has no whole checkpoint to start from"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_anything_is_written(
    source: str, message: str, easy_npz: Path, tmp_path: Path, tiny_run: Run
) -> None:
    torch.save({"stem.conv.weight": torch.zeros(3)}, tmp_path / "pickle.pt")
    save_file({"stem.conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    shutil.copytree(tiny_run.path, tmp_path / "untrained", ignore=shutil.ignore_patterns("step-*"))
    given = source if source.startswith("timm:") else str(tmp_path / source)
    with pytest.raises(InputError, match=message if source != "nowhere" else "--init is timm:NAME"):
        start(str(easy_npz), tmp_path / "run", epochs=1, init=given)
    assert not (tmp_path / "run").exists()


def test_what_shapes_leave_open_is_no_arch(tiny_run: Run) -> None:
    definition = {"name": "open", "family": "mlp", "classes": 3, "in_channels": 1, "resolution": 8, "depth": [1, 2], "width": [8, 16],
                  "activation": ["relu", "swish"]}  # fmt: skip
    space = Space.from_definition(definition)
    state = Supernet(space, seed=1).extract(space.smallest).state_dict()
    begun = fill(Supernet(space), donor_of_state(space, "a child", state))
    assert begun.arch is None and not begun.statistics and not begun.left
    fixed = Space.from_definition({**definition, "activation": ["relu"]})
    found = fill(Supernet(fixed), donor_of_state(fixed, "a child", state)).arch
    assert found is not None and found["depth"] == 1 and found["width"] == 8


def test_pixels_and_image_channels_are_never_taken_in_part() -> None:
    definition = {
        "name": "pixels",
        "family": "mlp",
        "classes": 3,
        "in_channels": 1,
        "resolution": 8,
        "depth": [1],
        "width": [8],
    }
    small, large = (Space.from_definition({**definition, "resolution": size}) for size in (8, 10))
    with pytest.raises(InputError, match=r"hardly anything of it fits into the space pixels \(43 of 555 weights\)"):
        fill(Supernet(large), donor_of_state(large, "it", plain_state(small)))  # all but its first layer
    grey, colour = (load_space("autoencoder", in_channels=channels) for channels in (1, 3))
    begun = fill(Supernet(colour), donor_of_state(colour, "it", plain_state(grey)))
    assert {"stem.conv.weight", "image.weight", "image.bias"} <= begun.left.keys()


def plain_state(space: Space) -> dict[str, Tensor]:
    """Weights of the largest child."""
    return Supernet(space, seed=2).extract(space.largest).state_dict()


@pytest.mark.parametrize(
    "name", ["resnet50d", *(pytest.param(each, marks=pytest.mark.slow) for each in ("resnetblur50d", "resnetaa50d"))]
)
def test_a_network_that_computes_otherwise_is_not_taken_for_the_child(name: str) -> None:
    space = Space.from_definition({**load_space("resnet50d").definition, "resolution": [64]})
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    network.pretrained_cfg["input_size"] = (3, 64, 64)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    begun = fill(Supernet(space), donor_of_network(space, name, network))
    assert (begun.arch is not None) == begun.proven == (name == "resnet50d")
    assert bool(begun.statistics) == begun.proven


def test_a_run_of_another_layout_or_family_is_refused(tiny_run: Run, tmp_path: Path) -> None:
    other = Space.from_definition({**tiny_run.space.definition, "gate": "efficientnet"})
    with pytest.raises(
        InputError, match=r"has the layout \{'gate': 'mobilenetv3'\}, the space digits \{'gate': 'efficientnet'\}"
    ):
        read_donor(other, str(tiny_run.path))
    with pytest.raises(InputError, match="has the family mbconv, the space mlp mlp"):
        read_donor(load_space("mlp"), str(tiny_run.path))


@pytest.mark.slow
def test_statistics_that_are_damaged_are_not_kept() -> None:
    network, _ = trained(SPACE, 5)
    for change in ({"stem.norm.running_var": torch.full((8,), -1.0)}, {"stem.norm.running_mean": torch.zeros(3)}):
        begun = fill(Supernet(SPACE), donor_of_state(SPACE, "it", {**network.state_dict(), **change}))
        assert begun.arch is not None and not begun.statistics
        begun.network(Supernet(SPACE))  # with fresh statistics


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_what_is_no_weight_is_not_taken(dtype: torch.dtype) -> None:
    network, _ = trained(SPACE, 5)
    state = {**network.state_dict(), "stem.conv.weight": torch.zeros(8, 1, 3, 3, dtype=dtype), "head.x\n\x1b": torch.zeros(0)}
    begun = fill(Supernet(SPACE), donor_of_state(SPACE, "it", state))
    assert "it holds no weights" in begun.left["stem.conv.weight"]
    assert all(line.isprintable() for line in begun.told())
