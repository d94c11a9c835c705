"""The mirror of a search in an Optuna journal, and the real server on it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search import dashboard as shown
from search.budget import WEIGHED, parse_all
from search.dashboard import Mirror, dashboard
from search.records import PROBE, Measurement, Row, Weighed
from search.store import Store
from search.table import children
from supernet.costs import arch_costs
from supernet.errors import InputError
from supernet.family import Dimension
from supernet.space import Space, load_space
from supernet.task import Classification

IMAGES = 64
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits")


def rows_of(space: Space, count: int, images: int = IMAGES, rung: int = 1, seed: int = 0) -> list[Row]:
    noise = np.random.default_rng(seed)
    archs = dict.fromkeys(space.decode(space.sample_codes(4 * count, noise)))
    return [
        Row(arch.key, arch.to_json(), "coarse", rung, b"", images, float(noise.random()), {**arch_costs(space, arch)}, 1e9, 1.5,
            "2026-01-02T03:04:05.000+00:00")
        for arch in list(archs)[:count]
    ]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, space: Space) -> Iterator[Store]:
    (tmp_path / "search").mkdir()
    with Store.open(tmp_path / "search" / "search.sqlite", identity={}) as store:
        store.add(rows_of(space, 40))
        yield store


@pytest.fixture
def mirror(tmp_path: Path, space: Space) -> Callable[..., Mirror]:
    def made(**settings: Any) -> Mirror:
        return Mirror(tmp_path / "a.jsonl", space, name="digits", metric="top1", images=IMAGES, **settings)

    return made


def read(path: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials that another program finds in the journal."""
    study = optuna.load_study(study_name="digits", storage=JournalStorage(JournalFileBackend(str(path))))
    return study.get_trials()


# --- what is mirrored ---


def test_a_trial_says_what_the_store_knows(store: Store, space: Space, mirror: Callable[..., Mirror]) -> None:
    made = mirror()
    assert made.update(children(store)) == 40
    assert made.study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    assert made.study.metric_names == ["top1", "macs"]
    for trial, row in zip(read(made.path), store.rows(), strict=True):
        arch = space.arch(json.loads(row.arch))
        assert trial.values == [row.score, row.costs["macs"]]
        assert trial.params == {each.name: arch[each.name] for each in space.dimensions if len(each.choices) > 1}
        attrs = trial.user_attrs
        assert (attrs["key"], attrs["params"], attrs["images"], attrs["stage"]) == (
            row.key,
            row.costs["params"],
            IMAGES,
            "coarse",
        )
        assert trial.duration is not None
        assert trial.duration.total_seconds() == 1.5


def test_the_elites_are_the_front(store: Store, mirror: Callable[..., Mirror]) -> None:
    made = mirror()
    made.update(children(store))
    elites = {trial.user_attrs["key"] for trial in read(made.path) if trial.user_attrs["elite"]}
    assert elites == {trial.user_attrs["key"] for trial in made.study.best_trials}
    assert 1 < len(elites) < 40


def test_who_was_scored_on_few_images_or_misses_a_budget_is_not_feasible(
    store: Store, space: Space, mirror: Callable[..., Mirror]
) -> None:
    rows = store.rows()
    bound = sorted(row.costs["macs"] for row in rows)[20]
    few = rows_of(space, 10, images=8, rung=0, seed=1)
    store.add(few)
    made = mirror(budgets=parse_all([f"macs<={bound}", "latency_ms<=1"]))
    made.update(children(store))
    feasible = [row.images == IMAGES and row.costs["macs"] <= bound for row in store.rows()]
    trials = read(made.path)
    assert [all(value <= 0 for value in trial.system_attrs["constraints"]) for trial in trials] == feasible
    assert [all(value <= 0 for value in trial.constraints.values()) for trial in trials] == feasible
    assert 5 < sum(feasible) < 25
    assert {trial.user_attrs["key"] for trial in trials if trial.user_attrs["elite"]}.isdisjoint({row.key for row in few})


def test_a_child_that_misses_a_measured_budget_is_not_feasible(store: Store, mirror: Callable[..., Mirror]) -> None:
    """Of a child that was not measured a budget says nothing; what was measured of its export counts before its probe's."""
    slow, quick, heavy, light, *_ = keys = [row.key for row in store.rows()]
    store.add_measurements([
        Measurement(slow, "local:threads=1:ab", 3.0, 2.9, 3.1, {}), Measurement(quick, "local:threads=1:ab", 1.0, 0.9, 1.1, {}),
        Measurement(quick, f"{PROBE}local:threads=1:ab", 3.0, 2.9, 3.1, {}),
    ])  # fmt: skip
    spans = dict.fromkeys(WEIGHED, (1.0, 1.0, 1.0))
    store.add_weighed([Weighed(heavy, "local:threads=1:ab", 8, {**spans, "load_ms": (4.0, 5.0, 6.0)}),
                       Weighed(light, f"{PROBE}local:threads=1:ab", 8, spans)])  # fmt: skip
    made = mirror(budgets=parse_all(["latency_ms<=2", "load_ms<=5.5"]))
    made.update(children(store))
    violated = {trial.user_attrs["key"]: trial.constraints for trial in read(made.path)}
    assert {key for key in keys if any(value > 0 for value in violated[key].values())} == {slow, heavy}
    assert violated[slow] | {"images missing": 0.0, "latency_ms<=2": 1.0, "load_ms<=5.5": 0.0} == violated[slow]
    assert violated[heavy]["load_ms<=5.5"] == 1.0


def test_a_score_that_is_no_number_is_a_failed_trial(store: Store, space: Space, mirror: Callable[..., Mirror]) -> None:
    table = children(store)
    table[3]["score"] = -np.inf
    made = mirror()
    made.update(table)
    assert [trial.number for trial in read(made.path) if trial.state.name == "FAIL"] == [3]


def test_no_more_than_the_most_are_shown_and_all_elites_are(
    store: Store, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = children(store)
    elites = shown._elites(table)
    monkeypatch.setattr(shown, "MOST", len(elites) + 9)
    monkeypatch.setattr(shown, "MOST_ORDINARY", 7)
    made = mirror()
    assert made.update(table) == len(elites) + 7
    keys = [trial.user_attrs["key"] for trial in read(made.path)]
    assert elites <= set(keys)
    assert keys == [child["key"] for child in table if child["key"] in set(keys)]
    best = {**table[0], "key": "new1", "score": 2.0}, {**table[0], "key": "new2", "score": 3.0, "macs": 1.0}
    assert made.update([*table, best[0]]) == 1
    assert made.update([*table, *best]) == 1
    assert made.update([*table, *best, {**best[1], "key": "new3", "macs": 0.5}]) == 0  # no room


def test_an_update_adds_what_is_new_or_was_promoted(store: Store, space: Space, mirror: Callable[..., Mirror]) -> None:
    made = mirror()
    few = rows_of(space, 10, images=8, rung=0, seed=1)
    store.add(few)
    made.update(children(store))
    assert made.update(children(store)) == 0
    store.add(rows_of(space, 10, images=IMAGES, rung=1, seed=1))
    assert made.update(children(store)) == 10
    trials = read(made.path)
    assert {trial.user_attrs["key"] for trial in trials[-10:]} == {row.key for row in few}
    assert {trial.user_attrs["images"] for trial in trials[-10:]} == {IMAGES}


def test_the_journal_is_made_anew_and_damage_to_it_harms_nothing(
    store: Store, mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("{damaged")
    for _ in range(2):
        made = mirror()
        made.update(children(store))
        assert len(read(made.path)) == 40


def test_a_child_of_another_space_is_refused(store: Store, mirror: Callable[..., Mirror]) -> None:
    table = children(store)
    table[5]["arch.nonsense"] = 3
    with pytest.raises(InputError, match=f"child {table[5]['key']}: 'nonsense' is no dimension"):
        mirror().update(table)


def test_a_search_without_children_is_an_empty_study(mirror: Callable[..., Mirror]) -> None:
    made = mirror()
    assert made.update([]) == 0
    assert read(made.path) == []


@pytest.mark.parametrize(
    ("choices", "ordered", "expected"),
    [
        ((1, 2, 3), True, IntDistribution(1, 3)),
        ((16, 24, 40), True, IntDistribution(16, 40, step=8)),
        ((3, 5, 7), True, IntDistribution(3, 7, step=2)),
        ((1, 1.5, 4), True, FloatDistribution(1, 4)),
        ((3, 5, 7), False, CategoricalDistribution((3, 5, 7))),
        ((False, True), True, CategoricalDistribution((False, True))),
        (("none", "conv"), False, CategoricalDistribution(("none", "conv"))),
    ],
)
def test_dimensions_become_distributions_that_hold_their_choices(choices: Any, ordered: bool, expected: object) -> None:
    made = shown._distribution(Dimension("d", choices, ordered))
    assert made == expected
    assert all(made.to_external_repr(made.to_internal_repr(choice)) == choice for choice in choices)


@pytest.mark.parametrize("name", ["attentivenas", "cell", "mlp", "autoformer-tiny"])
def test_archs_of_other_spaces_fit(tmp_path: Path, name: str) -> None:
    space = load_space(name)
    with Store.open(tmp_path / "s.sqlite", identity={}) as store:
        store.add(rows_of(space, 5))
        made = Mirror(tmp_path / "a.jsonl", space, name="digits", metric="top1", images=IMAGES)
        assert made.update(children(store)) == 5
    assert len(read(made.path)) == 5


@pytest.mark.parametrize("missing", ["optuna", "optuna_dashboard"])
def test_a_missing_package_is_told_with_how_to_get_it(
    store: Store, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"^the dashboard needs .*: pip install 'nestling\[dashboard\]'$"):
        dashboard(run_like(tmp_path, space), port=0)


# --- the server ---


def get(address: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.status, answer.read()


def run_like(tmp_path: Path, space: Space) -> Any:
    dataset = SimpleNamespace(split=lambda name: range(IMAGES))
    return SimpleNamespace(path=tmp_path, space=space, task=Classification(), dataset=dataset)


@pytest.mark.slow
def test_the_real_server_shows_the_search_and_what_it_finds_meanwhile(
    store: Store, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown, "REFRESH_SECONDS", 0.05)
    before, said, counts = store.path.read_bytes(), list[str](), list[int]()

    def look() -> bool:
        address = said[0].split()[0]
        assert get(f"{address}dashboard/")[0] == 200
        studies = json.loads(get(f"{address}api/studies")[1])["study_summaries"]
        assert [study["study_name"] for study in studies] == [tmp_path.name]
        detail = json.loads(get(f"{address}api/studies/{studies[0]['study_id']}")[1])
        assert detail["directions"] == ["maximize", "minimize"]
        trials = detail["trials"]
        assert {len(trial["constraints"]) for trial in trials} == {2}
        assert any(sum(map(abs, trial["constraints"])) for trial in trials)
        counts.append(len(trials))
        if len(counts) == 1:
            store.add(rows_of(space, 10, seed=1))
        return counts[-1] == 40 and len(counts) < 50

    bound = sorted(row.costs["macs"] for row in store.rows())[20]
    dashboard(run_like(tmp_path, space), port=0, budgets=parse_all([f"macs<={bound}"]), say=said.append, going=look)
    assert said[0].startswith("http://127.0.0.1:")
    assert "shows 40 of 40 children" in said[0]
    assert (counts[0], counts[-1]) == (40, 50)
    assert len(store.rows()) == 50
    assert store.path.read_bytes()[:100] == before[:100]
    with pytest.raises(OSError):
        get(said[0].split()[0])  # it is stopped


SERVE = """
import pathlib, sys
from search.dashboard import serving
with serving(pathlib.Path(sys.argv[1])) as (address, server):
    print(address, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_server_ends_with_the_process_that_started_it_even_if_that_is_killed(
    store: Store, mirror: Callable[..., Mirror]
) -> None:
    made = mirror()
    made.update(children(store))
    parent = subprocess.Popen([sys.executable, "-c", SERVE, str(made.path)], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    with parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().strip()
        assert get(f"{address}api/studies")[0] == 200
        parent.kill()
    for _ in range(600):
        try:
            get(address)
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the server lives on")


def test_a_taken_port_is_told(store: Store, space: Space, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} of 127.0.0.1 cannot be used .*: give another --port"):
            dashboard(run_like(tmp_path, space), port=port)
    with pytest.raises(InputError, match="port 70000 of"):
        dashboard(run_like(tmp_path, space), port=70000)


def test_only_one_dashboard_of_a_run(store: Store, space: Space, tmp_path: Path) -> None:
    from supernet.durable import locked

    holds, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "search" / "dashboard.lock", "it"):
            holds.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    holds.wait()
    try:
        with pytest.raises(InputError, match=r"the dashboard of .* is in use by another process"):
            dashboard(run_like(tmp_path, space), port=0)
    finally:
        done.set()
        holder.join()


def test_a_run_that_was_not_searched_is_told(tmp_path: Path, space: Space) -> None:
    with pytest.raises(InputError, match="search the run first"):
        dashboard(run_like(tmp_path, space), port=0)


def test_a_server_that_dies_is_told(store: Store, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_SERVER", "raise SystemExit('no room')")
    with pytest.raises(InputError, match=r"the dashboard did not start \(no room\)"):
        dashboard(run_like(tmp_path, space), port=0)
