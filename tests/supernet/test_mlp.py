"""Multilayer perceptrons: which are the same, what they compute, and that all of it trains, costs and exports."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from torch.nn import functional as F

from deploy.export import to_onnx
from deploy.fold import folded
from deploy.ship import ship
from search.loop import Asked, search
from search.settings import SearchConfig
from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.families.mlp import MOST_LAYERS
from supernet.model import Supernet, plain
from supernet.space import Space, load_space
from supernet.start import start
from supernet.train import train
from tests.deploy.conftest import as_trained
from tests.deploy.test_peak_memory import peak_bytes
from tests.deploy.test_probe import assert_probe_is_the_export

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]
TINY: dict[str, Any] = {
    "format": 1, "name": "tiny-mlp", "family": "mlp", "in_channels": 2, "classes": 3, "resolution": 5, "depth": [1, 3],
    "width": [6, 9, 11], "activation": ["relu", "hard_swish", "swish"],
}  # fmt: skip
PER = ("network", "block")
SPACE = load_space("mlp")


def space_of(per: str = "network", **changes: Any) -> Space:
    return Space.from_definition({**TINY, "chosen_per": {"width": per}, **changes}, "my.yaml")


@pytest.mark.parametrize("per", PER)
def test_the_size_is_the_number_of_different_networks(per: str) -> None:
    space = space_of(per)
    codes = np.array(list(itertools.product(*(range(len(dimension.choices)) for dimension in space.dimensions))))
    archs = set(space.decode(codes))
    assert space.size == len(archs) == len({arch.key for arch in archs}) == {"network": 2 * 3 * 3, "block": 3 * (3 + 27)}[per]
    assert len({repr(plain(space, arch)) for arch in archs}) == len(archs)


def test_the_width_of_a_layer_that_does_not_stand_has_no_effect() -> None:
    space = space_of("block")
    choices = space.smallest.as_dict()
    assert space.arch(choices | {"layer2.width": 11, "layer3.width": 9}) == space.smallest
    deep = space.arch(choices | {"depth": 3, "layer2.width": 11, "layer3.width": 9})
    assert (deep["layer2.width"], deep["layer3.width"]) == (11, 9)


@pytest.mark.parametrize("seed", range(4))
def test_a_network_is_linear_norm_activation_layer_by_layer(seed: int) -> None:
    space = space_of("block")
    arch = space.sample(np.random.default_rng(seed))
    network = as_trained(space, arch, seed).double()
    x = images = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(seed)).double()
    state, act = network.state_dict(), {"relu": F.relu, "hard_swish": F.hardswish, "swish": F.silu}[str(arch["activation"])]
    x = x.reshape(4, 50)
    for layer in range(1, int(arch["depth"]) + 1):
        path = f"layer{layer}.layer"
        mean, var = state[f"{path}.norm.running_mean"], state[f"{path}.norm.running_var"]
        x = x @ state[f"{path}.linear.weight"].T
        assert x.shape[1] == arch[f"layer{layer}.width"]
        x = act((x - mean) / (var + 1e-5).sqrt() * state[f"{path}.norm.weight"] + state[f"{path}.norm.bias"])
    expected = x @ state["head.classifier.weight"].T + state["head.classifier.bias"]
    torch.testing.assert_close(network(images), expected)
    torch.testing.assert_close(folded(network)(images), expected)


def test_a_childs_weights_are_the_leading_part_of_the_store() -> None:
    space = space_of("block")
    supernet = Supernet(space)
    arch = space.arch(
        {"resolution": 5, "depth": 3, "layer1.width": 9, "layer2.width": 6, "layer3.width": 11, "activation": "relu"}
    )
    extracted = supernet.extract(arch)
    whole = supernet.get_parameter("layer2.layer.linear.weight")
    assert whole.shape == (11, 11)
    assert torch.equal(extracted.get_parameter("layer2.layer.linear.weight"), whole[:6, :9])
    assert extracted.get_parameter("head.classifier.weight").shape == (3, 11)


def test_many_free_layers_are_costed_without_a_table_of_their_combinations() -> None:
    """4^12 widths of the layers decide the classifier's input; only those that are asked for are counted."""
    space = space_of("block", depth=list(range(1, 13)), width=[8, 16, 24, 32])
    codes = space.sample_codes(500, np.random.default_rng(0))
    costs = Costs(space).all(codes)
    for position in range(0, 500, 50):
        arch = space.decode(codes[position : position + 1])[0]
        assert arch_costs(space, arch) == {name: int(values[position]) for name, values in costs.items()}
    assert space.size == 3 * sum(4**depth for depth in range(1, 13))
    assert Supernet(space).child(space.largest)(torch.zeros(2, 2, 5, 5)).shape == (2, 3)


# --- export ---


def _archs(space: Space) -> list[Arch]:
    rng = np.random.default_rng(6)
    others = [space.arch(space.largest.as_dict() | {"activation": name}) for name in ("relu", "hard_swish")]
    return [space.smallest, space.largest, *others, *(space.sample(rng) for _ in range(2))]


@pytest.mark.parametrize("which", [0, 2, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 3, 4, 5))])
def test_probe_and_peak_memory_are_those_of_the_export(which: int, graph_shapes: Shapes) -> None:
    space = space_of("block")
    arch = _archs(space)[which]
    model = to_onnx(as_trained(space, arch), channels=2, resolution=5)
    assert_probe_is_the_export(space, arch, model, graph_shapes)
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


@pytest.mark.slow
@pytest.mark.parametrize("which", range(6))
def test_probe_and_peak_memory_of_the_shipped_space_are_those_of_the_export(which: int, graph_shapes: Shapes) -> None:
    arch = _archs(SPACE)[which]
    model = to_onnx(as_trained(SPACE, arch), channels=1, resolution=28)
    assert_probe_is_the_export(SPACE, arch, model, graph_shapes)
    assert arch_costs(SPACE, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": [28]}, "resolution: "),
        ({"resolution": 0}, "resolution: .*greater than or equal to 1"),
        ({"resolution": True}, "resolution: "),
        ({"depth": [3, 1]}, "depth: .*smallest first"),
        ({"depth": [0, 1]}, "depth"),
        ({"depth": [MOST_LAYERS + 1]}, f"at most {MOST_LAYERS} hidden layers, but got {MOST_LAYERS + 1}"),
        ({"width": []}, "width: .*at least one"),
        ({"width": [8, 8]}, "width: .*each once"),
        ({"width": [100_000]}, "at most 1,000,000,000 weights, .*makes 10,000,000,000"),
        ({"resolution": 1000, "width": [600]}, "makes 1,200,000,000: lower resolution or width"),
        ({"activation": []}, "activation: "),
        ({"activation": ["gelu"]}, "activation.0: "),
        ({"activation": ["swish", "relu"]}, r"activation: .*in the order .*write \['relu', 'swish'\]"),
        ({"activation": ["relu", "relu"]}, r"activation: .*once each.*write \['relu'\]"),
        ({"chosen_per": {"width": "stage"}}, "chosen_per.width: .*'block' or 'network'"),
        ({"chosen_per": {"depth": "block"}}, "chosen_per.depth: unknown key"),
        ({"residual": True}, "residual: unknown key"),
    ],
)
def test_a_space_that_makes_no_networks_is_one_line_with_key_and_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Space.from_definition({**TINY, **change}, "my.yaml")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("my.yaml: ")


@pytest.mark.parametrize("per", PER)
def test_the_table_for_people_has_a_row_for_every_layer(per: str) -> None:
    space = space_of(per)
    rows = space.family.rows({dimension.name: dimension.choices for dimension in space.dimensions})
    assert [(row["layer"], row["width"]) for row in rows] == [
        *((f"layer{layer}", (6, 9, 11)) for layer in (1, 2, 3)), ("head", (3,))
    ]  # fmt: skip
    assert [row.get("optional") for row in rows] == [False, True, True, None]
    assert len(space.family.rows({name: (choice,) for name, choice in space.smallest})) == 2


# --- the whole way ---


@pytest.mark.slow
def test_children_train_are_searched_and_ship_like_any_other(
    tmp_path: Path, small_search: SearchConfig, fake_target: Callable[[], Any]
) -> None:
    file = tmp_path / "digits-mlp.yaml"
    file.write_text(yaml.safe_dump({
        **TINY, "name": "digits-mlp", "in_channels": 1, "classes": 10, "resolution": 8, "depth": [1, 2, 3], "width": [32, 64, 128],
        "chosen_per": {"width": "block"},
    }))  # fmt: skip
    run = start("digits", tmp_path / "run", space=str(file), recipe="digits", epochs=6).run
    train(run)
    ends = [arch_costs(run.space, arch)["macs"] for arch in (run.space.smallest, run.space.largest)]
    budget = sum(ends) // 2
    found = search(run, Asked((f"macs<={budget}",), settings=small_search, targets={None: fake_target()}))
    assert found.best.costs["macs"] <= budget
    assert found.best.confirm_score is not None and found.best.confirm_score > 0.5  # chance is 0.1
    bundle = ship(run, found.best.arch, tmp_path / "bundle", split="confirm")
    assert bundle.manifest["parity"]["agreement"] == 1.0
    assert bundle.manifest["macs"] == found.best.costs["macs"]
