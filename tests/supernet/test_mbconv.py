"""Inverted residuals: timm's networks, Once-for-All's subnets, levels of choice, divisors."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.export import to_onnx
from supernet import config
from supernet.costs import arch_costs
from supernet.errors import InputError
from supernet.families.mbconv import HeadSpec, MBConvSpec, ShortHeadSpec, StemSpec
from supernet.model import Supernet, plain
from supernet.operations import cost_of
from supernet.recount import OPERATORS, recount
from supernet.space import Space, load_space, read_arch
from tests.deploy.conftest import as_trained
from tests.deploy.test_peak_memory import peak_bytes
from tests.deploy.test_probe import assert_probe_is_the_export

OFA = json.loads((Path(__file__).parent.parent / "golden" / "ofa_mobilenetv3.json").read_text())
TIMM = {"efficientnet-b0": "efficientnet_b0", "mobilenetv3-large": "mobilenetv3_large_100"}
IN_CI = ("attentivenas", "efficientnet-b0", "mobilenetv3-large", "ofa-mobilenetv3")
"""Spaces whose graphs differ in kind."""
MBCONV = [name for name in config.names("spaces") if config.read(config.find("spaces", name)).get("family") == "mbconv"]
SMALL: dict[str, Any] = {
    "name": "small", "family": "mbconv", "resolution": [8, 16], "stem": {"width": [16], "stride": 1},
    "stages": [
        {"width": [16, 24], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [2, 2.5], "stride": 2},
        {"width": [32], "depth": [1, 3], "kernel_size": [3, 5], "expand_ratio": [3], "stride": 2},
    ],
    "head": {"width": [32]}, "classes": 3,
}  # fmt: skip


def small(**changes: object) -> dict[str, Any]:
    """The small definition; a key such as `stages.0.width` names what is changed."""
    definition = copy.deepcopy(SMALL)
    for path, value in changes.items():
        place: Any = definition
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
        place[last] = value
    return definition


def space_of(**changes: object) -> Space:
    return Space.from_definition(small(**changes))


def names(space: Space) -> list[str]:
    return [dimension.name for dimension in space.dimensions]


# --- timm ---


def timm_network(name: str, seed: int = 0) -> nn.Module:
    """Random weights, and norms whose scale, shift and statistics are far from 1 and 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model(name, pretrained=False)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.7, 1.3)
                module.bias.data.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            elif getattr(module, "bias", None) is not None:
                module.bias.data.normal_(0, 0.3)
    return network.eval()


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_are_the_only_children_of_their_spaces(name: str) -> None:
    space, theirs = load_space(name), timm_network(TIMM[name])
    ours = plain(space, space.smallest)
    ours.load_state_dict(space.family.from_timm(theirs.state_dict()), strict=True)
    size = space.resolution(space.smallest)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(images), ours.eval()(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std() > 1e-3  # the images matter: two rows of one value would agree too
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    assert space.size == 1
    assert arch_costs(space, space.smallest)["params"] == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_have_the_macs_of_our_closed_form(name: str) -> None:
    space, theirs = load_space(name), timm_network(TIMM[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(theirs, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
        counted = analysis.uncalled_modules_warnings(False).tracer_warnings("none").by_operator()
    assert arch_costs(space, space.smallest)["macs"] == sum(counted[operator] for operator in OPERATORS)


def test_a_timm_network_of_another_kind_is_refused() -> None:
    family = load_space("efficientnet-b0").family
    for name, message in (
        ("resnet18", "conv_stem and blocks.0.0 must be there"),
        ("efficientnetv2_rw_t", "blocks.1.0 is no inverted"),
    ):
        with torch.device("meta"):
            state = timm.create_model(name, pretrained=False).state_dict()
        with pytest.raises(InputError, match=message):
            family.from_timm(state)
    with pytest.raises(InputError, match="conv_stem"):
        family.from_timm({})


@pytest.mark.slow
def test_timm_weights_go_to_the_slots_of_their_blocks_in_every_space() -> None:
    stored = {name: value.shape for name, value in Supernet(load_space("bignas")).named_parameters()}
    found = load_space("bignas").family.from_timm(timm_network("efficientnet_b0").state_dict())
    found = {
        name: value for name, value in found.items() if not name.endswith(("running_mean", "running_var", "batches_tracked"))
    }
    assert found.keys() <= stored.keys()
    assert found["stage7_0.project.conv.weight"].shape == (320, 1152, 1, 1)
    assert found["head.expand.conv.weight"].shape == (1280, 320, 1, 1)


# --- Once-for-All ---


@pytest.mark.parametrize("name", OFA["spaces"])
def test_subnets_of_once_for_all_cost_what_its_own_code_makes_them_cost(name: str) -> None:
    space, rows = load_space(name), OFA["spaces"][name]["subnets"]
    archs = [space.arch(space.family.from_table(row)) for row in rows]
    costs = [arch_costs(space, arch) for arch in archs]
    assert [(cost["macs"], cost["params"]) for cost in costs] == [(row["macs"], row["params"]) for row in rows]
    assert archs[:2] == [space.smallest, space.largest]
    assert len(set(archs)) == 22


def test_the_spaces_have_as_many_archs_as_the_papers_say() -> None:
    per_stage = 9**2 + 9**3 + 9**4
    assert load_space("ofa-mobilenetv3").size == load_space("ofa-mobilenetv3-w1.2").size == 25 * per_stage**5
    stages = [2 * 2, 2 * 2, 2 * 2 * 2, 2 * 3 * 2, 3 * 5 * 2, 4 * 5 * 2, 2 * 2 * 2]
    assert load_space("bignas").size == 4 * 2 * int(np.prod(stages)) * 2


def test_entries_of_absent_blocks_mean_nothing_and_a_file_is_recognised(tmp_path: Path) -> None:
    space = load_space("ofa-mobilenetv3")
    entry = {"ks": [3] * 20, "e": [3] * 20, "d": [2] * 5, "r": 128, "wid": None}
    for key, value in (("ks", [3, 3, 0, "x"] * 5), ("r", [128])):
        (tmp_path / "arch.json").write_text(json.dumps({**entry, key: value}))
        assert read_arch(space, str(tmp_path / "arch.json")) == space.smallest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [3] * 19}, "'ks' must be a list of 20 numbers for the space ofa-mobilenetv3"),
        ({"e": 3}, "'e' must be a list of 20 numbers"),
        ({"d": None}, "'d' must be a list of 5 numbers"),
        ({"d": ["x", 2, 2, 2, 2]}, "stage2.depth must be one of \\[2, 3, 4\\], but got 'x'"),
        ({"d": [9, 2, 2, 2, 2]}, "stage2.depth must be one of"),
        ({"ks": [9] * 20}, "stage2_0.kernel_size must be one of \\[3, 5, 7\\], but got 9"),
        ({"r": [128, 224]}, "'r' must be a whole number of pixels"),
        ({"r": 129}, "resolution must be one of"),
        ({"wid": 1}, "'wid' must be null"),
        ({"ks": ...}, "'ks' is missing: add it"),
    ],
)
def test_a_wrong_entry_of_once_for_alls_form_is_named(change: dict[str, object], message: str) -> None:
    space = load_space("ofa-mobilenetv3")
    entry = {"ks": [3] * 20, "e": [3] * 20, "d": [2] * 5, "r": 128} | change
    with pytest.raises(InputError, match=message):
        space.arch(space.family.from_table({key: value for key, value in entry.items() if value is not ...}))


def test_each_form_of_a_table_needs_its_kind_of_space() -> None:
    entry = {"ks": [3] * 20, "e": [3] * 20, "d": [2] * 5, "r": 128}
    with pytest.raises(InputError, match="gives kernels and expansions per block"):
        load_space("attentivenas").family.from_table(entry)
    lists = {"resolution": 8, "width": [16, 16, 32, 32], "depth": [1, 1], "kernel_size": [3, 3], "expand_ratio": [2, 3]}
    with pytest.raises(InputError, match="does not choose kernels and expansions per stage"):
        space_of(**{"chosen_per.kernel_size": "network"}).family.from_table(lists)
    fixed = space_of(**{"chosen_per": {"kernel_size": "block", "expand_ratio": "block"}, "stages.0.kernel_size": [[3], [5]]})
    wrong = {"ks": [5, 5, 3, 3, 3], "e": [2, 2, 3, 3, 3], "d": [1, 1], "r": 8}
    with pytest.raises(InputError, match="'ks': block 0 of stage 1 has one kernel_size only, but got 5"):
        fixed.family.from_table(wrong)


# --- levels of choice ---


def test_a_choice_is_made_per_network_stage_or_block() -> None:
    assert [name for name in names(space_of()) if "kernel" in name] == ["stage1.kernel_size", "stage2.kernel_size"]
    assert names(space_of(**{"chosen_per.kernel_size": "network"}))[:2] == ["resolution", "kernel_size"]
    per_block = space_of(**{"chosen_per.kernel_size": "block", "stages.0.kernel_size": [[3], [3, 5]]})
    kernels = [name for name in names(per_block) if "kernel" in name]
    assert kernels == ["stage1_1.kernel_size", *(f"stage2_{index}.kernel_size" for index in range(3))]
    plan = per_block.plan(per_block.arch({**per_block.largest.as_dict(), "stage2_1.kernel_size": 3}))
    assert [spec.kernel_size for spec in plan.values() if isinstance(spec, MBConvSpec)] == [3, 5, 5, 3, 5]


def test_a_network_wide_choice_leaves_fixed_stages_alone() -> None:
    space = space_of(**{"chosen_per.kernel_size": "network", "stages.0.kernel_size": [3]})
    plan = space.plan(space.largest)
    assert [spec.kernel_size for spec in plan.values() if isinstance(spec, MBConvSpec)] == [3, 3, 5, 5, 5]


def test_activations_and_gates_that_are_fixed_are_no_dimensions() -> None:
    assert not [name for name in names(space_of()) if "activation" in name or "squeeze" in name]
    choices = ["relu", "hard_swish"]
    space = space_of(**{"stages.1.activation": choices, "head.activation": choices, "stages.0.squeeze_excite": [False, True]})
    assert [name for name in names(space) if "activation" in name or "squeeze" in name] == [
        "stage1.squeeze_excite", "stage2.activation", "head.activation"
    ]  # fmt: skip
    assert not space.by_name["stage2.activation"].ordered
    everywhere = dict.fromkeys(("stem.activation", "stages.0.activation", "stages.1.activation", "head.activation"), choices)
    space = space_of(**everywhere, **{"chosen_per.activation": "network"})
    assert [name for name in names(space) if "activation" in name] == ["activation"]
    last = space.plan(space.largest).values()
    assert {getattr(spec, "activation", None) for spec in last} == {"hard_swish"}


# --- geometry ---


def test_the_gate_of_efficientnet_counts_from_the_blocks_input() -> None:
    options: dict[str, Any] = {"in_width": 24, "width": 24, "kernel_size": 3, "stride": 1, "squeeze_excite": True, "in_size": 4}
    assert MBConvSpec(**options, expand_ratio=6, gate="efficientnet").squeezed == 6
    assert MBConvSpec(**options, expand_ratio=6).squeezed == 40  # 36, rounded
    assert MBConvSpec(**{**options, "in_width": 3}, expand_ratio=6, gate="efficientnet").squeezed == 1


@pytest.mark.parametrize(("stride", "in_width", "adds"), [(1, 8, True), (2, 8, False), (1, 16, False)])
def test_an_identity_shortcut_stands_only_where_nothing_changes(stride: int, in_width: int, adds: bool) -> None:
    spec = MBConvSpec(in_width=in_width, width=8, kernel_size=3, stride=stride, expand_ratio=2, squeeze_excite=False,
                      shortcut="identity", in_size=4)  # fmt: skip
    block = spec.build(drop=0.9).eval()
    assert ("Add" in [operation.onnx for operation in spec.operations().listed]) == adds == spec.adds
    assert len([name for name, _ in block.named_parameters() if name.startswith("shortcut")]) == 0
    images = torch.randn(2, in_width, 4, 4, generator=torch.Generator().manual_seed(0))
    branch = block.project(block.depthwise(block.expand(images)))
    assert torch.equal(block(images), branch + images if adds else branch)


def test_heads_by_hand() -> None:
    cost = cost_of(
        HeadSpec(in_width=4, expand_ratio=6, expand_width=12, bias=True, width=20, classes=10, in_size=2).operations()
    )
    assert (cost.macs, cost.params) == (4 * 4 * 12 + 12 * 20 + 200, (48 + 24) + (240 + 20) + 210)
    cost = cost_of(ShortHeadSpec(in_width=4, width=20, classes=10, in_size=2).operations())
    assert (cost.macs, cost.params) == (4 * 4 * 20 + 200, (80 + 40) + 210)
    assert cost_of(StemSpec(3, 8, 1, "relu", in_size=2).operations()).macs == 4 * 27 * 8


def test_blocks_without_a_shortcut_do_not_start_at_zero() -> None:
    supernet = Supernet(load_space("mobilenetv3-large"))
    assert all(value.all() for name, value in supernet.named_parameters() if name.endswith("norm.weight"))
    assert not Supernet(load_space("digits")).get_parameter("stage1_0.project.norm.weight").any()


# --- channel divisors ---


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 80), min_size=3, max_size=3), st.sampled_from([1, 1.3, 2, 2.5, 6]))
def test_a_divisor_rounds_every_width_up_to_a_multiple_and_eight_changes_nothing(widths: list[int], ratio: float) -> None:
    before: dict[str, Any] = {}
    for by in (None, 8, 16, 32):
        space = space_of(**{
            "channel_divisor": by, "stem.width": widths[:1], "stages.0.width": widths[1:2], "stages.1.width": [64],
            "head.width": widths[2:],
            "stages.0.expand_ratio": [ratio], "stages.0.squeeze_excite": True,
        })  # fmt: skip
        shapes = {
            name: value.shape for name, value in plain(space, space.largest).named_parameters() if name.endswith("conv.weight")
        }
        if by is not None:
            assert all(shape[0] % by == 0 for shape in shapes.values())
        if by == 8 and all(width % 8 == 0 for width in widths):
            assert shapes == before["shapes"]
        costs = arch_costs(space, space.largest)
        assert all(costs[metric] >= before["costs"][metric] for metric in costs if before)
        before = {"shapes": shapes, "costs": costs}


def test_widths_that_a_divisor_makes_equal_are_one_arch() -> None:
    space = space_of(**{"channel_divisor": [8, 16, 32], "stem.width": [16, 24, 32], "chosen_per.squeeze_excite": "network"})
    one = space.arch({**space.smallest.as_dict(), "channel_divisor": 32, "stem.width": 24})
    assert one == space.arch({**space.smallest.as_dict(), "channel_divisor": 32}) != space.smallest
    choices = itertools.product(*(range(len(dimension.choices)) for dimension in space.dimensions))
    archs = set(space.decode(np.array(list(choices))))
    assert len(archs) == space.size == len({tuple(space.plan(arch).items()) for arch in archs})


def test_one_divisor_is_no_dimension() -> None:
    assert names(space_of(channel_divisor=16)) == names(space_of())
    assert names(space_of(channel_divisor=[8, 16]))[1] == "channel_divisor"


# --- the exported graph, and fvcore ---


MIXED = {
    "gate": "efficientnet", "shortcut": "identity", "resolution": [8], "stages.0.activation": "relu", "stages.0.squeeze_excite": True,
    "stages.0.expand_ratio": [1], "stages.1.activation": "hard_swish", "stages.1.squeeze_excite": True, "stages.1.depth": [2],
    "head.bias": True, "head.activation": "hard_swish", "channel_divisor": 16,
}  # fmt: skip
"""What the first spaces do not have."""


@pytest.mark.parametrize(
    "name",
    ["mixed", *(pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.nightly) for name in MBCONV)],
)
def test_operations_are_the_exported_graph(name: str, graph_shapes: Callable[[onnx.ModelProto], Any]) -> None:
    space = space_of(**MIXED) if name == "mixed" else load_space(name)
    arch = space.sample(np.random.default_rng(0))
    model = to_onnx(as_trained(space, arch), channels=space.family.in_channels, resolution=space.resolution(arch))
    assert_probe_is_the_export(space, arch, model, graph_shapes)
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", MBCONV)
def test_children_of_every_space_cost_what_fvcore_counts(name: str) -> None:
    space, rng = load_space(name), np.random.default_rng(7)
    archs = [space.smallest, space.largest, *(space.sample(rng) for _ in range(4))]
    for arch in dict.fromkeys(archs):
        costs = arch_costs(space, arch)
        assert {metric: costs[metric] for metric in ("macs", "params")} == recount(space, arch), arch


def test_tables_for_people_show_every_space() -> None:
    for name in MBCONV:
        space = load_space(name)
        rows = space.family.rows({dimension.name: dimension.choices for dimension in space.dimensions})
        assert [row["stage"] for row in rows][:: len(rows) - 1] == ["stem", "head"]
    space = load_space("mobilenetv3-large")
    rows = space.family.rows({each: (choice,) for each, choice in space.largest})
    assert rows[4]["expand_ratio"] == (6, 2.5, 2.3, 2.3)
    assert rows[4]["activation"] == ("hard_swish",)
