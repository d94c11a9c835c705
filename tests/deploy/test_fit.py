"""Coefficients of a latency model: what is true is found, what does not help is left out, and few children are no licence."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.fit import BASE, START, Floats, fit, predicted

MANY, FEW = 400, 20


def columns_of(rng: np.random.Generator, count: int) -> dict[str, Floats]:
    """Children of very different sizes: what their blocks took, their nodes, blocks, macs and two operators."""
    size = np.exp(rng.uniform(0, 3, count))
    nodes, conv, depthwise = (
        rng.integers(20, 90, count).astype(float),
        size * rng.uniform(0.8, 1.2, count),
        rng.uniform(1, 9, count),
    )
    return {
        "constant": np.ones(count), "block_ms": 0.4 * conv + 0.3 * depthwise + 0.002 * nodes, "nodes": nodes,
        "blocks": np.round(nodes / 4), "macs": 1e6 * (conv + depthwise), "conv.macs": conv, "depthwise.macs": depthwise,
    }  # fmt: skip


def split(columns: dict[str, Floats], at: int) -> tuple[dict[str, Floats], dict[str, Floats]]:
    return {name: each[:at] for name, each in columns.items()}, {name: each[at:] for name, each in columns.items()}


def without_blocks(columns: dict[str, Floats]) -> dict[str, Floats]:
    return {name: each for name, each in columns.items() if name not in BASE[1:]}


@pytest.mark.parametrize("seed", range(5))
def test_a_sum_of_blocks_with_a_cost_a_node_is_found_from_20_children(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = columns_of(rng, MANY)
    times = 0.05 + 1.1 * columns["block_ms"] - 0.001 * columns["nodes"]
    known, others = split(columns, FEW)
    off = predicted(fit(known, times[:FEW]), others) / times[FEW:] - 1
    assert np.abs(off).mean() < 2e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_table_as_it_is_stays_as_it_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = columns_of(rng, FEW)
    found = fit(columns, columns["block_ms"])
    assert found["block_ms"] == pytest.approx(START["block_ms"], abs=1e-9)
    assert all(value == pytest.approx(0, abs=1e-9) for name, value in found.items() if name != "block_ms")


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_explained_by_more_columns(seed: int) -> None:
    """Errors of 5 % that nothing explains: the error on others is hardly more than theirs."""
    rng = np.random.default_rng(seed)
    columns = columns_of(rng, MANY)
    times = columns["block_ms"] * np.exp(0.05 * rng.standard_normal(MANY))
    known, others = split(columns, FEW)
    off = predicted(fit(known, times[:FEW]), others) / times[FEW:] - 1
    assert np.abs(off).mean() < 1.25 * 0.05 * np.sqrt(2 / np.pi)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_table_operators_are_told_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = without_blocks(columns_of(rng, MANY))
    times = 0.1 + 0.2 * columns["conv.macs"] + 0.9 * columns["depthwise.macs"]
    known, others = split(columns, FEW)
    found = fit(known, times[:FEW])
    assert np.abs(predicted(found, others) / times[FEW:] - 1).mean() < 1e-3
    assert min(found.values()) >= 0


@pytest.mark.parametrize("seed", range(3))
def test_where_macs_say_all_they_are_taken_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = without_blocks(columns_of(rng, FEW))
    times = (0.3 + 1e-7 * columns["macs"]) * np.exp(0.02 * rng.standard_normal(FEW))
    assert set(fit(columns, times)) == {"constant", "macs"}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_unit_of_time_changes_nothing_but_the_unit(scale: float) -> None:
    columns = columns_of(np.random.default_rng(3), FEW)
    times = columns["block_ms"] * np.exp(0.03 * np.random.default_rng(4).standard_normal(FEW))
    scaled = {**columns, "block_ms": scale * columns["block_ms"]}
    one, other = predicted(fit(columns, times), columns), predicted(fit(scaled, scale * times), scaled)
    np.testing.assert_allclose(other, scale * one, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_children_give_finite_coefficients(count: int) -> None:
    columns = columns_of(np.random.default_rng(5), count)
    found = fit(columns, columns["block_ms"] * 1.3)
    assert all(np.isfinite(value) for value in found.values())
    assert np.isfinite(predicted(found, columns)).all()
