"""The family autoencoder: what it refuses, the shape that it gives, and that its operators are those of the exported graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.recount import recount
from supernet.space import Space, load_space
from supernet.task import TASKS
from tests.deploy.conftest import as_trained
from tests.deploy.test_peak_memory import peak_bytes
from tests.deploy.test_probe import assert_probe_is_the_export

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]
DEFINITION: dict[str, Any] = {
    "format": 1, "name": "small", "family": "autoencoder", "in_channels": 3, "resolution": [8, 16],
    "stem": {"width": [4, 8]},
    "stages": [
        {"width": [8, 12], "depth": [1, 2], "decoder_depth": [1, 2], "kernel_size": [3, 5]},
        {"width": [12], "depth": [1, 2], "decoder_depth": [1], "kernel_size": [3]},
    ],
    "bottleneck": {"width": [2, 6]},
}  # fmt: skip


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.from_definition(DEFINITION)


@pytest.fixture(scope="module")
def shipped() -> Space:
    return load_space("autoencoder")


def archs(space: Space, count: int = 3) -> list[Arch]:
    rng = np.random.default_rng(5)
    return [space.smallest, space.largest, *(space.sample(rng) for _ in range(count))]


def test_images_come_out_in_the_size_in_which_they_went_in(space: Space) -> None:
    supernet = Supernet(space)
    for arch in archs(space, 6):
        size = space.resolution(arch)
        images = torch.randn(2, 3, size, size)
        assert supernet.child(arch)(images).shape == images.shape


def test_an_untrained_network_gives_nearly_the_mean_image(shipped: Space) -> None:
    images = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert Supernet(shipped).child(shipped.largest)(images).std() < 0.5 < images.std()


def test_all_passes_through_the_bottleneck(space: Space) -> None:
    """Two images that agree there have the same output: no shortcut leads around it."""
    network = as_trained(space, space.largest)
    slots = list(space.plan(space.largest))
    position = slots.index("bottleneck")
    with torch.no_grad():
        network[position][0].norm.weight.zero_()
        one, other = (network(torch.randn(1, 3, 16, 16)) for _ in range(2))
    assert torch.equal(one, other)


def test_it_learns_a_regression_which_exists(space: Space) -> None:
    assert space.family.task == "regression" in TASKS


def test_the_classes_of_the_data_change_nothing() -> None:
    spaces = [load_space("autoencoder", classes=classes) for classes in (None, 2, 7)]
    assert len({space.key for space in spaces}) == 1
    assert all("classes" not in space.definition for space in spaces)
    assert load_space("autoencoder", in_channels=3).key != spaces[0].key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": [8, 18]}, r"resolution must be a multiple of 4 \(2 stages halve the map\), but got 18: use 16, or fewer"),
        ({"resolution": [16, 8]}, "resolution: .*smallest first"),
        ({"resolution": [2]}, "resolution must be a multiple of 4 .*, but got 2: use 4"),
        ({"stages": []}, "stages"),
        ({"stages.0.kernel_size": [3, 4]}, "kernel_size: .*must be odd"),
        ({"stages.0.kernel_size": [9]}, r"stages.0.kernel_size: at resolution 8 the map of stage 1 has 4 px, .* use 7 at most"),
        ({"stages.1.kernel_size": [5]}, r"stages.1.kernel_size: .* stage 2 has 2 px, .* use 3 at most, or fewer stages"),
        ({"stages.0.depth": [1, 101]}, "at most 100 blocks"),
        ({"stages.0.decoder_depth": [0, 1]}, "decoder_depth"),
        ({"stages.0.width": []}, "width: .*at least one"),
        ({"stages.0.stride": 2}, "stride"),
        ({"bottleneck": {}}, "bottleneck.width"),
        ({"in_channels": 0}, "in_channels"),
    ],
)  # fmt: skip
def test_an_impossible_space_is_refused_with_its_key_and_the_remedy(change: dict[str, Any], message: str) -> None:
    definition = copy.deepcopy(DEFINITION)
    for key, value in change.items():
        *path, last = key.split(".")
        place: Any = definition
        for part in path:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    with pytest.raises(InputError, match=message) as raised:
        Space.from_definition(definition)
    assert "\n" not in str(raised.value)


def test_the_number_of_networks_by_hand(space: Space) -> None:
    """2 resolutions, 2 stem widths, 2 bottlenecks; stage 1: 2 x 2 x 2 x 2 kernels; stage 2: one width, 2 depths."""
    assert space.size == 2 * 2 * 2 * (2 * 2 * 2 * 2) * 2


def test_macs_and_params_by_hand() -> None:
    """One stage, one channel, stem 2, width 3, bottleneck 1, at 4 pixels; nothing residual."""
    stage = {"width": [3], "depth": [1], "decoder_depth": [1], "kernel_size": [3]}
    space = Space.from_definition({
        **DEFINITION, "in_channels": 1, "resolution": [4], "stem": {"width": [2]}, "stages": [stage], "bottleneck": {"width": [1]},
    })  # fmt: skip
    macs = 9 * 2 * 16 + 9 * 2 * 3 * 4 + 3 * 4 + 3 * 4 + 4 * 3 * 2 * 4 + 9 * 2 * 16
    params = (9 * 2 + 4) + (9 * 2 * 3 + 6) + (3 + 2) + (3 + 6) + (4 * 3 * 2 + 2) + (9 * 2 + 1)
    costs = arch_costs(space, space.smallest)
    assert (costs["macs"], costs["params"]) == (macs, params)


def test_costs_equal_those_that_fvcore_counts(shipped: Space) -> None:
    for arch in archs(shipped, 2):
        costs = arch_costs(shipped, arch)
        assert recount(shipped, arch) == {name: costs[name] for name in ("macs", "params")}


def test_the_shipped_space_is_compact(shipped: Space) -> None:
    macs = Costs(shipped).macs(shipped.sample_codes(2000, np.random.default_rng(0)))
    assert macs.min() > 0.2e6 and macs.max() < 25e6 and 0.5e6 < np.median(macs) < 20e6


@pytest.mark.parametrize(
    "which",
    [
        0,
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.slow),
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_the_probe_and_the_peak_memory_are_those_of_the_export(space: Space, which: int, graph_shapes: Shapes) -> None:
    from deploy.export import to_onnx

    arch = archs(space)[which]
    model = to_onnx(as_trained(space, arch), channels=3, resolution=space.resolution(arch), output="outputs")
    assert_probe_is_the_export(space, arch, model, graph_shapes)
    assert [value.name for value in model.graph.output] == ["outputs"]
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


@pytest.mark.slow
@pytest.mark.parametrize("which", range(4))
def test_the_probe_of_the_shipped_space_is_the_export(shipped: Space, which: int, graph_shapes: Shapes) -> None:
    from deploy.export import to_onnx

    arch = archs(shipped)[which]
    model = to_onnx(as_trained(shipped, arch), channels=1, resolution=shipped.resolution(arch))
    assert_probe_is_the_export(shipped, arch, model, graph_shapes)
    assert arch_costs(shipped, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


def test_the_table_has_a_row_a_stage(space: Space) -> None:
    rows = space.family.rows({dimension.name: dimension.choices for dimension in space.dimensions})
    assert [row["stage"] for row in rows] == [
        "stem", "stage1", "stage2", "bottleneck", "stage2 (decoder)", "stage1 (decoder)", "image",
    ]  # fmt: skip
    assert rows[2]["in_size"] == [4, 8] and rows[4]["in_size"] == [2, 4] and rows[-1]["width"] == (3,)
