"""Vision transformers: the same numbers as timm's, whole heads in leading slices, positions that are fitted once and for all."""

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
from torch import Tensor, nn
from torch.nn.functional import interpolate

from deploy.export import to_onnx
from deploy.probe import probe
from deploy.runtimes.onnxruntime import OnnxRuntime
from supernet.arch import Arch
from supernet.config import find, read
from supernet.costs import arch_costs
from supernet.donor import donor_of_state
from supernet.errors import InputError
from supernet.families.vit_blocks import Attention, Embed, LayerSpec
from supernet.model import Supernet, plain
from supernet.recount import OPERATORS, recount
from supernet.space import Space, load_space
from supernet.warm import fill
from tests.deploy.conftest import as_trained
from tests.deploy.test_peak_memory import peak_bytes
from tests.deploy.test_probe import assert_probe_is_the_export

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]

AUTOFORMERS = json.loads((Path(__file__).parent.parent / "golden" / "autoformer.json").read_text())
SPACES = ["autoformer-base", "autoformer-small", "autoformer-tiny", "cifar-vit", "vit-tiny"]
TINY: dict[str, Any] = {
    "name": "tiny", "family": "vit", "classes": 3, "in_channels": 1, "resolution": [4, 8], "patch_size": 2, "embed_dim": [6, 8],
    "depth": [1, 2], "heads": [1, 2], "mlp_ratio": [1.0, 2.0], "head_dim": 4,
}  # fmt: skip

MEAN: dict[str, Any] = {"pool": "mean"}


def tiny(**changes: Any) -> Space:
    """A small space with some keys changed; None removes one."""
    return Space.from_definition({key: value for key, value in {**TINY, **changes}.items() if value is not None})


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in evaluation mode with every parameter away from its initial value, norms, tokens and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return network.eval()


# --- the published models ---


@pytest.mark.parametrize("entry", AUTOFORMERS["models"], ids=lambda entry: entry["id"])
def test_published_archs_cost_our_integers_and_nearly_what_was_published(entry: dict[str, Any]) -> None:
    space = load_space(entry["space"])
    costs = arch_costs(space, space.arch(space.family.from_table(entry_of(entry))))
    assert {name: costs[name] for name in ("macs", "params")} == {name: entry[name] for name in ("macs", "params")}
    params = costs["params"] + AUTOFORMERS["relative_position_params_per_layer"] * entry["depth"]
    agrees = {"params": round(params / 1e6, 1) == entry["published_params_m"]}
    digits = 0 if isinstance(entry["published_gflops"], int) else 1
    agrees["macs"] = round(costs["macs"] / 1e9, digits) == entry["published_gflops"]
    assert [name for name in ("params", "macs") if agrees[name]] == entry["agrees"]
    assert params / 1e6 == pytest.approx(entry["published_params_m"], rel=0.03)
    assert costs["macs"] / 1e9 == pytest.approx(entry["published_gflops"], rel=0.07)


def entry_of(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("embed_dim", "depth", "heads", "mlp_ratio")}


# --- timm ---


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """timm's network with weights of no special kind."""
    torch.manual_seed(0)
    return shaken(timm.create_model("vit_tiny_patch16_224", pretrained=False))


def test_timm_weights_give_timm_outputs(theirs: nn.Module) -> None:
    space = load_space("vit-tiny")
    network = plain(space, space.smallest)
    network.load_state_dict(space.family.from_timm(theirs.state_dict()), strict=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(images), network.eval()(images)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_macs_and_params_are_those_of_timm(theirs: nn.Module) -> None:
    space, separate = load_space("vit-tiny"), timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    for module in separate.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore imports and traces through what torch calls deprecated
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(separate, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
        counted = analysis.uncalled_modules_warnings(False).tracer_warnings("none").by_operator()
    costs = arch_costs(space, space.smallest)
    assert costs["macs"] == sum(counted[name] for name in OPERATORS)
    assert costs["params"] == sum(parameter.numel() for parameter in theirs.parameters())


def test_a_warm_start_from_timm_is_that_network(theirs: nn.Module) -> None:
    definition = {**read(find("spaces", "vit-tiny")), "depth": [6, 12], "mlp_ratio": [2.0, 4.0]}
    space = Space.from_definition(definition)
    supernet = Supernet(space)
    fill(supernet, donor_of_state(space, "timm:vit_tiny", space.family.from_timm(theirs.state_dict())))
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(images), supernet.extract(space.largest).eval()(images)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cls_token": None}, "'cls_token' is missing"),
        ({"dist_token": torch.zeros(1, 1, 192)}, "'dist_token' has no counterpart"),
        ({"blocks.0.ls1.gamma": torch.zeros(192)}, "'blocks.0.ls1.gamma' has no counterpart"),
        ({"pos_embed": torch.zeros(1, 198, 192)}, "a square grid"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(600, 192)}, "heads of head_dim 64"),
    ],
)
def test_weights_of_another_kind_are_refused(theirs: nn.Module, change: dict[str, Tensor | None], words: str) -> None:
    state = {name: value for name, value in {**theirs.state_dict(), **change}.items() if value is not None}
    with pytest.raises(InputError, match=words) as error:
        load_space("vit-tiny").family.from_timm(state)
    assert "\n" not in str(error.value)


# --- costs and export ---


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_costs_equal_fvcore(name: str) -> None:
    space, rng = load_space(name), np.random.default_rng(11)
    for arch in {space.smallest, space.largest, *(space.sample(rng) for _ in range(4))}:
        costs = arch_costs(space, arch)
        assert {name: costs[name] for name in ("macs", "params")} == recount(space, arch), arch


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in (MEAN, MEAN | {"class_token": False, "qkv_bias": False}))],
    ids=str,
)
@pytest.mark.parametrize("end", ["smallest", pytest.param("largest", marks=pytest.mark.slow)])
def test_the_graph_is_the_probe_and_its_peak_the_closed_form(changes: dict[str, Any], end: str, graph_shapes: Shapes) -> None:
    space = tiny(**changes)
    compare_with_export(space, getattr(space, end), graph_shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cifar-vit", *(pytest.param(name, marks=pytest.mark.nightly) for name in SPACES if name != "cifar-vit")]
)
@pytest.mark.parametrize("which", ["smallest", "largest", 0])
def test_the_graph_of_a_large_space_is_the_probe(name: str, which: str | int, graph_shapes: Shapes) -> None:
    space = load_space(name)
    arch = space.sample(np.random.default_rng(which)) if isinstance(which, int) else getattr(space, which)
    compare_with_export(space, arch, graph_shapes)


def compare_with_export(space: Space, arch: Arch, graph_shapes: Shapes) -> None:
    network, size, channels = shaken(as_trained(space, arch)), space.resolution(arch), space.family.in_channels
    model = to_onnx(network, channels=channels, resolution=size)
    assert not {"Shape", "Resize", "Expand"} & {node.op_type for node in model.graph.node}
    assert_probe_is_the_export(space, arch, model, graph_shapes)
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))
    run, images = OnnxRuntime().load(model.SerializeToString()), torch.randn(5, channels, size, size)
    for count in (1, 2, 5):
        with torch.no_grad():
            expected = network(images[:count]).numpy()
        np.testing.assert_allclose(run(images[:count].numpy()), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_a_probe_runs_and_its_numbers_stay_ordinary() -> None:
    space = tiny(pool="mean")
    for arch in (space.smallest, space.largest):
        size = space.resolution(arch)
        logits = OnnxRuntime().load(probe(space, arch))(
            np.random.default_rng(3).standard_normal((2, 1, size, size), np.float32)
        )
        assert logits.shape == (2, 3) and np.isfinite(logits).all() and logits.any()


# --- positions ---


@pytest.mark.parametrize("resolution", [4, 8, 12, 20])
@pytest.mark.parametrize("class_token", [True, False])
def test_a_baked_child_equals_one_that_interpolates(resolution: int, class_token: bool) -> None:
    space = tiny(resolution=[4, 8, 12, 20], class_token=class_token, pool="mean")
    supernet = shaken(Supernet(space))
    assert isinstance(supernet, Supernet)
    arch = space.arch({**space.largest.as_dict(), "resolution": resolution})
    images = torch.randn(3, 1, resolution, resolution, generator=torch.Generator().manual_seed(1))
    extracted, child = supernet.extract(arch), supernet.child(arch)
    position = extracted.get_parameter("embed.position")
    assert position.shape == (8, resolution // 2, resolution // 2) and position.requires_grad
    assert supernet.get_parameter("embed.position").shape == (8, 10, 10)
    assert torch.equal(extracted(images), child(images))
    assert arch_costs(space, arch)["params"] == sum(parameter.numel() for parameter in extracted.parameters())


def test_a_smaller_grid_reads_positions_that_cover_the_whole_image() -> None:
    """Of a map that rises linearly from left to right the small grid sees the same rise, not the central window."""
    space = tiny(resolution=[8, 16])
    embed = plain(space, space.largest)[0]
    assert isinstance(embed, Embed)
    ramp = torch.linspace(-1, 1, 8).expand(8, 8, 8)
    embed.position.data = ramp.clone()
    small = embed.positions(4)
    assert small.shape == (8, 4, 4)
    torch.testing.assert_close(small, interpolate(ramp[None], (4, 4), mode="bicubic", antialias=True)[0])
    torch.testing.assert_close(small[0, 0], torch.tensor([-0.857, -0.286, 0.286, 0.857]), atol=0.08, rtol=0)
    assert embed.positions(8) is embed.position


def test_the_class_token_is_the_first_row_and_the_others_are_patches() -> None:
    embed = shaken(plain(tiny(), tiny().largest)[0])
    assert isinstance(embed, Embed) and embed.class_token is not None and embed.class_position is not None
    images = torch.randn(2, 1, 8, 8)
    tokens = embed(images)
    assert tokens.shape == (2, 17, 8)
    torch.testing.assert_close(tokens[:, 0], (embed.class_token + embed.class_position).expand(2, -1))
    patch = embed.patches(images)[:, :, 2, 3] + embed.position[:, 2, 3]
    torch.testing.assert_close(tokens[:, 1 + 2 * 4 + 3], patch)


# --- heads ---


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_fewer_heads_are_the_first_ones(heads: int) -> None:
    """Against attention written out over weights in the usual order, ({q, k, v}, head, head_dim), whose first heads are taken."""
    width, head_dim, most = 6, 4, 3
    space = tiny(embed_dim=[width], heads=[1, 2, 3], head_dim=head_dim, depth=[1])
    supernet = shaken(Supernet(space))
    assert isinstance(supernet, Supernet)
    child = supernet.child(space.arch({**space.largest.as_dict(), "layer1.heads": heads})).get_submodule("layer1.attention")
    assert isinstance(child, Attention) and child.qkv.weight.shape == (heads * 3 * head_dim, width)
    stored = supernet.get_parameter("layer1.attention.qkv.weight"), supernet.get_parameter("layer1.attention.qkv.bias")
    usual = [value.unflatten(0, (most, 3, head_dim)).transpose(0, 1)[:, :heads] for value in stored]
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    q, k, v = (torch.einsum("ntd,hcd->nhtc", x, usual[0][at]) + usual[1][at][None, :, None] for at in range(3))
    weights = torch.einsum("nhtc,nhsc->nhts", q, k).div(head_dim**0.5).softmax(-1)
    mixed = torch.einsum("nhts,nhsc->nthc", weights, v).flatten(2)
    proj = supernet.get_submodule("layer1.attention.proj")
    expected = mixed @ proj.get_parameter("weight")[:, : heads * head_dim].T + proj.get_parameter("bias")
    torch.testing.assert_close(child(x), expected)


def test_what_reads_the_network_sees_the_same_attention() -> None:
    attention = shaken(LayerSpec(8, 2, 4, 16, True, True, in_size=3).build().get_submodule("attention"))
    x = torch.randn(2, 10, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is what torch calls deprecated
        traced = torch.jit.trace(attention, x)
    torch.testing.assert_close(traced(x), attention(x))


# --- spaces ---


def test_choices_are_made_per_layer_or_for_the_network() -> None:
    mixed = tiny(chosen_per={"heads": "network", "mlp_ratio": "block"})
    assert [dimension.name for dimension in mixed.dimensions] == [
        "resolution", "embed_dim", "depth", "heads", "layer1.mlp_ratio", "layer2.mlp_ratio",
    ]  # fmt: skip
    assert mixed.size == 2 * 2 * 2 * (2 + 4)
    assert tiny().size == 2 * 2 * (2 * 2 + (2 * 2) ** 2)
    assert load_space("vit-tiny").size == 1


def test_an_entry_of_a_table_is_the_arch() -> None:
    space = tiny(resolution=[8])
    choices = space.family.from_table({"embed_dim": 8, "depth": 2, "heads": [1, 2], "mlp_ratio": [2, 1.0]})
    assert space.arch(choices).as_dict() == {
        "resolution": 8, "embed_dim": 8, "depth": 2, "layer1.heads": 1, "layer1.mlp_ratio": 2.0, "layer2.heads": 2,
        "layer2.mlp_ratio": 1.0,
    }  # fmt: skip
    network = tiny(resolution=[8], chosen_per={"heads": "network", "mlp_ratio": "network"})
    choices = network.family.from_table({"embed_dim": 6, "depth": 1, "heads": 2, "mlp_ratio": 2})
    assert network.arch(choices)["mlp_ratio"] == 2.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": None}, "'depth' is missing"),
        ({"heads": [1]}, "'heads' must be a list of depth = 2 numbers"),
        ({"heads": 2}, "'heads' must be a list of depth = 2 numbers"),
        ({"embed_dim": [8, 6]}, "'embed_dim' must be a positive number"),
        ({"heads": [1, "2"]}, "'heads' must be a positive number"),
        ({"depth": True}, "'depth' must be a positive number"),
    ],
)
def test_a_bad_entry_of_a_table_is_refused(change: dict[str, Any], words: str) -> None:
    entry = {"resolution": 8, "embed_dim": 8, "depth": 2, "heads": [1, 2], "mlp_ratio": [1.0, 2.0], **change}
    with pytest.raises(InputError, match=words) as error:
        tiny().family.from_table({key: value for key, value in entry.items() if value is not None})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": [4, 7]}, "resolution must be a multiple of patch_size 2, but got 7"),
        ({"resolution": [8, 4]}, "resolution.*smallest first"),
        ({"depth": [1, 101]}, "depth.*at most 100 layers"),
        ({"mlp_ratio": [2.0, 1.0]}, "mlp_ratio.*smallest first"),
        ({"mlp_ratio": []}, "mlp_ratio.*at least one"),
        ({"mlp_ratio": [0.0]}, "mlp_ratio"),
        ({"mlp_ratio": [float("nan")]}, "mlp_ratio"),
        ({"mlp_ratio": [True]}, "mlp_ratio.*not true or false"),
        ({"mlp_ratio": [1.0, 1.01]}, "mlp_ratio must make different hidden widths, but at embed_dim 6"),
        ({"mlp_ratio": [0.01]}, "mlp_ratio must make different hidden widths"),
        ({"head_dim": None}, "head_dim must be given where"),
        ({"head_dim": None, "embed_dim": [8]}, "head_dim must be given where"),
        ({"head_dim": None, "embed_dim": [8], "heads": [3]}, "3 does not divide 8"),
        ({"head_dim": 0}, "head_dim"),
        ({"class_token": False}, "pool: token needs the class token"),
        ({"pool": "max"}, "pool"),
        ({"chosen_per": {"heads": "stage"}}, "chosen_per.heads"),
        ({"heads": [0, 1]}, "heads"),
        ({"patch_size": None}, "patch_size"),
        ({"drop": 0.1}, "drop"),
    ],
)
def test_what_makes_no_network_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)


def test_a_fixed_width_and_number_of_heads_need_no_head_dim() -> None:
    space = tiny(head_dim=None, embed_dim=[8], heads=[2])
    assert plain(space, space.largest).get_parameter("layer1.attention.qkv.weight").shape == (24, 8)


def test_rows_describe_every_layer() -> None:
    space = tiny()
    rows = space.family.rows({dimension.name: dimension.choices for dimension in space.dimensions})
    assert [row["block"] for row in rows] == ["embed", "layer1", "layer2", "head"]
    assert rows[2] == {
        "block": "layer2", "kind": "attention, MLP (optional)", "in_size": [2, 4], "embed_dim": (6, 8), "heads": (1, 2),
        "mlp_ratio": (1.0, 2.0),
    }  # fmt: skip


def test_initial_values_keep_the_scale_of_tokens_and_show_their_positions() -> None:
    supernet = Supernet(load_space("vit-tiny"))
    expected = {
        "layer3.attention.qkv.weight": (2 / (192 + 576)) ** 0.5, "layer1.project.weight": (2 / (192 + 768)) ** 0.5,
        "embed.patches.weight": (3 * 16 * 16) ** -0.5, "embed.position": 0.5, "embed.class_token": 0.02,
        "embed.class_position": 0.02,
    }  # fmt: skip
    for name, deviation in expected.items():
        value = supernet.get_parameter(name).detach()
        assert float(value.std()) == pytest.approx(deviation, rel=0.05 if value.dim() > 1 else 0.2), name
        assert abs(float(value.mean())) < 0.2 * deviation, name
    tokens = supernet.child(supernet.space.largest)[0](torch.randn(2, 3, 224, 224)).detach()
    assert float((tokens[:, 1:] - supernet.get_parameter("embed.position").detach().flatten(1).T).std()) == pytest.approx(
        1, rel=0.1
    )
