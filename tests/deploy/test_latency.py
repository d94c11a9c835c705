"""The latency model: right where latency is what it assumes, honest about its error where it is not, and never used amiss."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.latency import COVERAGE, GATE, LatencyModel, Whole, signature, signatures
from deploy.probe import graph_of, probe
from deploy.profiling import profile
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import Space, load_space

LAW = {
    "conv.count": 2e-3,
    "conv.macs": 3e-8,
    "depthwise.macs": 2e-7,
    "linear.elements": 1e-6,
    "other.count": 1e-3,
    "other.elements": 4e-8,
}
"""Milliseconds for each call, multiply-accumulate and number moved."""
CONSTANT_MS = 0.02
KINDS = {"Conv": "conv", "Gemm": "linear"}


@pytest.fixture
def features_of(
    graph_shapes: Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]],
) -> Callable[[onnx.ModelProto], Counter[str]]:
    """Counts the features of a graph from the file alone."""

    def count(model: onnx.ModelProto) -> Counter[str]:
        shapes, constants = graph_shapes(model), {tensor.name for tensor in model.graph.initializer}
        features: Counter[str] = Counter()
        for node in model.graph.node:
            weights, made = shapes.get(next((name for name in node.input if name in constants), ""), ()), shapes[node.output[0]]
            kind = KINDS.get(node.op_type, "other")
            if kind == "conv" and shapes[node.input[0]][1] != weights[1]:
                kind = "depthwise"
            features[f"{kind}.count"] += 1
            features[f"{kind}.macs"] += 0 if kind == "other" else math.prod(weights) * math.prod(made[2:])
            features[f"{kind}.elements"] += math.prod(made) + sum(
                math.prod(shapes[name]) for name in node.input if name not in constants
            )
        return features

    return count


@pytest.fixture
def lawful(features_of: Callable[[onnx.ModelProto], Counter[str]]) -> Callable[[onnx.ModelProto], float]:
    """Milliseconds of a graph by `LAW`."""
    return lambda model: CONSTANT_MS + sum(LAW.get(name, 0.0) * value for name, value in features_of(model).items())


def by_law(space: Space, count: int = 300, seed: int = 9) -> tuple[Any, Any]:
    """Codes of random archs, and what the law says of them."""
    costs, codes = Costs(space), space.sample_codes(count, np.random.default_rng(seed))
    return codes, CONSTANT_MS + costs.features(codes) @ np.array([LAW.get(name, 0.0) for name in costs.feature_names])


def measured(model: LatencyModel) -> list[Whole]:
    """All whole children of a model."""
    return [*model.fitted, *(child for child in model.held_out if child not in model.fitted)]


def test_the_features_of_a_child_are_those_of_its_graph(features_of: Callable[[onnx.ModelProto], Counter[str]]) -> None:
    space, rng = load_space("digits"), np.random.default_rng(0)
    costs = Costs(space)
    for arch in [space.smallest, space.largest, *(space.sample(rng) for _ in range(4))]:
        counted = features_of(onnx.load_model_from_string(probe(space, arch)))
        closed = dict(zip(costs.feature_names, costs.features(space.encode([arch]))[0], strict=True))
        assert {name: value for name, value in closed.items() if value} == {
            name: value for name, value in counted.items() if value
        }


@pytest.mark.parametrize("name", ["digits", "cifar-resnet", "cifar-vit", "mlp", "autoencoder"])
def test_a_child_is_the_chain_of_the_blocks_that_the_table_holds(name: str) -> None:
    """So what blocks are timed by has the operators of the child (and the child's probe those of the export: test_probe.py)."""
    space = load_space(name)
    table, arch = signatures(space), space.sample(np.random.default_rng(1))
    assert table is not None
    chain = []
    for spec in space.plan(arch).values():
        assert table[signature(spec)] == spec
        chain += [node.op_type for node in onnx.load_model_from_string(graph_of([spec.operations()])).graph.node]
    assert chain == [node.op_type for node in onnx.load_model_from_string(probe(space, arch)).graph.node]


def test_a_space_of_too_many_blocks_has_no_table() -> None:
    assert signatures(load_space("cell")) is None


@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_latency_that_follows_the_model_is_predicted_within_1_percent(fake_target: Any, lawful: Any, blocks: bool) -> None:
    space = load_space("digits")
    model = profile(space, fake_target(lawful), blocks=blocks)
    codes, law = by_law(space)
    assert np.abs(model.on(Costs(space))(codes) / law - 1).max() < 0.01
    assert model.mape < 0.01 and model.spearman > 0.999 and model.trusted
    assert 1 <= model.upper_factor < 1.01
    assert bool(model.blocks) == blocks


def test_one_arch_is_predicted_as_many_are(fake_target: Any, lawful: Any) -> None:
    space = load_space("digits")
    model, rng = profile(space, fake_target(lawful), children=10, held_out=10, blocks=False), np.random.default_rng(2)
    archs = [space.sample(rng) for _ in range(5)]
    many = model.on(Costs(space))(space.encode(archs))
    assert many == pytest.approx([model.predict(space, arch) for arch in archs], rel=1e-12)


def test_the_ends_are_measured_and_the_rest_is_spread_over_the_range(fake_target: Any, lawful: Any) -> None:
    space, target = load_space("digits"), fake_target(lawful)
    model = profile(space, target, children=10, held_out=10, blocks=False)
    assert [child.key for child in model.fitted[:2]] == [space.smallest.key, space.largest.key]
    assert len({child.key for child in measured(model)}) == 20 and len(model.held_out) == 10
    times = sorted(child.latency_ms for child in measured(model))
    assert max(later / earlier for earlier, later in itertools.pairwise(times)) < 1.6
    assert (model.smallest_ms, model.largest_ms) == (model.fitted[0].high_ms, model.fitted[1].high_ms)


@pytest.mark.parametrize("sigma", [0.03, 0.2])
def test_the_reported_error_is_that_on_children_never_measured(fake_target: Any, lawful: Any, sigma: float) -> None:
    space, rng = load_space("digits"), np.random.default_rng(4)
    model = profile(
        space,
        fake_target(lambda graph: lawful(graph) * math.exp(sigma * rng.standard_normal())),
        children=40,
        held_out=40,
        blocks=False,
    )
    codes, law = by_law(space)
    fresh = law * np.exp(sigma * rng.standard_normal(len(law)))
    error = float(np.mean(np.abs(model.on(Costs(space))(codes) / fresh - 1)))
    assert model.mape == pytest.approx(error, rel=0.5)
    assert model.trusted == (model.mape <= GATE)


def held_out(ratios: Any) -> tuple[Whole, ...]:
    """Children that took so many times what was predicted."""
    return tuple(Whole({}, "", 1.0, float(ratio), float(ratio), float(ratio), True) for ratio in ratios)


@pytest.mark.parametrize("count", [10, 20, 50])
def test_the_predicted_interval_holds_children_like_those_held_out(fitted: LatencyModel, count: int) -> None:
    """Split conformal: at least `COVERAGE` over many draws, whatever the distribution."""
    rng, covered = np.random.default_rng(count), []
    for _ in range(400):
        *known, new = np.exp(0.1 * rng.standard_t(3, count + 1))
        model = replace(fitted, held_out=held_out(known))
        covered.append(model.lower_factor <= new <= model.upper_factor)
    assert np.mean(covered) >= COVERAGE - 0.03


def test_children_measured_later_take_the_models_error_out(fitted: LatencyModel, space: Space) -> None:
    rng = np.random.default_rng(0)
    archs = [space.sample(rng) for _ in range(9)]
    slow = {arch: (1.2 * fitted.predict(space, arch), 0.0, 0.0) for arch in archs}
    moved = fitted.corrected(space, slow)
    assert moved.predict(space, archs[0]) == pytest.approx(1.2**0.9 * fitted.predict(space, archs[0]))
    assert fitted.corrected(space, {}) == fitted


def test_a_model_that_is_off_says_of_which_operators(fake_target: Any, lawful: Any) -> None:
    space = load_space("digits")
    model, costs = profile(space, fake_target(lawful), blocks=False), Costs(space)
    column = costs.feature_names.index("depthwise.macs")

    def slow(child: Whole) -> Whole:
        macs = costs.features(space.encode([space.arch(dict(child.choices), "")]))[0, column]
        return replace(child, latency_ms=child.predicted_ms + 1e-6 * macs)

    off = replace(model, held_out=tuple(map(slow, model.held_out)))
    assert model.trusted and not off.trusted
    assert "children with more depthwise macs are slower than predicted" in off.suspect(space)


@pytest.mark.parametrize("changes, archs", [({}, 1), ({"resolution": [12, 16]}, 2), ({"width": [8, 16], "depth": [1, 2]}, 4)])
def test_spaces_of_few_archs_are_measured_whole(
    small_space: Any, fake_target: Any, lawful: Any, changes: dict[str, Any], archs: int
) -> None:
    space = small_space(**changes)
    assert space.size == archs
    model = profile(space, fake_target(lawful), blocks=False)
    assert len(measured(model)) == archs
    for child, arch in zip(model.fitted, (space.smallest, space.largest), strict=False):
        assert model.predict(space, arch) == pytest.approx(child.latency_ms, rel=0.05)
    assert math.isfinite(model.mape) and math.isfinite(model.upper_factor)
    assert model.largest_ms >= model.smallest_ms


def test_the_same_measurements_give_the_same_model(fake_target: Any, lawful: Any) -> None:
    space = load_space("digits")
    one, other = (profile(space, fake_target(lawful), children=6, held_out=6, seed=3, blocks=False) for _ in range(2))
    assert replace(one, minutes=0.0) == replace(other, minutes=0.0)
    assert profile(space, fake_target(lawful), children=6, held_out=6, seed=4, blocks=False).held_out != one.held_out


# --- the file ---


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits")


@pytest.fixture(scope="module")
def fitted(space: Space) -> LatencyModel:
    names = ("constant", *Costs(space).feature_names)
    target = {
        "processor": "none",
        "cores": 1,
        "runtime": "fake 1",
        "threads": 1,
        "precision": "fp32",
        "batch": 1,
        "hash": "fake",
    }
    rows = (Whole({"a": 1}, "a" * 12, 0.1 + 0.2, 1 / 3, 0.3, 0.34, True), Whole({}, "b" * 12, 2.5, 2.0, 1.9, 2.125, False))
    coefficients = {name: 1e-9 * place / 3 for place, name in enumerate(names, 1)}
    return LatencyModel(space.key, target, "2026-01-01", coefficients, {}, rows, rows, 1.25, 0.1)


def test_a_model_comes_back_from_its_file_to_the_last_digit(
    fitted: LatencyModel, space: Space, fake_target: Any, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "latency.json")
    assert LatencyModel.load(tmp_path / "latency.json", space, fake_target()) == fitted
    told = json.loads((tmp_path / "latency.json").read_text())["error"]
    assert told["mape"] == pytest.approx(fitted.mape) and told["worst"] == pytest.approx(0.2)


@pytest.mark.parametrize("change", ["classes", "target", "space"])
def test_a_model_of_another_space_or_machine_is_refused(
    fitted: LatencyModel, fake_target: Any, tmp_path: Path, change: str
) -> None:  # fmt: skip
    path = tmp_path / "latency.json"
    fitted.save(path)
    space = {"classes": load_space("digits", classes=3), "space": load_space("cifar-mbconv")}.get(change, load_space("digits"))
    target = fake_target(label="another") if change == "target" else fake_target()
    with pytest.raises(InputError, match=r"latency\.json was measured (for another space|elsewhere)"):
        LatencyModel.load(path, space, target)


def test_what_differs_from_the_device_that_was_measured_is_said(fitted: LatencyModel, space: Space, tmp_path: Path) -> None:
    fitted.save(tmp_path / "latency.json")
    here = {**fitted.target, "runtime": "fake 2", "precision": "int8"}
    with pytest.raises(InputError, match=r"precision is fp32 here and int8 there; runtime is fake 1 here and fake 2 there"):
        LatencyModel.load(tmp_path / "latency.json", space, here)


def without(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != name}


def child(value: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**value, "held_out": [{**value["held_out"][0], **changes}]}


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda value: {**value, "format": 1},
    "no format": lambda value: without(value, "format"),
    "a list": lambda value: [value],
    "null": lambda value: None,
    "a key too many": lambda value: {**value, "extra": 1},
    "no coefficients": lambda value: without(value, "coefficients"),
    "no error": lambda value: without(value, "error"),
    "no constant": lambda value: {**value, "coefficients": without(value["coefficients"], "constant")},
    "a coefficient of text": lambda value: {**value, "coefficients": {**value["coefficients"], "constant": "0.1"}},
    "a coefficient that is no number": lambda value: {**value, "coefficients": {**value["coefficients"], "constant": math.nan}},
    "a coefficient of nothing known": lambda value: {**value, "coefficients": {**value["coefficients"], "gpu.count": 1.0}},
    "coefficients that are a number": lambda value: {**value, "coefficients": 3},
    "a table of other blocks": lambda value: {**value, "blocks": {"Spec()": 1.0}},
    "a table of nothing": lambda value: {**value, "blocks": None},
    "nothing fitted": lambda value: {**value, "fitted": []},
    "nothing held out": lambda value: {**value, "held_out": []},
    "a child too short": lambda value: {**value, "held_out": [without(value["held_out"][0], "key")]},
    "a child of text": lambda value: child(value, latency_ms="1"),
    "a child that takes no time": lambda value: child(value, latency_ms=0.0),
    "a child that takes for ever": lambda value: child(value, predicted_ms=math.inf),
    "a child without choices": lambda value: child(value, choices=None),
    "a row that is a number": lambda value: {**value, "fitted": [3]},
    "no drift": lambda value: {**value, "drift": 0.0},
    "a target of text": lambda value: {**value, "target": "local"},
    "a target that is a list": lambda value: {**value, "target": []},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_its_name_and_a_remedy(
    fitted: LatencyModel, space: Space, fake_target: Any, tmp_path: Path, damage: str
) -> None:  # fmt: skip
    path = tmp_path / "latency.json"
    fitted.save(path)
    path.write_text(json.dumps(DAMAGE[damage](json.loads(path.read_text()))))
    with pytest.raises(InputError, match=r"latency\.json.*move it away"):
        LatencyModel.load(path, space, fake_target())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(space: Space, fake_target: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "latency.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"latency\.json cannot be read"):
        LatencyModel.load(path, space, fake_target())


def test_a_missing_file_is_an_input_error(space: Space, fake_target: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        LatencyModel.load(tmp_path / "none.json", space, fake_target())


def test_predictions_that_are_infinite_are_never_written(fitted: LatencyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(fitted, drift=math.inf).save(tmp_path / "latency.json")
    assert list(tmp_path.iterdir()) == []
