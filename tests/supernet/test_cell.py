"""Cells: which codes are networks, which are the same one, what a cell computes, and that all of it trains, costs and exports."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.export import to_onnx
from deploy.ship import ship
from search.loop import Asked, search
from search.settings import SearchConfig
from supernet.arch import Arch, Choice
from supernet.costs import METRICS, Costs, arch_costs
from supernet.errors import InputError
from supernet.families.cell import CELLS, networks_of
from supernet.families.cell_blocks import NO_PATH, OPERATIONS, CellSpec, pairs, steps_of
from supernet.model import Supernet, plain
from supernet.operations import cost_of
from supernet.sandwich import sandwich, step_rng
from supernet.space import Space, load_space
from supernet.start import start
from supernet.train import train
from tests.deploy.conftest import as_trained
from tests.deploy.test_peak_memory import peak_bytes
from tests.deploy.test_probe import assert_probe_is_the_export

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]
TINY: dict[str, Any] = {
    "format": 1, "name": "tiny-cell", "family": "cell", "in_channels": 1, "classes": 3, "resolution": [6, 8], "stem": {"width": [4, 6]},
    "stages": 2, "depth": [1, 2], "nodes": 3, "head": {"width": 8},
}  # fmt: skip
SPACE = load_space("cell")


@pytest.fixture(scope="module")
def tiny() -> Space:
    return Space.from_definition(TINY)


def cells_of(nodes: int) -> list[tuple[str, ...]]:
    """Every code of one cell."""
    return list(itertools.product(OPERATIONS, repeat=len(pairs(nodes))))


def choices_with(space: Space, cell: str, operations: tuple[str, ...]) -> dict[str, Choice]:
    """The smallest arch with other operations in one kind of cell."""
    names = [dimension.name for dimension in space.dimensions if dimension.name.startswith(f"{cell}.")]
    return space.smallest.as_dict() | dict(zip(names, operations, strict=True))


def codes_of(space: Space, choices: Mapping[str, Choice]) -> np.ndarray:
    return np.array([[dimension.choices.index(choices[dimension.name]) for dimension in space.dimensions]])


def connected(nodes: int, operations: tuple[str, ...]) -> bool:
    """Whether a search from node 0 finds the last node."""
    found, todo = {0}, [0]
    while todo:
        here = todo.pop()
        for (source, target), name in zip(pairs(nodes), operations, strict=True):
            if source == here and name != "none" and target not in found:
                found.add(target)
                todo.append(target)
    return nodes - 1 in found


# --- which codes are networks, and which are the same ---


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_a_network_where_a_plain_search_reaches_its_output(tiny: Space, cell: str) -> None:
    for operations in cells_of(3):
        choices = choices_with(tiny, cell, operations)
        assert tiny.valid(codes_of(tiny, choices))[0] == connected(3, operations), operations
        if not connected(3, operations):
            with pytest.raises(InputError, match="no path from its input to its output"):
                tiny.arch(choices)


@pytest.mark.parametrize("cell", CELLS)
def test_equal_keys_are_equal_modules_for_all_codes_of_three_nodes(tiny: Space, cell: str) -> None:
    keys: dict[str, set[str]] = {}
    for operations in cells_of(3):
        if connected(3, operations):
            arch = tiny.arch(choices_with(tiny, cell, operations))
            keys.setdefault(repr(plain(tiny, arch)), set()).add(arch.key)
    assert all(len(same) == 1 for same in keys.values())
    assert len(set().union(*keys.values())) == len(keys) == networks_of(3) == 84


def test_equal_keys_are_equal_modules_for_codes_of_four_nodes() -> None:
    rng, cells = np.random.default_rng(0), [each for each in cells_of(4) if each.count("none") > 2 and connected(4, each)]
    keys: dict[str, set[str]] = {}
    drawn = rng.choice(len(cells), size=400, replace=False).tolist()
    for position in drawn:
        arch = SPACE.arch(choices_with(SPACE, "normal", cells[position]))
        with torch.device("meta"):
            keys.setdefault(repr(SPACE.plan(arch)["stage1_0"].build()), set()).add(arch.key)
    assert all(len(same) == 1 for same in keys.values())
    assert len(set().union(*keys.values())) == len(keys) < len(drawn)  # some were the same


def test_the_cells_of_the_benchmark_are_counted_once_each() -> None:
    """15,625 codes; 9,444 cells that differ in what lies on a path."""
    codes = np.tile(SPACE.encode([SPACE.smallest]), (15_625, 1))
    codes[:, -6:] = list(itertools.product(range(5), repeat=6))
    assert len(np.unique(SPACE.canonical(codes[SPACE.valid(codes)]), axis=0)) == networks_of(4) == 9_444


def test_the_size_of_a_space_is_the_number_of_its_canonical_codes(tiny: Space) -> None:
    codes = np.array(list(itertools.product(*(range(len(dimension.choices)) for dimension in tiny.dimensions))))
    different = np.unique(tiny.canonical(codes[tiny.valid(codes)]), axis=0)
    assert tiny.size == len(different) == 2 * 2 * 2 * 2 * 84 * 84
    assert (tiny.canonical(different) == different).all()


def test_a_dead_end_is_none(tiny: Space) -> None:
    arch = tiny.arch(choices_with(tiny, "normal", ("conv_3x3", "skip", "none")))  # node 1 leads nowhere
    assert arch == tiny.arch(choices_with(tiny, "normal", ("none", "skip", "none"))) == tiny.smallest
    arch = tiny.arch(choices_with(tiny, "reduction", ("none", "skip", "conv_3x3")))  # nothing comes into node 1
    assert arch == tiny.smallest


def test_a_cell_without_a_path_is_not_built() -> None:
    spec = CellSpec(4, 3, ("none",) * 3, False, in_size=8)
    assert spec.cost().macs == spec.cost().peak_memory_bytes == 0
    with pytest.raises(InputError, match="no path"):
        spec.build()
    assert "\n" not in NO_PATH


# --- what a cell computes ---


def reference(spec: CellSpec, block: nn.Module, x: Tensor) -> Tensor:
    """A cell by its definition, every edge by itself, from the weights of `block` (batch statistics)."""
    weights = dict(block.named_parameters())

    def convolved(value: Tensor, path: str, stride: int) -> Tensor:
        kernel = weights[f"{path}.conv.weight"]
        value = F.conv2d(value, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return F.batch_norm(value, None, None, weights[f"{path}.norm.weight"], weights[f"{path}.norm.bias"], training=True)

    def edge(name: str, path: str, value: Tensor, halves: bool) -> Tensor:
        stride = 2 if halves else 1
        if name.startswith("conv"):
            return convolved(value.relu(), path, stride)
        if name == "avg_pool_3x3":
            value = F.avg_pool2d(value, 3, stride, 1, count_include_pad=False)
        elif halves:
            value = F.avg_pool2d(value, 2)
        return convolved(value, f"{path}.widen", 1) if halves else value

    def node(number: int) -> Tensor:
        if number == 0:
            return x
        incoming = [(each[0], name) for each, name in zip(pairs(spec.nodes), spec.edges, strict=True)
                    if each[1] == number and name != "none"]  # fmt: skip
        return torch.stack([
            edge(name, f"edges.{source}_{number}.{name}", node(source), spec.reduction and source == 0) for source, name in incoming
        ]).sum(0)  # fmt: skip

    return node(spec.nodes - 1)


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_cell_is_the_sum_over_its_edges_node_by_node(seed: int, reduction: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    arch = SPACE.sample(np.random.default_rng(seed))
    spec = SPACE.plan(arch)["reduction1" if reduction else "stage1_0"]
    assert isinstance(spec, CellSpec)
    block = spec.build().double()
    for parameter in block.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(3, spec.in_width, 8, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(block(x), reference(spec, block, x))


def test_a_child_holds_the_chosen_operations_and_no_others(tiny: Space) -> None:
    arch = tiny.arch(choices_with(tiny, "normal", ("conv_3x3", "avg_pool_3x3", "conv_1x1")))
    names = {name for name, _ in Supernet(tiny).child(arch).named_parameters() if name.startswith("stage1_0.")}
    paths = ("edges.0_1.conv_3x3", "edges.1_2.conv_1x1")
    assert names == {f"stage1_0.{path}.{name}" for path in paths for name in ("conv.weight", "norm.weight", "norm.bias")}


def test_the_store_has_the_weights_of_every_operation_of_every_edge(tiny: Space) -> None:
    names = {name.rpartition(".")[0] for name, _ in Supernet(tiny).named_parameters()}
    for edge in ("0_1", "0_2", "1_2"):
        assert {f"stage2_1.edges.{edge}.{name}.conv" for name in ("conv_1x1", "conv_3x3")} <= names
        widened = {f"reduction1.edges.{edge}.{name}.widen.conv" for name in ("skip", "avg_pool_3x3")}
        assert widened <= names if edge.startswith("0") else not widened & names


@pytest.mark.slow
@pytest.mark.parametrize(("children", "steps"), [(4, 20), (7, 8)])
def test_every_operation_of_every_edge_gets_its_turn_within_a_few_steps(tiny: Space, children: int, steps: int) -> None:
    supernet = Supernet(tiny, seed=0)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        for _, arch in sandwich(tiny, children, step_rng(0, step)):
            size = tiny.resolution(arch)
            F.cross_entropy(supernet.child(arch)(images[..., :size, :size]), torch.tensor([0, 1, 2, 0])).backward()
    untouched = [name for name, value in supernet.named_parameters() if value.grad is None or not value.grad.any()]
    assert not untouched


def test_every_operation_of_the_shipped_space_is_trained_within_an_epoch() -> None:
    names = [d.name for d in SPACE.dimensions if not d.ordered]
    missing = {(name, operation) for name in names for operation in OPERATIONS[1:]}
    for step in range(40):
        for _, arch in sandwich(SPACE, 4, step_rng(0, step)):
            missing -= {(name, arch[name]) for name in names}
    assert not missing


def test_what_two_edges_would_compute_alike_is_computed_once() -> None:
    """Node 0 is pooled once and rectified once; node 2 is node 0 again (skip), so nothing of it is computed anew."""
    edges = ("avg_pool_3x3", "skip", "none", "conv_1x1", "conv_3x3", "avg_pool_3x3")
    names = [step.name for step in steps_of(4, edges, False)]
    assert names == ["avg_pool_3x3", "relu", "conv_1x1", "relu", "conv_3x3", "add", "add"]
    reduced = [step.name for step in steps_of(3, ("skip", "skip", "skip"), True)]
    assert reduced == ["skip", "widen", "widen", "add"]


# --- costs ---


@pytest.mark.parametrize("reduction", [False, True])
def test_the_quick_count_of_a_cell_is_the_one_operator_by_operator(reduction: bool) -> None:
    rng = np.random.default_rng(5)
    for _ in range(150):
        nodes = int(rng.integers(2, 6))
        edges = tuple(rng.choice(OPERATIONS, size=len(pairs(nodes))).tolist())
        if not connected(nodes, edges):
            continue
        width, size = int(rng.integers(1, 70)), int(rng.integers(3, 40))
        spec = CellSpec(width, nodes, pruned(nodes, edges), reduction, in_size=size)
        assert spec.cost() == cost_of(spec.operations()), spec


def pruned(nodes: int, edges: tuple[str, ...]) -> tuple[str, ...]:
    """Edges on a path: those that the input leads to, and that lead to the output."""
    there = {pair for pair, name in zip(pairs(nodes), edges, strict=True) if name != "none"}
    return tuple(
        name if pair in there and leads(there, 0, pair[0]) and leads(there, pair[1], nodes - 1) else "none"
        for pair, name in zip(pairs(nodes), edges, strict=True)
    )


def leads(edges: set[tuple[int, int]], source: int, target: int) -> bool:
    return source == target or any(leads(edges, after, target) for before, after in edges if before == source)


def _peaks(nodes: int, reduction: bool, cells: list[tuple[str, ...]]) -> list[int]:
    return [CellSpec(8, nodes, edges, reduction, in_size=8).cost().peak_memory_bytes for edges in cells]


@pytest.mark.parametrize("nodes", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_up_to_four_nodes_no_cell_holds_more_memory_than_the_teachers(nodes: int) -> None:
    """What `bounded` says. The first stage's normal cell decides: reduction cells stay below it."""
    cells = [edges for edges in cells_of(nodes) if connected(nodes, edges) and pruned(nodes, edges) == edges]
    teacher = _peaks(nodes, False, [("conv_3x3",) * len(pairs(nodes))])[0]
    assert len(cells) == networks_of(nodes)
    assert max(_peaks(nodes, False, cells)) == teacher >= max(_peaks(nodes, True, cells))


def test_with_five_nodes_some_cell_holds_more_memory_than_the_teachers() -> None:
    rng = np.random.default_rng(0)
    cells = [tuple(rng.choice(OPERATIONS[1:], size=10).tolist()) for _ in range(500)]
    assert max(_peaks(5, False, cells)) > _peaks(5, False, [("conv_3x3",) * 10])[0]
    assert "peak_memory_bytes" not in Space.from_definition({**TINY, "nodes": 5}).family.bounded


def test_the_smallest_skips_and_its_normal_cells_cost_nothing() -> None:
    plan = SPACE.plan(SPACE.smallest)
    assert plan["stage2_0"].cost().macs == plan["stage2_0"].cost().params == 0
    assert plan["stage2_0"].operations().listed == []
    assert all(SPACE.largest[f"{cell}.edge0_1"] == "conv_3x3" for cell in CELLS)


def test_costs_of_many_archs_are_those_of_each_and_are_kept() -> None:
    costs, codes = Costs(SPACE), SPACE.sample_codes(2_000, np.random.default_rng(2))
    found = costs.all(codes)
    assert all((costs.all(codes)[name] == found[name]).all() for name in METRICS)
    for position in (0, 17, 1_999):
        arch = SPACE.decode(codes[position : position + 1])[0]
        assert arch_costs(SPACE, arch) == {name: int(values[position]) for name, values in found.items()}


# --- export ---


def _archs(space: Space) -> list[Any]:
    rng = np.random.default_rng(4)
    return [space.smallest, space.largest, *(space.sample(rng) for _ in range(6))]


def _exported(space: Space, arch: Arch) -> onnx.ModelProto:
    return to_onnx(as_trained(space, arch), channels=space.family.in_channels, resolution=space.resolution(arch))


@pytest.mark.parametrize("which", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2, 3))])
def test_probe_and_peak_memory_are_those_of_the_export(tiny: Space, which: int, graph_shapes: Shapes) -> None:
    arch = _archs(tiny)[which]
    model = _exported(tiny, arch)
    assert_probe_is_the_export(tiny, arch, model, graph_shapes)
    assert arch_costs(tiny, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


@pytest.mark.slow
@pytest.mark.parametrize("which", range(8))
def test_probe_and_peak_memory_of_the_shipped_space_are_those_of_the_export(which: int, graph_shapes: Shapes) -> None:
    arch = _archs(SPACE)[which]
    model = _exported(SPACE, arch)
    assert_probe_is_the_export(SPACE, arch, model, graph_shapes)
    assert arch_costs(SPACE, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


@pytest.mark.slow
def test_skips_that_meet_in_a_node_are_one_value_read_twice(tiny: Space, graph_shapes: Shapes) -> None:
    """Skips of skips: the sum adds a value to itself."""
    arch = tiny.arch(choices_with(tiny, "normal", ("skip", "skip", "skip")))
    assert_probe_is_the_export(tiny, arch, _exported(tiny, arch), graph_shapes)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": [6, 9]}, "multiples of 2 .*got 9: use 8"),
        ({"resolution": [4, 6]}, "at least 3 pixels a side .*leaves 2: use at least 6"),
        ({"stages": 1}, "stages: .*greater than or equal to 2"),
        ({"stages": 7}, "stages: .*less than or equal to 6"),
        ({"nodes": 1}, "nodes: .*greater than or equal to 2"),
        ({"nodes": 7}, "nodes: .*less than or equal to 6"),
        ({"nodes": True}, "nodes: "),
        ({"depth": [2, 1]}, "depth: .*smallest first"),
        ({"depth": []}, "depth: .*at least one"),
        ({"depth": [51]}, "at most 50 normal cells"),
        ({"depth": [0, 1]}, "depth"),
        ({"stem": {"width": [8], "stride": 5}}, "stem.stride"),
        ({"stem": {}}, "stem.width: this key is required"),
        ({"head": {"width": [8]}}, "head.width"),
        ({"operations": ["skip"]}, "operations: unknown key"),
    ],
)
def test_a_space_that_makes_no_networks_is_one_line_with_key_and_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Space.from_definition({**copy.deepcopy(TINY), **change}, "my.yaml")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("my.yaml: ")


def test_an_operation_that_is_not_offered_is_refused(tiny: Space) -> None:
    with pytest.raises(InputError, match=r"normal.edge0_2 must be one of \['none', .*but got 'conv_5x5'"):
        tiny.arch(tiny.smallest.as_dict() | {"normal.edge0_2": "conv_5x5"})


def test_the_table_for_people_has_every_part_and_every_edge() -> None:
    rows = SPACE.family.rows({dimension.name: dimension.choices for dimension in SPACE.dimensions})
    assert [row["part"] for row in rows[:7]] == ["stem", "stage1", "reduction1", "stage2", "reduction2", "stage3", "head"]
    assert [row["in_size"] for row in rows[:7]] == [[24, 32], [12, 16], [12, 16], [6, 8], [6, 8], [3, 4], [3, 4]]
    assert len(rows) == 7 + 2 * 6


# --- the whole way ---


@pytest.mark.slow
def test_children_train_are_searched_and_ship_like_any_other(
    tmp_path: Path, small_search: SearchConfig, fake_target: Callable[[], Any]
) -> None:
    file = tmp_path / "digits-cell.yaml"
    file.write_text(yaml.safe_dump({**TINY, "name": "digits-cell", "classes": 10, "resolution": [8, 12], "stem": {"width": [8, 12]},
                                    "head": {"width": 32}}))  # fmt: skip
    run = start("digits", tmp_path / "run", space=str(file), recipe="digits", epochs=6).run
    train(run)
    ends = [arch_costs(run.space, arch)["macs"] for arch in (run.space.smallest, run.space.largest)]
    budget = sum(ends) // 2
    found = search(run, Asked((f"macs<={budget}",), settings=small_search, targets={None: fake_target()}))
    assert found.best.costs["macs"] <= budget
    assert found.best.estimate is not None and found.best.estimate.low > 0.15  # chance is 0.1; few children and 6 epochs
    bundle = ship(run, found.best.arch, tmp_path / "bundle", split="confirm")
    assert bundle.manifest["parity"]["agreement"] == 1.0
    assert bundle.manifest["macs"] == found.best.costs["macs"]
