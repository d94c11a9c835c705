"""Costs against what was published, and against a table of exact integers that no change may move unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from supernet import config
from supernet.costs import METRICS, Costs, arch_costs
from supernet.space import load_space

GOLDEN = Path(__file__).parent.parent / "golden"
PUBLISHED = json.loads((GOLDEN / "published_models.json").read_text())
TABLE = json.loads((GOLDEN / "costs.json").read_text())


@pytest.mark.parametrize("entry", PUBLISHED["models"], ids=lambda entry: entry["id"])
def test_published_models_cost_what_was_published(entry: dict[str, Any]) -> None:
    space = load_space("attentivenas")
    costs = arch_costs(space, space.arch(space.family.from_table(entry)))
    assert abs(costs["macs"] / 1e6 - entry["mmacs"]) < 0.001
    assert abs(costs["macs"] / 1e6 - entry["published_mflops"]) <= 0.5
    assert round(costs["params"] / 1e6, 4) == entry["params_m"]


def test_the_ends_of_the_published_space_cost_what_was_published() -> None:
    space = load_space("attentivenas")
    assert abs(arch_costs(space, space.smallest)["macs"] / 1e6 - PUBLISHED["supernet"]["smallest_mmacs"]) < 0.001
    assert abs(arch_costs(space, space.largest)["macs"] / 1e6 - PUBLISHED["supernet"]["largest_mmacs"]) < 0.001


def test_every_shipped_space_has_its_row_in_the_table() -> None:
    assert sorted(TABLE) == config.names("spaces")


@pytest.mark.parametrize("name", sorted(TABLE))
def test_costs_are_the_integers_of_the_table(name: str) -> None:
    space, golden = load_space(name), TABLE[name]
    archs = [space.arch(dict(zip(golden["dimensions"], row["choices"], strict=True))) for row in golden["archs"]]
    expected = [{metric: row[metric] for metric in METRICS} for row in golden["archs"]]
    assert [arch_costs(space, arch) for arch in archs] == expected
    at_once = Costs(space).all(space.encode(archs))
    assert {metric: values.tolist() for metric, values in at_once.items()} == {
        metric: [row[metric] for row in expected] for metric in METRICS
    }
    assert archs[:2] == [space.smallest, space.largest]
