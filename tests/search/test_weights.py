"""Budgets over what no model foretells: memory, time to load, first inference, throughput."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.far import Unable
from deploy.kit import Kit
from deploy.targets import Local, Model, Weight
from search.budget import WEIGHED, Budget, foretold, parse_all
from search.direct import Direct
from search.found import Found
from search.loop import Asked
from search.loop import search as search_loop
from search.settings import SearchConfig
from search.store import Store
from search.table import children, chosen
from search.weights import BATCH, PROBINGS, SITTINGS, Scales, holds, quietest, span
from supernet.errors import InputError
from supernet.run import Run
from supernet.space import load_space
from tests.conftest import FakeTarget, macs_of

SPACE = load_space("digits")
SETTINGS = SearchConfig(strategy="coarse_to_fine", options={"coarse": 8, "parents": 2}, evaluations=12, random=2, polish=2, batch=3,
                        finalists=2, profile_children=10, zones=2)  # fmt: skip


@dataclass
class FakeScales(FakeTarget):
    """A device on which a child's weight follows from its macs, and is a little more each time that it is weighed."""

    weighed: list[int] = field(default_factory=list)

    most_macs: float = float("inf")
    """It has no memory for more."""

    def weigh(self, models: Sequence[Model], *, batch: int = 8, seconds: float = 1.0) -> list[Weight]:
        self.weighed.append(len(models))
        if any(macs_of(onnx.load_model_from_string(model.data)) > self.most_macs for model in models):
            raise Unable("board: too little memory for a model there")
        macs = [macs_of(onnx.load_model_from_string(model.data)) for model in models]
        more = 1 + 0.01 * (len(self.weighed) % 3)
        return [
            Weight(int(1e6 + each), each, 1 + each * more / 1e6, each * more / 1e6, 1e9 / each / more, batch) for each in macs
        ]

    def conditions(self) -> dict[str, Any]:
        return {}


def search(run: Run, target: Any, *budgets: str, **asked: Any) -> Found:
    return search_loop(run, Asked(budgets, settings=SETTINGS, targets={None: target, "board": target}, **asked))


@pytest.mark.parametrize("metric", WEIGHED)
def test_a_weight_is_a_budget_of_a_target(metric: str) -> None:
    budget = Budget.parse(f"{metric}@board<=20")
    assert (budget.metric, budget.target, budget.bound) == (metric, "board", 20.0)
    assert foretold([budget, Budget("macs", 5.0), Budget("latency_ms", 1.0)]) == (
        Budget("macs", 5.0),
        Budget("latency_ms", 1.0),
    )


def test_a_budget_holds_for_the_worst_that_was_seen() -> None:
    spans = {"load_ms": span([3.0, 1.0, 2.0])}
    assert spans["load_ms"] == (1.0, 2.0, 3.0)
    held = [text for text in ("load_ms<=3", "load_ms<=2.9", "load_ms>=1", "load_ms>=1.1") if holds(Budget.parse(text), spans)]
    assert held == ["load_ms<=3", "load_ms>=1"]


def test_what_a_target_cannot_run_is_too_heavy_and_ends_nothing(tmp_path: Path) -> None:
    target = FakeScales(most_macs=macs_of(onnx.load_model_from_string(_probe(SPACE.largest))) - 1)
    archs, budget = [SPACE.smallest, SPACE.largest], Budget.parse("load_ms<=100")
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        scales = Scales(SPACE, store, {None: target})
        scales.refuse_impossible([budget])
        assert scales.too_heavy(budget, archs) == {
            SPACE.largest: "cannot be weighed for load_ms<=100: board: too little memory for a model there"
        }
        assert set(scales.exported(None, archs, _probe)) == {SPACE.smallest}
        target.most_macs = 0
        with pytest.raises(
            InputError, match="the smallest child of the space digits cannot be weighed: board: too little memory"
        ):
            Scales(SPACE, None, {None: target}).refuse_impossible([budget])


def test_a_candidate_is_refused_by_the_quietest_that_was_seen(tmp_path: Path) -> None:
    spans = {"load_ms": (1.0, 2.0, 3.0), "images_per_s": (1.0, 2.0, 3.0)}
    assert (quietest(Budget.parse("load_ms<=1"), spans), quietest(Budget.parse("images_per_s>=1"), spans)) == (1.0, 3.0)
    assert not holds(Budget.parse("load_ms<=1"), None)


def test_children_are_weighed_once_finalists_several_times(tmp_path: Path) -> None:
    target, archs = FakeScales(), [SPACE.smallest, SPACE.largest, SPACE.smallest]
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        scales = Scales(SPACE, store, {None: target})
        found = scales.probes(None, archs)
        assert found == Scales(SPACE, store, {None: target}).probes(None, archs)
        assert target.weighed == [1] * 2 * PROBINGS
        data = {arch: _probe(arch) for arch in archs}
        again = scales.exported(None, archs, data.__getitem__)
        assert target.weighed == [1] * 2 * (PROBINGS + SITTINGS)
        low, middle, most = again[SPACE.smallest]["load_ms"]
        assert low < middle < most
        rows = store.weighed()
    assert {(row.key, row.batch) for row in rows} == {(arch.key, BATCH) for arch in archs}
    assert len(rows) == 4


def _probe(arch: Any) -> bytes:
    from deploy.probe import probe

    return probe(SPACE, arch)


@pytest.mark.parametrize(("text", "end"), [("resident_bytes<=1M", "smallest"), ("load_ms@board<=0.5", "smallest"),
                                           ("first_ms<=0.00001", "smallest"), ("images_per_s>=1G", "largest")])  # fmt: skip
def test_what_no_child_can_weigh_is_refused_with_what_one_does(text: str, end: str, tmp_path: Path) -> None:
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        scales = Scales(SPACE, store, {None: FakeScales(), "board": FakeScales()})
        with pytest.raises(InputError, match=f"no child of the space digits meets .*the {end} reachable, is "):
            scales.refuse_impossible(parse_all([text]))
        scales.refuse_impossible(parse_all(["resident_bytes>=2K", "images_per_s<=2", "macs<=1"]))


def test_a_target_that_cannot_weigh_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path / "search.sqlite", identity={}) as store, pytest.raises(InputError, match="tells latencies alone"):
        Scales(SPACE, store, {None: FakeTarget()}).refuse_impossible(parse_all(["load_ms<=5"]))


def test_candidates_that_are_too_heavy_are_refused(tmp_path: Path) -> None:
    target = FakeScales()
    archs = [SPACE.smallest, SPACE.largest, *(SPACE.sample(np.random.default_rng(seed)) for seed in range(4))]
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        direct = Direct(SPACE, store, parse_all(["load_ms<=1.5", "macs<=1G"]), {None: target}, {})
        assert [str(budget) for budget in direct.bounds] == ["load_ms<=1.5"]
        refused = direct.refused(archs)
    assert SPACE.smallest not in refused
    assert "its load_ms is" in refused[SPACE.largest] and "misses load_ms<=1.5" in refused[SPACE.largest]


@pytest.mark.parametrize(
    "texts", [("load_ms@board<=1.5",), ("resident_bytes<=1600K", "latency_ms<=0.03"), ("images_per_s>=1500",)]
)
def test_the_chosen_child_weighs_what_it_may(run_copy: Run, judge: Any, texts: tuple[str, ...]) -> None:
    target = FakeScales()
    found = search(run_copy, target, *texts)
    for budget in parse_all(list(texts)):
        if budget.metric in WEIGHED:
            low, _, most = found.best.weights[budget.column]
            assert budget.holds_interval(low, most)
            low, _, most = found.largest.weights[budget.column]
            assert not budget.holds_interval(low, most)
    assert Found.load(run_copy).best.weights == found.best.weights
    count = len(target.weighed)
    assert search(run_copy, target, *texts).best == found.best
    assert len(target.weighed) == count  # nothing is weighed twice


@pytest.mark.parametrize("how", [{}, {"children": ["load_ms@board<=1.5"]}])
def test_of_a_store_of_heavy_children_light_ones_are_chosen(run_copy: Run, judge: Any, how: dict[str, Any]) -> None:
    """The heaviest score best and are known already: they neither lead the races nor are all finalists."""
    search(run_copy, FakeScales())
    target = FakeScales()
    found = search(run_copy, target, *([] if how else ["load_ms@board<=1.5"]), **how)
    best = found.answers[-1].child
    assert best.weights["load_ms@board"][2] <= 1.5
    assert best.key != found.smallest.key
    with Store.existing(run_copy.path / "search" / "search.sqlite") as store:
        rows = {row.key: row.costs["macs"] for row in store.rows()}
        light = [key for key, macs in rows.items() if 1 + 1.03 * macs / 1e6 <= 1.5]
    assert rows[best.key] >= sorted(rows[key] for key in light)[-3]


def test_a_kit_weighs_nothing_and_is_told_before_anything_is_measured(run_copy: Run) -> None:
    with pytest.raises(InputError, match="tells latencies alone"):
        search_loop(run_copy, Asked(("load_ms@kit<=5",), settings=SETTINGS, targets={None: FakeScales(), "kit": Kit()}))


def test_show_filters_by_what_was_weighed_of_probes_and_exports(run_copy: Run, judge: Any) -> None:
    found = search(run_copy, FakeScales(), "load_ms<=1.5")
    with Store.existing(run_copy.path / "search" / "search.sqlite") as store:
        table = children(store)
    light = chosen(table, budgets=parse_all(["load_ms<=1.5"]))
    assert found.best.key in {child["key"] for child in light}
    assert len(light) > len(found.finalists)
    name = next(name for name in table[0] if name.startswith("images_per_s@probe"))
    rates = [child[name] for child in chosen(table, sort=name)]
    known = [rate for rate in rates if rate is not None]
    assert known == sorted(known, reverse=True)


def test_a_child_of_its_own_may_bound_a_weight(run_copy: Run, judge: Any) -> None:
    found = search(run_copy, FakeScales(), "macs<=4M", children=["load_ms@board<=1.5"])
    assert "load_ms@board" in found.answers[0].child.weights
    answer = found.answers[1]
    assert answer.child.weights["load_ms@board"][2] <= 1.5


def test_a_file_from_before_weights_were_kept_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "search.sqlite"
    Store.open(path, identity={"a": "b"}).close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE weights")
    connection.close()
    with Store.existing(path) as store:
        assert store.weighed() == []
    with Store.open(path, identity={"a": "b"}) as store:
        Scales(SPACE, store, {None: FakeScales()}).probes(None, [SPACE.smallest])
        assert len(store.weighed()) == 1


@pytest.mark.slow
def test_this_machine_weighs(tmp_path: Path) -> None:
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        scales = Scales(SPACE, store, {None: Local()})
        found = scales.probes(None, [SPACE.smallest, SPACE.largest])
    small, large = found[SPACE.smallest], found[SPACE.largest]
    assert set(small) == set(WEIGHED)
    assert all(low > 0 for spans in found.values() for low, _, _ in spans.values())
    assert small["resident_bytes"][1] > 10e6  # a Python with a runtime
    assert small["images_per_s"][1] > large["images_per_s"][1]
