"""The engine: what a search has seen comes back, whenever it is taken up; every set of budgets is really searched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.engine import Engine, Event, Phase
from search.evaluate import Spent
from search.feasible import Feasible
from search.known import Known
from search.objective import objective_named
from search.rungs import Rung
from search.store import Store
from search.strategies import Proposal
from search.strategies.registry import make
from search.wanted import caps
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.space import load_space
from supernet.task import Classification

RUNGS = (Rung(100, 64), Rung(400, 64), Rung(1600, 128))
SPACE = load_space("digits")
COSTS = Costs(SPACE)


class Table:
    """An `Advancing` that knows by the arch what a child does on every image: the larger the better, with luck of its own."""

    def __init__(self, *, fails: set[str] = frozenset(), dies_at: int | None = None) -> None:  # type: ignore[assignment]
        self.fails, self.dies_at, self.calls, self.spent = fails, dies_at, list[tuple[str, int]](), Spent()
        self.failed: dict[Arch, str] = {}

    def advance(self, archs: Any, rung: int) -> dict[Arch, Any]:
        if self.dies_at is not None and len(self.calls) >= self.dies_at:
            raise KeyboardInterrupt
        first = RUNGS[rung - 1].images if rung else 0
        found = {}
        for arch in archs:
            self.calls.append((arch.key, rung))
            if arch.key in self.fails:
                self.failed[arch] = "it was to fail"
                continue
            wrong = (~right(arch)[first : RUNGS[rung].images]).astype(np.uint16)
            found[arch] = {"rank": wrong, "predicted": wrong, "loss": wrong.astype(np.float16)}
        self.spent += Spent(0, (RUNGS[rung].images - first) * len(archs))
        return found


def right(arch: Arch) -> Any:
    """Images of equal difficulty for all children, and some noise."""
    hard = np.random.default_rng(0).random(RUNGS[-1].images)
    noise = np.random.default_rng(int(arch.key, 16)).normal(0, 0.1, RUNGS[-1].images)
    size = np.log(SPACE.costs(arch)[0] / SPACE.costs(SPACE.smallest)[0]) / np.log(33)
    return hard + noise < 0.5 + 0.4 * size


def engine(path: Path, table: Table, *, evaluations: int = 32, polish: int = 8) -> tuple[Engine, Store]:
    feasible = Feasible(SPACE, COSTS, (), {})
    store = Store.open(path / "search.sqlite", identity={})
    task = Classification()
    labels = np.zeros(RUNGS[-1].images, np.int64)
    known = Known(SPACE, task, store, table, RUNGS, COSTS, objective_named(None, task), labels, 10)
    zones = [(), *((cap,) for cap in caps(feasible, 3, np.random.default_rng(0)))]
    phases = [
        Phase("coarse_to_fine", lambda _: make("coarse_to_fine", SPACE, feasible, seed=0), evaluations),
        Phase("polish", lambda starts: make("local", SPACE, feasible, seed=0, starts=starts), polish, whole=True),
    ]
    return Engine("one", known, feasible, zones, phases, 8, lambda _: None), store


@pytest.fixture(autouse=True)
def enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.engine.ENOUGH", 300)


def seen(path: Path, table: Table, **settings: Any) -> tuple[list[tuple[str, int]], list[Arch | None]]:
    """What a search has seen in the end, and the best of its zones."""
    searching, store = engine(path, table, **settings)
    with store:
        searching.go()
        return [(arch.key, rung) for arch, rung in searching.view.items()], [searching.leader(at) for at in range(4)]


def folder(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


def test_few_are_scored_on_all_images_and_none_twice(tmp_path: Path) -> None:
    table = Table()
    view, leaders = seen(tmp_path, table)
    assert len(set(table.calls)) == len(table.calls)
    last = [key for key, rung in view if rung == 2]
    assert {SPACE.smallest.key, SPACE.largest.key} <= set(last) and len(last) < len(view) / 2
    assert all(leader is not None and leader.key in last for leader in leaders)
    assert table.spent.image_forwards < 0.6 * RUNGS[-1].images * len(view)


@pytest.mark.parametrize("polish", [8, 0])
def test_a_search_that_is_over_evaluates_nothing_again_and_has_seen_the_same(tmp_path: Path, polish: int) -> None:
    first = seen(tmp_path, Table(), polish=polish)
    again = Table()
    assert seen(tmp_path, again, polish=polish) == first
    assert again.calls == []


def test_killed_at_any_call_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = Table()
    expected = seen(folder(tmp_path, "whole"), whole)
    for dies_at in range(0, len(whole.calls), 7):
        path, done = folder(tmp_path, str(dies_at)), list[tuple[str, int]]()
        for limit in (dies_at, None):
            table = Table(dies_at=limit)
            try:
                found = seen(path, table)
            except KeyboardInterrupt:
                assert limit is not None
            done += table.calls
        assert found == expected
        assert sorted(done) == sorted(whole.calls)


def test_children_that_fail_are_passed_over_and_lose_no_other(tmp_path: Path) -> None:
    view, _ = seen(folder(tmp_path, "whole"), Table())
    bad = {key for key, _ in view[5:15]} - {SPACE.smallest.key, SPACE.largest.key}
    failing, leaders = seen(folder(tmp_path, "failing"), Table(fails=bad))
    assert not bad & {key for key, _ in failing}
    assert len(failing) >= len(view) - len(bad) and all(leaders)


def test_what_failed_and_why_is_kept_by_a_search_that_goes_on(tmp_path: Path) -> None:
    view, _ = seen(folder(tmp_path, "whole"), Table())
    bad = {key for key, _ in view[5:15]} - {SPACE.smallest.key, SPACE.largest.key}
    (tmp_path / "failing").mkdir()
    for _ in range(2):
        searching, store = engine(tmp_path / "failing", Table(fails=bad))
        with store:
            searching.go()
        assert searching.failed and set(searching.failed) <= bad and set(searching.failed.values()) == {"it was to fail"}


def test_a_child_that_is_evaluated_in_the_end_did_not_fail(tmp_path: Path) -> None:
    class Once(Table):
        def advance(self, archs: Any, rung: int) -> dict[Arch, Any]:
            found = super().advance(archs, rung)
            self.fails = set()
            return found

    table = Once(fails={SPACE.smallest.key})
    searching, store = engine(tmp_path, table)
    searching.phases = [replace(searching.phases[0], make=lambda _: Twice())]
    with store:
        searching._begin = lambda _: searching._raced([])  # type: ignore[assignment, method-assign, return-value]
        searching.go()
    assert searching.failed == {} and SPACE.smallest in searching.view
    assert searching.notes == ["asked 2 times"]


class Twice:
    """Asks for the same child until it comes back; its notes change with every ask."""

    asks = 0

    def ask(self, count: int) -> list[Proposal]:
        self.asks += self.asks < 2
        return [Proposal(SPACE.smallest, "one")] if self.asks <= 2 and not self.done else []

    done = False

    def tell(self, results: Any) -> None:
        self.done = any(result.score is not None for result in results)

    def state(self) -> dict[str, Any]:
        return {"asks": self.asks}

    def load_state(self, state: Any) -> None:
        self.asks = state["asks"]

    def notes(self) -> list[str]:
        return [f"asked {self.asks} times"]


def test_where_an_end_of_the_space_fails_the_search_says_so_at_once(tmp_path: Path) -> None:
    from supernet.errors import InputError

    table = Table(fails={SPACE.largest.key})
    with pytest.raises(InputError, match="could not be evaluated"):
        seen(tmp_path, table)
    assert len(table.calls) <= 6


def test_events_tell_the_front(tmp_path: Path) -> None:
    events: list[Event] = []
    searching, store = engine(tmp_path, Table())
    searching.progress = events.append
    with store:
        searching.go()
    assert [event.done for event in events] == sorted(event.done for event in events)
    for event in events[2:]:
        assert event.front and all({"key", "score", "macs", "stage"} <= set(row) for row in event.front)
