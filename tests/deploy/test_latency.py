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

from deploy.latency import UPPER, LatencyModel, profile
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


def predicted(model: LatencyModel, space: Space, count: int = 300, seed: int = 9) -> tuple[Any, Any]:
    """Predictions for random archs, and what the law says."""
    costs, codes = Costs(space), space.sample_codes(count, np.random.default_rng(seed))
    features = costs.features(codes)
    law = CONSTANT_MS + features @ np.array([LAW.get(name, 0.0) for name in costs.feature_names])
    return model.predict(features), law


def test_the_features_of_a_child_are_those_of_its_graph(features_of: Callable[[onnx.ModelProto], Counter[str]]) -> None:
    from deploy.probe import probe

    space, rng = load_space("digits"), np.random.default_rng(0)
    costs = Costs(space)
    for arch in [space.smallest, space.largest, *(space.sample(rng) for _ in range(4))]:
        counted = features_of(onnx.load_model_from_string(probe(space, arch)))
        closed = dict(zip(costs.feature_names, costs.features(space.encode([arch]))[0], strict=True))
        assert {name: value for name, value in closed.items() if value} == {
            name: value for name, value in counted.items() if value
        }


def test_latency_that_follows_the_model_is_predicted_within_1_percent(fake_target: Any, lawful: Any) -> None:
    space = load_space("digits")
    model = profile(space, fake_target(lawful))
    found, law = predicted(model, space)
    assert np.abs(found / law - 1).max() < 0.01
    assert model.mape < 0.01
    assert 1 <= model.upper_factor < 1.01
    assert min(model.coefficients) >= 0


def test_the_ends_are_measured_and_the_rest_is_spread_over_the_range(fake_target: Any, lawful: Any) -> None:
    space, target = load_space("digits"), fake_target(lawful)
    model = profile(space, target, children=20)
    keys = [row[0] for row in model.measured]
    assert keys[:2] == [space.smallest.key, space.largest.key]
    assert len(set(keys)) == len(keys) == 20 == sum(target.measured)
    times = sorted(row[2] for row in model.measured)
    assert max(later / earlier for earlier, later in itertools.pairwise(times)) < 1.6
    assert (model.smallest_ms, model.largest_ms) == (model.measured[0][3], model.measured[1][3])
    assert model.smallest_ms < model.largest_ms


def test_a_child_left_out_does_not_help_to_predict_itself(fake_target: Any, lawful: Any) -> None:
    space = load_space("digits")
    expected = profile(space, fake_target(lawful)).measured[1][2]

    def largest_is_odd(graph: onnx.ModelProto) -> float:
        usual = lawful(graph)
        return usual * 3 if usual == pytest.approx(expected) else usual

    odd = profile(space, fake_target(largest_is_odd))
    _, guess, measured, _ = odd.measured[1]
    assert measured == pytest.approx(3 * expected)
    assert guess == pytest.approx(expected, rel=0.02)  # what the others say
    assert odd.mape > (2 / 3) / len(odd.measured)


@pytest.mark.parametrize("sigma", [0.03, 0.2])
def test_the_reported_error_is_that_on_children_never_measured(fake_target: Any, lawful: Any, sigma: float) -> None:
    space, rng = load_space("digits"), np.random.default_rng(4)
    model = profile(space, fake_target(lambda graph: lawful(graph) * math.exp(sigma * rng.standard_normal())))
    found, law = predicted(model, space)
    fresh = law * np.exp(sigma * rng.standard_normal(len(law)))
    error = float(np.mean(np.abs(found / fresh - 1)))
    assert model.mape == pytest.approx(error, rel=0.5)
    assert 0.5 * sigma < model.mape < 2 * sigma


@pytest.mark.parametrize("children", [8, 13, 40])
def test_the_upper_factor_covers_most_of_the_children_left_out(fake_target: Any, lawful: Any, children: int) -> None:
    rng = np.random.default_rng(5)
    model = profile(
        load_space("digits"), fake_target(lambda graph: lawful(graph) * rng.uniform(1, 1.5)), children=children
    )  # fmt: skip
    covered = [measured <= guess * model.upper_factor * (1 + 1e-12) for _, guess, measured, _ in model.measured]
    assert np.mean(covered) >= UPPER
    assert model.upper_factor >= 1


@pytest.mark.parametrize("changes, archs", [({}, 1), ({"resolution": [12, 16]}, 2), ({"width": [8, 16], "depth": [1, 2]}, 4)])
def test_spaces_of_few_archs_are_measured_whole(
    small_space: Any, fake_target: Any, lawful: Any, changes: dict[str, Any], archs: int
) -> None:
    space = small_space(**changes)
    assert space.size == archs
    model = profile(space, fake_target(lawful))
    assert len(model.measured) == archs
    codes = space.encode([space.smallest, space.largest])
    assert model.predict(Costs(space).features(codes)) == pytest.approx(
        [model.measured[0][2], model.measured[min(1, archs - 1)][2]], rel=0.05
    )
    assert math.isfinite(model.mape) and math.isfinite(model.upper_factor)
    assert model.largest_ms >= model.smallest_ms


def test_the_same_measurements_give_the_same_model(fake_target: Any, lawful: Any) -> None:
    space = load_space("digits")
    one, other = (profile(space, fake_target(lawful), children=12, seed=3) for _ in range(2))
    assert one == other
    assert profile(space, fake_target(lawful), children=12, seed=4).measured != one.measured


# --- the file ---


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits")


@pytest.fixture(scope="module")
def fitted(space: Space) -> LatencyModel:
    names = Costs(space).feature_names
    target = {
        "processor": "none",
        "cores": 1,
        "runtime": "fake 1",
        "threads": 1,
        "precision": "fp32",
        "batch": 1,
        "hash": "fake",
    }
    rows = (("a" * 12, 0.1 + 0.2, 1 / 3, 0.34), ("b" * 12, 2.5, 2.0, 2.125))
    return LatencyModel(space.key, target, names, tuple(0.1 * i / 3 for i in range(len(names) + 1)), rows, 0.34, 2.125, 1.1)


def test_a_model_comes_back_from_its_file_to_the_last_digit(
    fitted: LatencyModel, space: Space, fake_target: Any, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "latency.json")
    assert LatencyModel.load(tmp_path / "latency.json", space, fake_target()) == fitted


@pytest.mark.parametrize("change", ["classes", "target", "space"])
def test_a_model_of_another_space_or_machine_is_refused(
    fitted: LatencyModel, fake_target: Any, tmp_path: Path, change: str
) -> None:  # fmt: skip
    path = tmp_path / "latency.json"
    fitted.save(path)
    space = {"classes": load_space("digits", classes=3), "space": load_space("cifar-mbconv")}.get(change, load_space("digits"))
    target = fake_target(label="another") if change == "target" else fake_target()
    with pytest.raises(InputError, match="measured for another space, machine, runtime or number of threads: remove it"):
        LatencyModel.load(path, space, target)


def without(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != name}


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda value: {**value, "format": 2},
    "no format": lambda value: without(value, "format"),
    "a list": lambda value: [value],
    "null": lambda value: None,
    "a key too many": lambda value: {**value, "extra": 1},
    "no coefficients": lambda value: without(value, "coefficients"),
    "no mape": lambda value: without(value, "mape"),
    "fewer coefficients": lambda value: {**value, "coefficients": value["coefficients"][:-1]},
    "coefficients of text": lambda value: {**value, "coefficients": ["0.1"] * len(value["coefficients"])},
    "a coefficient below 0": lambda value: {**value, "coefficients": [-1.0, *value["coefficients"][1:]]},
    "a coefficient that is no number": lambda value: {**value, "coefficients": [math.nan, *value["coefficients"][1:]]},
    "coefficients that are a number": lambda value: {**value, "coefficients": 3},
    "features in another order": lambda value: {**value, "feature_names": value["feature_names"][::-1]},
    "a feature missing": lambda value: {**value, **{name: value[name][1:] for name in ("feature_names", "coefficients")}},
    "nothing measured": lambda value: {**value, "measured": []},
    "a short row": lambda value: {**value, "measured": [["a", 1.0]]},
    "a row of text": lambda value: {**value, "measured": [["a", "1", "2", "3"]]},
    "a row that is a number": lambda value: {**value, "measured": [3]},
    "an infinite factor": lambda value: {**value, "upper_factor": math.inf},
    "no smallest": lambda value: {**value, "smallest_ms": None},
    "a target of text": lambda value: {**value, "target": "local"},
    "a target that is a list": lambda value: {**value, "target": []},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_its_name_and_a_remedy(
    fitted: LatencyModel, space: Space, fake_target: Any, tmp_path: Path, damage: str
) -> None:  # fmt: skip
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(DAMAGE[damage](json.loads(json.dumps(fitted.to_json_dict())))))
    with pytest.raises(InputError, match=r"latency\.json.*remove"):
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
        replace(fitted, upper_factor=math.inf).save(tmp_path / "latency.json")
    assert list(tmp_path.iterdir()) == []
