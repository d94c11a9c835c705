"""Residual networks: the same numbers as timm's, the same counts as Once-for-All's code, the graph that is exported."""

from __future__ import annotations

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
from torch import nn

from deploy.export import to_onnx
from deploy.probe import probe
from deploy.runtimes.onnxruntime import OnnxRuntime
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.donor import donor_of_state
from supernet.errors import InputError
from supernet.families.resnet import ResidualSpec, mid_width
from supernet.model import Supernet, plain
from supernet.recount import OPERATORS, recount
from supernet.space import Space, load_space, read_arch
from supernet.warm import fill
from tests.deploy.conftest import as_trained
from tests.deploy.test_peak_memory import peak_bytes
from tests.deploy.test_probe import assert_probe_is_the_export

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]

OFA = json.loads((Path(__file__).parent.parent / "golden" / "ofa_resnet50.json").read_text())
SPACES = ["cifar-resnet", "ofa-resnet50", "resnet50d"]
TINY: dict[str, Any] = {
    "name": "tiny", "family": "resnet", "classes": 3, "in_channels": 2, "resolution": [13, 18], "block": "bottleneck",
    "stem": {"kind": "deep", "mid_width": [3, 5], "depth": [0, 1], "residual": True, "width": [6, 10]},
    "stages": [
        {"width": [6, 10], "depth": [1, 2], "expand_ratio": [1.0, 2.5], "stride": 1},
        {"width": [10, 15], "depth": [1, 3], "expand_ratio": [1.0], "stride": 2},
    ],
    "chosen_per": {"expand_ratio": "block"},
}  # fmt: skip
PLAIN = {"kind": "plain", "width": [8]}


def tiny(**changes: Any) -> Space:
    """A small space with some keys changed; `stem__width` is the key `width` of the stem, `stages__0__width` of the first stage."""
    definition = json.loads(json.dumps(TINY))
    for name, value in changes.items():
        *path, last = [int(part) if part.isdigit() else part for part in name.split("__")]
        holder = definition
        for part in path:
            holder = holder[part]
        if value is None:
            del holder[last]
        else:
            holder[last] = value
    return Space.from_definition(definition)


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, its weights and statistics of no special kind; signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


# --- Once-for-All ---


def entry_id(entry: dict[str, Any]) -> str:
    return f"{entry['image_size']}px-{entry['macs'] // 10**6}M"


@pytest.mark.parametrize("entry", OFA["subnets"], ids=entry_id)
def test_subnets_cost_what_the_published_code_makes_of_them(entry: dict[str, Any]) -> None:
    space = load_space(OFA["space"])
    costs = arch_costs(space, space.arch(space.family.from_table(entry)))
    assert {name: costs[name] for name in ("macs", "params")} == {name: entry[name] for name in ("macs", "params")}


def test_the_ends_of_the_space_are_those_of_the_published_code() -> None:
    space = load_space(OFA["space"])
    smallest, largest = (space.arch(space.family.from_table(entry)) for entry in OFA["subnets"][:2])
    assert (smallest, largest) == (space.smallest, space.largest)


def test_an_arch_in_the_published_notation_is_read_from_a_file(tmp_path: Path) -> None:
    space, entry = load_space(OFA["space"]), OFA["subnets"][5]
    file = tmp_path / "arch.json"
    file.write_text(json.dumps({**{key: entry[key] for key in ("d", "e", "w")}, "r": [entry["image_size"]]}))
    assert read_arch(space, str(file)) == space.arch(space.family.from_table(entry))


def test_two_widths_within_the_stem_are_rounded_to_the_same() -> None:
    space = load_space(OFA["space"])
    entry = {**OFA["subnets"][0], "w": [0, 0, 0, 0, 0, 0]}
    archs = [space.arch(space.family.from_table({**entry, "w": [first, *entry["w"][1:]]})) for first in (0, 1, 2)]
    assert archs[0] == archs[1] != archs[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d": None}, "'d' must be a list of 5 numbers, but got None"),
        ({"d": [0, 0, 0, 0]}, "'d' must be a list of 5 numbers"),
        ({"d": [1, 0, 0, 0, 0]}, "'d' must begin with 0 or 2"),
        ({"d": [0, 0, 0, 0, 3]}, "stage4.depth must be one of"),
        ({"d": [0, 0, 0, 0, 0.5]}, "'d' must hold numbers from 0 to 100, but holds 0.5"),
        ({"e": [0.2] * 17}, "'e' must be a list of 18 numbers"),
        ({"e": [0.3] * 18}, "stage1_0.expand_ratio must be one of"),
        ({"e": [True] * 18}, "'e' must hold numbers"),
        ({"w": [0, 0, 0, 0, 0, 3]}, "'w' must hold numbers from 0 to 2, but holds 3"),
        ({"w": [-1, 0, 0, 0, 0, 0]}, "'w' must hold numbers from 0 to 2, but holds -1"),
        ({"w": "000000"}, "'w' must be a list of 6 numbers"),
        ({"image_size": None}, "'image_size' .* must be a whole number of pixels, but got None"),
        ({"image_size": [128, 224]}, "'image_size' .* must be a whole number"),
        ({"image_size": 130}, "resolution must be one of"),
    ],
)
def test_a_bad_entry_of_a_table_is_refused(change: dict[str, Any], words: str) -> None:
    space = load_space(OFA["space"])
    with pytest.raises(InputError, match=words) as error:
        space.arch(space.family.from_table({**OFA["subnets"][0], **change}))
    assert "\n" not in str(error.value)


def test_an_expansion_that_is_fixed_must_be_the_one_given() -> None:
    entry = {"d": [2, 1, 2], "w": [1, 1, 1, 1], "image_size": 18, "e": [1.0, 2.5, 1.0, 1.0, 1.0]}
    space = tiny(stem__mid_width=[5, 8], stem__width=[6, 10])
    with pytest.raises(InputError, match=r"'e': the blocks of stage 2 have one expand_ratio only, but got 2\.5"):
        space.family.from_table({**entry, "e": [1.0, 2.5, 1.0, 1.0, 2.5]})
    arch = space.arch(space.family.from_table(entry))
    assert arch == space.arch({**space.largest.as_dict(), "stage1_0.expand_ratio": 1.0})


def test_a_space_with_other_choices_knows_no_such_notation() -> None:
    with pytest.raises(InputError, match="cifar-resnet has no deep stem with expansions chosen per block"):
        load_space("cifar-resnet").family.from_table(OFA["subnets"][0])


# --- timm ---


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """timm's network with weights and statistics of no special kind."""
    return shaken(timm.create_model("resnet50d", pretrained=False))


@pytest.mark.parametrize("size", [224, 97])  # odd maps too
def test_timm_weights_give_timm_outputs(theirs: nn.Module, size: int) -> None:
    space = load_space("resnet50d")
    network = plain(space, space.smallest)
    network.load_state_dict(space.family.from_timm(theirs.state_dict()), strict=True)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(images), network.eval()(images)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_basic_blocks_have_timm_outputs_too() -> None:
    other = shaken(timm.create_model("resnet18d", pretrained=False, num_classes=7))
    stages = [
        {"width": [width], "depth": [2], "expand_ratio": [1.0], "stride": 1 if width == 64 else 2}
        for width in (64, 128, 256, 512)
    ]
    space = tiny(
        block="basic", classes=7, in_channels=3, resolution=[64], stages=stages, chosen_per=None,
        stem={"kind": "deep", "mid_width": [32], "width": [64]},
    )  # fmt: skip
    network = plain(space, space.smallest)
    network.load_state_dict(space.family.from_timm(other.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = other(images), network.eval()(images)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_macs_and_params_are_those_of_timm(theirs: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore imports and traces through what torch calls deprecated
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(theirs, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
        counted = analysis.uncalled_modules_warnings(False).tracer_warnings("none").by_operator()
    space = load_space("resnet50d")
    costs = arch_costs(space, space.smallest)
    assert costs["macs"] == sum(counted[name] for name in OPERATORS)
    assert costs["params"] == sum(parameter.numel() for parameter in theirs.parameters())


def donated(theirs: nn.Module, residual: bool) -> tuple[Supernet, Arch | None, set[str]]:
    """A supernet with timm's weights, the arch that they are, and what was left out."""
    definition = {**load_space("ofa-resnet50").definition}
    space = Space.from_definition({**definition, "stem": {**definition["stem"], "residual": residual}})
    supernet = Supernet(space)
    start = fill(supernet, donor_of_state(space, "timm:resnet50d", space.family.from_timm(theirs.state_dict()), 224))
    return supernet, start.arch, set(start.left)


@pytest.mark.slow
def test_a_warm_start_from_timm_is_that_network(theirs: nn.Module) -> None:
    supernet, arch, left = donated(theirs, residual=False)
    assert arch is not None and not left
    network, images = supernet.extract(arch).train(), torch.randn(2, 3, 97, 97, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs.train()(images), network(images)
    theirs.eval()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()  # batch statistics


def test_a_stem_that_adds_takes_nothing_from_one_that_does_not(theirs: nn.Module) -> None:
    _, arch, left = donated(theirs, residual=True)
    assert arch is None
    assert left == {f"stem_1.{name}" for name in ("conv.weight", "norm.weight", "norm.bias")}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "'conv1.0' is missing: name a resnet\\*d"),
        ("resnet18d", "layer1.0 is no bottleneck block"),
        ("seresnet50", "'conv1.0' is missing"),
        ("resnext50d_32x4d", "a grouped conv2"),
        ("mobilenetv3_small_050", "'conv1.0' is missing"),
    ],
)
def test_weights_of_another_kind_are_refused(name: str, words: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
    with pytest.raises(InputError, match=words) as error:
        load_space("resnet50d").family.from_timm(state)
    assert "\n" not in str(error.value)


def test_attention_within_a_block_and_a_missing_part_are_refused(theirs: nn.Module) -> None:
    state = dict(theirs.state_dict())
    for broken in ({**state, "layer2.1.se.fc1.weight": torch.zeros(1)}, {**state, "layer2.1.downsample.0.weight": torch.zeros(1)},
                   {key: value for key, value in state.items() if not key.startswith("layer2.1.bn3")}):  # fmt: skip
        with pytest.raises(InputError, match=r"layer2\.1 is no bottleneck block with an average-pool shortcut"):
            load_space("resnet50d").family.from_timm(broken)


# --- costs and graphs ---


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_costs_are_those_of_the_networks(name: str) -> None:
    space, rng = load_space(name), np.random.default_rng(21)
    archs = [space.smallest, space.largest, *(space.sample(rng) for _ in range(4))]
    for arch in dict.fromkeys(archs):
        costs = arch_costs(space, arch)
        assert recount(space, arch) == {metric: costs[metric] for metric in ("macs", "params")}, arch


@pytest.mark.parametrize("which", ["smallest", *(pytest.param(each, marks=pytest.mark.nightly) for each in ("largest", 0, 1))])
@pytest.mark.parametrize("name", ["tiny", "plain", *(pytest.param(name, marks=pytest.mark.slow) for name in SPACES)])
def test_the_graph_is_what_was_counted(name: str, which: str | int, graph_shapes: Shapes) -> None:
    """Node by node; and what it computes is what torch computes, at odd sizes too."""
    activations = ["relu", "hard_swish", "swish"]
    spaces: dict[str, Callable[[], Space]] = {
        "tiny": lambda: tiny(activation=activations),
        "plain": lambda: tiny(stem={**PLAIN, "stride": 2}, block="basic", activation=activations),
    }
    space = spaces.get(name, lambda: load_space(name))()
    arch = space.sample(np.random.default_rng(which)) if isinstance(which, int) else getattr(space, which)
    network, channels, size = as_trained(space, arch), space.family.in_channels, space.resolution(arch)
    model = to_onnx(network, channels=channels, resolution=size)
    assert_probe_is_the_export(space, arch, model, graph_shapes)
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(images).numpy()
    found = OnnxRuntime().load(model.SerializeToString())(images.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_a_probe_runs_and_its_numbers_stay_ordinary() -> None:
    space = tiny()
    for arch in (space.smallest, space.largest):
        size = space.resolution(arch)
        logits = OnnxRuntime().load(probe(space, arch))(
            np.random.default_rng(3).standard_normal((2, 2, size, size), np.float32)
        )
        assert logits.shape == (2, 3) and np.isfinite(logits).all() and logits.any()


# --- blocks ---


def test_a_block_begins_as_its_shortcut() -> None:
    """Its last norm starts at 0; that of a stem that adds does not, since nothing would ever reach it through its activation."""
    space = tiny()
    supernet = Supernet(space)
    block = supernet.child(space.largest).get_submodule("stage1_1")
    x = torch.randn(2, 10, 4, 4, generator=torch.Generator().manual_seed(1)).relu()
    torch.testing.assert_close(block(x), x)
    assert supernet.get_parameter("stem_1.branch.norm.weight").all()


def test_a_stem_without_its_residual_convolution_is_the_same_without_it() -> None:
    space = tiny()
    supernet = Supernet(space)
    with_, without = (supernet.child(space.arch({**space.largest.as_dict(), "stem.depth": depth})) for depth in (1, 0))
    assert [name for name, _ in with_.named_children() if name not in dict(without.named_children())] == ["stem_1"]
    x = torch.randn(2, 5, 9, 9, generator=torch.Generator().manual_seed(1))
    residual = with_.get_submodule("stem_1")
    torch.testing.assert_close(residual(x), x + residual.get_submodule("branch")(x))


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize(("stride", "projected"), [(1, False), (1, True), (2, True), (3, True)])
def test_a_block_is_what_its_sizes_say(kind: Any, stride: int, projected: bool) -> None:
    width = 6 if projected else 5
    spec = ResidualSpec(kind, 5, 8, width, 1.6, stride, projected, "relu", in_size=7)
    block = spec.build()
    assert block(torch.randn(2, 5, 7, 7)).shape == (2, width, -(-7 // stride), -(-7 // stride))
    convolutions = [(module.kernel_size, module.stride[0]) for module in block.modules() if isinstance(module, nn.Conv2d)]
    expected = {"bottleneck": [((1, 1), 1), ((3, 3), stride), ((1, 1), 1)], "basic": [((3, 3), stride), ((3, 3), 1)]}[kind]
    assert sorted(convolutions) == sorted([*expected, *([((1, 1), 1)] if projected else [])])


def test_a_shortcut_averages_what_is_there() -> None:
    """Of an odd map the last window holds one column and is their mean, not half of it."""
    block = ResidualSpec("basic", 1, 8, 1, 8.0, 2, True, "relu", in_size=3).build()
    pool = block.get_submodule("pool")
    x = torch.tensor([[[[1.0, 3.0, 5.0], [1.0, 3.0, 7.0], [2.0, 4.0, 8.0]]]])
    assert torch.equal(pool(x), torch.tensor([[[[2.0, 6.0], [3.0, 8.0]]]]))


@pytest.mark.parametrize(
    ("width", "ratio", "mid"), [(168, 0.2, 32), (168, 0.25, 40), (336, 0.35, 120), (816, 0.2, 160), (8, 0.1, 8)]
)
def test_channels_within_a_block_are_rounded_to_eights(width: int, ratio: float, mid: int) -> None:
    assert mid_width(width, ratio) == mid


def test_drop_path_drops_the_branch_only() -> None:
    space = tiny()
    supernet = Supernet(space)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1)
    block = supernet.child(space.largest, drop_path=0.999999).get_submodule("stage2_2")
    x = torch.rand(4, 15, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    assert (block(x) == x).flatten(1).all(1).sum() >= 2


# --- spaces ---


def test_dimensions_are_named_and_counted() -> None:
    space = tiny(activation=["relu", "swish"])
    assert [dimension.name for dimension in space.dimensions] == [
        "resolution", "stem_mid.width", "stem.depth", "stem.width", "activation",
        "stage1.width", "stage1.depth", "stage1_0.expand_ratio", "stage1_1.expand_ratio", "stage2.width", "stage2.depth",
    ]  # fmt: skip
    assert [dimension.name for dimension in space.dimensions if not dimension.ordered] == ["activation"]
    assert space.size == 2 * (2 * 2 * 2) * 2 * (2 * (2 + 4)) * (2 * 2)
    per_stage = tiny(activation=["relu", "swish"], chosen_per={"activation": "stage", "expand_ratio": "network"})
    names = [dimension.name for dimension in per_stage.dimensions]
    assert {"stem.activation", "stage1.activation", "stage2.activation", "expand_ratio"} <= set(names)
    assert load_space("resnet50d").size == 1


def test_the_published_space_has_its_size() -> None:
    """4 stages of 3 widths, whose blocks have 3 expansions each: 3 ** d of them for depth d; the stem has 2 x 2 x 3."""
    stage = {least: 3 * sum(3**depth for depth in range(least, least + 3)) for least in (2, 4)}
    assert load_space("ofa-resnet50").size == 25 * (2 * 2 * 3) * stage[2] ** 3 * stage[4]


def test_a_first_shortcut_is_an_identity_for_all_widths_or_for_none() -> None:
    for widths, projected in (([8], False), ([6, 8], True), ([6], True)):
        space = tiny(stem=PLAIN, stages__0__width=widths)
        for arch in (space.smallest, space.largest):
            block = space.plan(arch)["stage1_0"]
            assert isinstance(block, ResidualSpec) and block.projected == projected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": [18, 13]}, "resolution.*smallest first"),
        ({"resolution": [8]}, "stages.1.stride: this stage makes maps of 1 x 1 pixels at resolution 8.*larger resolution"),
        ({"resolution": [2]}, "stages.0.stride: this stage makes maps of 1 x 1 pixels"),
        ({"resolution": None}, "resolution.*required"),
        ({"block": "inverted"}, "block"),
        ({"activation": "gelu"}, "activation.*relu, hard_swish, swish"),
        ({"activation": ["swish", "relu"]}, "activation.*order"),
        ({"activation": []}, "activation"),
        ({"chosen_per": {"width": "block"}}, "chosen_per.width: unknown key"),
        ({"chosen_per": {"expand_ratio": "layer"}}, "chosen_per.expand_ratio"),
        ({"stem__kind": "wide"}, "stem.kind"),
        ({"stem__kind": None}, "stem.kind: this key is required"),
        ({"stem__stride": 2}, "stem: a deep stem has no stride: remove it"),
        ({"stem__mid_width": None}, "stem: a deep stem needs mid_width"),
        ({"stem__mid_width": [5, 3]}, "stem.mid_width.*smallest first"),
        ({"stem__depth": []}, "stem.depth.*at least one"),
        ({"stem__depth": [1, 0]}, "stem.depth.*smallest first"),
        ({"stem__depth": [-1]}, "stem.depth"),
        ({"stem__depth": [11]}, "stem.depth"),
        ({"stem__depth": [True]}, "stem.depth"),
        ({"stem": {**PLAIN, "mid_width": [4]}}, "stem: a plain stem has no mid_width"),
        ({"stem": {**PLAIN, "residual": True}}, "stem: a plain stem has no residual"),
        ({"stem": {**PLAIN, "stride": 3}}, "stem.stride"),
        ({"stages": []}, "stages"),
        ({"stages__0__width": [10, 6]}, "stages.0.width.*smallest first"),
        ({"stages__0__depth": [0, 1]}, "stages.0.depth"),
        ({"stages__0__depth": [1, 101]}, "stages.0.depth.*at most 100 blocks"),
        ({"stages__0__stride": 5}, "stages.0.stride"),
        ({"stages__0__stride": True}, "stages.0.stride"),
        ({"stages__0__expand_ratio": [2.5, 1.0]}, "stages.0.expand_ratio.*smallest first"),
        ({"stages__0__expand_ratio": []}, "stages.0.expand_ratio.*at least one"),
        ({"stages__0__expand_ratio": [0]}, "stages.0.expand_ratio"),
        ({"stages__0__expand_ratio": [float("inf")]}, "stages.0.expand_ratio"),
        ({"stages__0__expand_ratio": [True]}, "stages.0.expand_ratio.*not true or false"),
        ({"stages__0__expand_ratio": [1.0, 1.1]}, r"stages.0.expand_ratio: must make different .* at width 6 it makes \[8, 8\]"),
        ({"stages__0__kernel_size": [3]}, "stages.0.kernel_size: unknown key"),
        (
            {"chosen_per": {"expand_ratio": "network"}, "stages__1__expand_ratio": [1.0, 4.0]},
            "expand_ratio is chosen per network, so all lists of it must be equal",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_network_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)


def test_rows_describe_every_stage() -> None:
    space = tiny()
    rows = space.family.rows({dimension.name: dimension.choices for dimension in space.dimensions})
    assert [row["stage"] for row in rows] == ["stem", "stage1", "stage2", "head"]
    assert rows[0]["block"] == "conv 3x3 to 3 or 5, 0 or 1 more (residual), conv 3x3, max pool"
    assert rows[1] == {
        "stage": "stage1", "block": "bottleneck", "in_size": [4, 5], "width": (6, 10), "depth": (1, 2),
        "expand_ratio": (1.0, 2.5), "activation": ("relu",), "stride": 1,
    }  # fmt: skip
    arch = space.arch({**space.largest.as_dict(), "stage1_0.expand_ratio": 1.0})
    rows = space.family.rows({name: (choice,) for name, choice in arch})
    assert rows[1]["expand_ratio"] == (1.0, 2.5) and rows[2]["expand_ratio"] == (1.0,)
    assert [row["in_size"] for row in rows] == [[18], [5], [5], [3]]


def test_images_of_any_size_pass() -> None:
    """Sizes that no stride divides."""
    space = tiny()
    for size in (13, 14, 15, 17, 18, 31):
        assert plain(space, space.largest)(torch.randn(2, 2, size, size)).shape == (2, 3)
