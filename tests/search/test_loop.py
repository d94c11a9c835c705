"""The search as a whole: budgets hold by measurement, nothing is evaluated twice, the test images stay unread."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.commands import best_of
from deploy.targets import Latency
from search.budget import parse_all
from search.engine import Event
from search.finalists import Bench, meets
from search.finalists import judge as judge_of
from search.found import Found
from search.loop import Asked, identity
from search.loop import search as search_loop
from search.objective import OBJECTIVES
from search.settings import SearchConfig, load_search_config
from search.store import Store
from supernet import checkpoint
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.errors import InputError
from supernet.run import Run
from supernet.samples import unpack
from supernet.space import Space

ROOT = Path(__file__).parents[2]
SETTINGS = SearchConfig(
    strategy="coarse_to_fine",
    options={"coarse": 8, "parents": 2},
    evaluations=14,
    random=2,
    polish=2,
    batch=3,
    finalists=2,
    profile_children=10,
    zones=2,
)


def search(
    run: Run, budgets: list[str], *, settings: SearchConfig = SETTINGS, target: Any, progress: Any = None, **asked: Any
) -> Found:  # fmt: skip
    return search_loop(run, Asked(tuple(budgets), settings=settings, targets={None: target}, **asked), progress=progress)


def search_file(run: Run) -> Path:
    return run.path / "search" / "search.sqlite"


def outcome(found: Found) -> dict[str, Any]:
    """What a search decided, without dates."""
    text = json.dumps(found.as_dict())
    return json.loads(
        text, object_hook=lambda value: {key: item for key, item in value.items() if key not in {"date", "spent"}}
    )  # type: ignore[no-any-return]


def costs_of(found: Found, metric: str) -> float:
    """A cost of the chosen child; of a latency the upper end."""
    if metric == "latency_ms":
        assert found.best.latency is not None
        return found.best.latency.high
    return found.best.costs[metric]


# --- budgets ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "budgets",
    [
        ["macs<=600K"], ["params<=40K"], ["peak_memory_bytes<=60KiB"], ["latency_ms<=0.02"], ["latency_ms<=0.02", "params<=30K"],
        ["macs<=2M", "latency_ms<=0.016"], ["macs<=119648"], ["latency_ms<=0.0114"],
    ],
)  # fmt: skip
def test_the_chosen_child_meets_every_budget_by_measurement(
    run_copy: Run, fake_target: Any, judge: Any, budgets: list[str]
) -> None:  # fmt: skip
    found = search(run_copy, budgets, settings=SETTINGS, target=fake_target())
    for budget in parse_all(budgets):
        assert costs_of(found, budget.metric) <= budget.bound
    assert found.budgets == tuple(str(budget) for budget in parse_all(budgets))
    assert {found.best.key, found.smallest.key} <= set(judge.keys)
    assert (found.smallest.arch, found.largest.arch) == (run_copy.space.smallest, run_copy.space.largest)
    predicted = [child.predicted_latency_ms for child in (found.best, found.smallest, found.largest)]
    assert all((value is not None) == any("latency" in text for text in budgets) for value in predicted)


def test_without_a_budget_the_best_child_is_chosen(run_copy: Run, fake_target: Any, judge: Any) -> None:
    found = search(run_copy, [], settings=SETTINGS, target=fake_target())
    assert found.budgets == ()
    with Store.existing(search_file(run_copy)) as store:
        rows = {row.key: row for row in store.rows()}
        confirmed = {row.key: row for row in store.confirmed()}
    assert found.evaluated == len(rows) == len(judge.keys) == len(set(judge.keys))
    finalists = sorted(rows.values(), key=lambda row: (-row.score, row.costs["macs"]))[: SETTINGS.finalists]
    assert {child.key for child in found.finalists} == {row.key for row in finalists}
    right = {row.key: row.score * row.images + confirmed[row.key].score * confirmed[row.key].images for row in finalists}
    assert right[found.best.key] == max(right.values())


def test_of_children_of_equal_score_the_cheapest_is_chosen(run_copy: Run, fake_target: Any, judge: Any) -> None:
    judge.quality = lambda space, arch: 2.0
    found = search(run_copy, [], settings=SETTINGS, target=fake_target())
    assert found.best.arch == run_copy.space.smallest
    assert found.front == (found.smallest.key,)


def test_a_child_that_leads_by_luck_on_search_images_loses_on_the_confirm_images() -> None:
    """A cheaper child that is no worse, and one that is much worse: the confirm images decide, not who was ahead."""
    rng = np.random.default_rng(0)
    archs = [Arch((("width", width),)) for width in (8, 16, 24)]
    hard = rng.random(2000)
    right = dict(zip(archs, (hard < 0.6, (hard + rng.normal(0, 0.01, 2000)) < 0.8, hard < 0.8), strict=True))
    verdict = judge_of(archs, right, {archs[0]: 1.0, archs[1]: 2.0, archs[2]: 3.0}, seed=0)
    assert verdict.chosen == archs[1]
    assert set(verdict.tied) == {archs[1], archs[2]}
    assert verdict.p_values[archs[0]] < 1e-6 < 0.05 < verdict.p_values[archs[2]]
    assert verdict.estimates[archs[0]].value < verdict.estimates[archs[1]].value


def test_the_front_is_not_beaten_by_any_evaluated_child(run_copy: Run, fake_target: Any, judge: Any) -> None:
    found = search(run_copy, ["params<=60K"], settings=SETTINGS, target=fake_target())
    with Store.existing(search_file(run_copy)) as store:
        rows = {row.key: row for row in store.rows()}
    for key in found.front:
        one = rows[key]
        for other in rows.values():
            better = other.score >= one.score and other.costs["params"] <= one.costs["params"]
            assert not better or (other.score, other.costs["params"]) == (one.score, one.costs["params"])


# --- impossible budgets ---


@pytest.mark.parametrize("metric", ["macs", "params", "peak_memory_bytes"])
def test_an_impossible_cost_ends_at_once_and_names_what_is_reachable(
    run_copy: Run, fake_target: Any, judge: Any, metric: str
) -> None:  # fmt: skip
    target, least = fake_target(), arch_costs(run_copy.space, run_copy.space.smallest)[metric]
    with pytest.raises(InputError, match=rf"smallest reachable {metric} is {least}: raise the budget"):
        search(run_copy, ["latency_ms<=5", f"{metric}<={least - 1}"], settings=SETTINGS, target=target)
    assert (judge.asked, target.measured) == ([], [])
    assert not search_file(run_copy).exists()
    assert costs_of(search(run_copy, [f"{metric}<={least}"], settings=SETTINGS, target=target), metric) == least


def test_an_impossible_latency_ends_after_one_measurement_and_names_what_is_reachable(
    run_copy: Run, fake_target: Any, judge: Any
) -> None:
    target = fake_target()
    with pytest.raises(InputError, match=r"smallest reachable latency_ms is 0\.01131"):
        search(run_copy, ["latency_ms<=0.0113"], settings=SETTINGS, target=target)
    assert (judge.asked, target.measured) == ([], [1])
    assert not search_file(run_copy).exists()


@pytest.mark.parametrize("texts", [["speed<=3"], ["macs<3"], ["macs<=-1"], ["macs<=1", "macs<=2"], [""]])
def test_a_budget_that_cannot_be_read_ends_before_anything_else(
    run_copy: Run, fake_target: Any, judge: Any, texts: list[str]
) -> None:  # fmt: skip
    with pytest.raises(InputError):
        search(run_copy, texts, settings=SETTINGS, target=fake_target())
    assert judge.asked == []
    assert not (run_copy.path / "search").exists()


# --- a prediction proposes, the measurement decides ---


def slower_when_exported(target: Any, factor: float) -> Any:
    """Finalists take `factor` times what the profile saw."""
    usual = 0.0

    def milliseconds(model: onnx.ModelProto) -> float:
        nonlocal usual
        usual = type(target)()._timing(model).median_ms
        return usual * (factor if len(target.measured) > 2 else 1)  # after the smallest child and the profile

    target.milliseconds = milliseconds
    return target


def test_finalists_that_are_slower_than_predicted_are_passed_over(run_copy: Run, fake_target: Any, judge: Any) -> None:
    target = slower_when_exported(fake_target(), 1.4)
    found = search(run_copy, ["latency_ms<=0.02"], settings=SETTINGS, target=target)
    assert costs_of(found, "latency_ms") <= 0.02
    assert any(
        re.fullmatch(r"\d+ finalists missed the budget when measured; the next were tried", note) for note in found.notes
    )
    assert found.best.predicted_latency_ms is not None and found.best.latency is not None
    assert found.best.latency.latency_ms > found.best.predicted_latency_ms


def test_where_every_finalist_misses_the_smallest_child_is_the_last_resort(run_copy: Run, fake_target: Any, judge: Any) -> None:
    target = slower_when_exported(fake_target(), 1.6)
    found = search(run_copy, ["latency_ms<=0.0182"], settings=SETTINGS, target=target)
    assert found.best.arch == run_copy.space.smallest
    assert costs_of(found, "latency_ms") <= 0.0182


def test_where_even_the_smallest_misses_in_the_end_the_user_is_told_and_nothing_is_saved(
    run_copy: Run, fake_target: Any, judge: Any
) -> None:
    target = slower_when_exported(fake_target(), 3.0)
    with pytest.raises(
        InputError, match=r"no evaluated child meets latency_ms<=0\.02 by measurement; the smallest takes up to 0\.0339"
    ):
        search(run_copy, ["latency_ms<=0.02"], settings=SETTINGS, target=target)
    assert not (run_copy.path / "search" / "found.json").exists()


def test_a_latency_meets_a_budget_with_the_worse_end_of_its_interval() -> None:
    def latency(low: float, high: float) -> Latency:
        return Latency("t", (low + high) / 2, low, high, {}, "2026-01-01")

    here, pi = ["latency_ms<=2", "macs<=10"], ["latency_ms@pi>=1"]
    for low, high, macs, expected in ((1.0, 2.0, 10, True), (1.0, 2.001, 10, False), (1.0, 2.0, 11, False)):
        assert meets(parse_all(here), {"macs": macs}, {None: latency(low, high)}) == expected
    for low, expected in ((1.0, True), (0.999, False)):
        assert meets(parse_all(pi), {}, {None: latency(9, 9), "pi": latency(low, 3.0)}) == expected


# --- nothing is done twice ---


def copy_of(run: Run, path: Path) -> Run:
    shutil.copytree(run.path, path)
    return Run.open(path)


def test_another_budget_evaluates_only_children_that_are_new(run_copy: Run, fake_target: Any, judge: Any) -> None:
    target = fake_target()
    search(run_copy, ["macs<=600K"], settings=SETTINGS, target=target)
    first = list(judge.asked)
    search(run_copy, ["macs<=800K"], settings=SETTINGS, target=target)
    assert len(judge.asked) > len(first)
    assert len(set(judge.asked)) == len(judge.asked)
    with Store.existing(search_file(run_copy)) as store:
        assert [row.key for row in store.rows()] == judge.keys


def test_the_same_search_again_evaluates_and_measures_nothing(run_copy: Run, fake_target: Any, judge: Any) -> None:
    budgets = ["latency_ms<=0.02"]
    first = search(run_copy, budgets, settings=SETTINGS, target=fake_target())
    asked, target = list(judge.asked), fake_target()
    again = search(run_copy, budgets, settings=SETTINGS, target=target)
    assert outcome(again) == outcome(first)
    assert judge.asked == asked
    assert target.measured == [1]  # the smallest child, to know what is possible now


@pytest.mark.slow
def test_a_latency_of_another_target_is_measured_anew(run_copy: Run, fake_target: Any, judge: Any) -> None:
    search(run_copy, ["latency_ms<=0.02"], settings=SETTINGS, target=fake_target())
    asked, other = list(judge.asked), fake_target(label="other", milliseconds=lambda model: 7.0)
    found = search(run_copy, ["latency_ms<=8"], settings=SETTINGS, target=other)
    assert found.best.latency is not None
    assert (found.best.latency.target, found.best.latency.latency_ms) == ("other", 7.0)
    assert {key for key, _ in judge.asked[: len(asked)]} & {
        key for key, split in judge.asked[len(asked) :] if split == "search_val"
    } == set()


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 7, 14, 17])
def test_a_search_that_died_goes_on_where_it_was(
    tiny_run: Run, tmp_path: Path, fake_target: Any, judge: Any, after: int
) -> None:
    whole = search(copy_of(tiny_run, tmp_path / "whole"), ["macs<=700K"], settings=SETTINGS, target=fake_target())
    asked = list(judge.asked)
    judge.asked.clear()
    run, judge.dies_after = copy_of(tiny_run, tmp_path / "killed"), after
    if after < len(asked):
        with pytest.raises(KeyboardInterrupt):
            search(run, ["macs<=700K"], settings=SETTINGS, target=fake_target())
    judge.dies_after = None
    found = search(run, ["macs<=700K"], settings=SETTINGS, target=fake_target())
    assert judge.asked == asked
    assert outcome(found) == outcome(whole)


def test_the_same_search_of_the_same_run_finds_the_same(tiny_run: Run, tmp_path: Path, fake_target: Any, judge: Any) -> None:
    found = [
        search(copy_of(tiny_run, tmp_path / name), ["macs<=700K"], settings=SETTINGS, target=fake_target())
        for name in ("one", "other")
    ]
    assert outcome(found[0]) == outcome(found[1])


def test_rows_of_other_weights_are_never_mixed_in(run_copy: Run, fake_target: Any, judge: Any) -> None:
    search(run_copy, [], settings=SETTINGS, target=fake_target())
    newest = checkpoint.latest(run_copy.checkpoints)
    assert newest is not None
    saved = checkpoint.load(newest)
    weights = {name: value * 1.5 for name, value in saved.tensors["weights"].items()}
    checkpoint.save(run_copy.checkpoints, checkpoint.Checkpoint(saved.step + 1, {"weights": weights}, saved.state))
    with pytest.raises(InputError, match=r"belongs to another search \(weights is "):
        search(Run.open(run_copy.path), [], settings=SETTINGS, target=fake_target())


def test_what_a_store_belongs_to_names_all_that_scores_depend_on(tiny_run: Run) -> None:
    usual = identity(tiny_run, SETTINGS)
    changed = {
        "recipe": replace(tiny_run, recipe=tiny_run.recipe.model_copy(update={"calibration_images": 32})),
        "crop": replace(tiny_run, recipe=tiny_run.recipe.model_copy(update={"crop": 0.9})),
        "data": replace(tiny_run, data={**tiny_run.data, "fingerprint": "0"}),
    }
    assert all(identity(run, SETTINGS) != usual for run in changed.values())
    assert identity(tiny_run, SETTINGS.model_copy(update={"first_rung": 20})) != usual
    assert identity(Run.open(tiny_run.path), SETTINGS) == usual


# --- the test images ---


def test_a_search_never_reads_the_test_images(
    run_copy: Run, fake_target: Any, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from supernet.data.dataset import Dataset

    images = Dataset._images

    def guarded(dataset: Dataset, name: str) -> Any:
        assert name != "test"
        return images(dataset, name)

    monkeypatch.setattr(Dataset, "_images", guarded)
    search(run_copy, ["latency_ms<=0.02"], settings=SETTINGS, target=fake_target())
    assert run_copy.test_reads == 0
    assert not (run_copy.path / "test_reads.jsonl").exists()


# --- few archs, odd settings ---


@pytest.mark.parametrize("changes", [{}, {"resolution": [12, 16]}, {"width": [8, 16], "depth": [1, 2]}])
@pytest.mark.parametrize("budgets", [["macs<=1G"], ["latency_ms<=9", "macs<=1G"]])
def test_spaces_of_few_archs_are_searched_whole(
    few_archs: Callable[..., Run], fake_target: Any, judge: Any, changes: dict[str, Any], budgets: list[str]
) -> None:
    run = few_archs(**changes)
    found = search(run, budgets, settings=SETTINGS, target=fake_target())
    assert found.evaluated == run.space.size
    assert len(judge.keys) == len(set(judge.keys)) == run.space.size


@pytest.fixture
def few_archs(easy_npz: Path, small_space: Callable[..., Space], tmp_path: Path) -> Callable[..., Run]:
    """Makes a run of a small space whose weights are as they were drawn."""
    from supernet.data.sources import open_source
    from supernet.model import Supernet
    from supernet.recipe import load_recipe

    def make(**changes: Any) -> Run:
        space = small_space(**changes)
        recipe = load_recipe("digits", {"epochs": 1, "calibration_images": 32})
        run = Run.create(tmp_path / "few", space, recipe, open_source(str(easy_npz)))
        checkpoint.save(
            run.checkpoints,
            checkpoint.Checkpoint(
                1, {"weights": Supernet(space).state_dict()}, {"space": space.key, "finished": True, "epochs": recipe.epochs}
            ),
        )
        return run

    return make


@pytest.mark.slow
def test_a_space_of_one_arch_goes_the_whole_way_without_stand_ins(few_archs: Callable[..., Run], fake_target: Any) -> None:
    found = search(few_archs(), ["latency_ms<=9"], settings=SETTINGS, target=fake_target())
    assert found.best.key == found.smallest.key == found.largest.key
    assert found.best.confirm_score == found.smallest.confirm_score == found.largest.confirm_score
    assert found.front == (found.best.key,)
    assert all("random children" in note or "latency model of" in note for note in found.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"random": 0},
        {"evaluations": 1, "polish": 0, "random": 0},
        {"finalists": 100},
        {"batch": 100},
        {"zones": 0},
        {"race": False},
        {"first_rung": 3, "rung_factor": 2},
        {"strategy": "evolution", "options": {"population": 4}},
        {"strategy": "local", "options": {}},
        {"objective": "balanced_accuracy"},
        {"objective": "macro_f1"},
        {"calibration_images": 16},
    ],
)
def test_odd_settings_work(run_copy: Run, fake_target: Any, judge: Any, changes: dict[str, Any]) -> None:
    settings = SETTINGS.model_copy(update=changes)
    found = search(run_copy, ["macs<=700K"], settings=settings, target=fake_target())
    assert found.best.costs["macs"] <= 700e3


@pytest.mark.parametrize(
    "change", [{"evaluations": 0}, {"random": -1}, {"finalists": 0}, {"batch": 1.5}, {"profile_children": 7}, {"rung_factor": 1},
               {"first_rung": 0}, {"unknown": 1}, {"format": 2}, {"seed": -1}, {"zones": -1}]
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        load_search_config("default", change)


def test_the_shipped_settings_are_read() -> None:
    assert load_search_config("default") == SearchConfig(name="default")


# --- what is told and kept ---


def test_progress_counts_up_to_what_was_announced(run_copy: Run, fake_target: Any, judge: Any) -> None:
    events: list[Event] = []
    found = search(run_copy, ["latency_ms<=0.05"], settings=SETTINGS, target=fake_target(), progress=events.append)
    evaluating = [event for event in events if event.doing.startswith("evaluating")]
    done = [event.done for event in evaluating]
    assert done == sorted(done) and done[0] == 0
    assert found.evaluated <= evaluating[-1].total + 2  # the two ends of the space
    assert all(event.done <= event.total for event in evaluating)
    assert all(row["score"] <= 1 and row["macs"] > 0 for event in evaluating[1:] for row in event.front)
    assert [event.doing for event in events][:2] == [
        "timing the smallest child",
        "timing blocks and children on fake: group 1 of 1",
    ]
    assert events[-1].doing == "measuring finalists"


def test_the_outcome_is_saved_and_read_back(run_copy: Run, fake_target: Any, judge: Any) -> None:
    found = search(run_copy, ["latency_ms<=0.02", "macs<=1M"], settings=SETTINGS, target=fake_target())
    assert Found.load(run_copy) == found


def test_a_run_that_was_not_trained_is_refused(run_copy: Run, fake_target: Any, judge: Any) -> None:
    shutil.rmtree(run_copy.checkpoints)
    with pytest.raises(InputError, match="not trained to its end"):
        search(run_copy, [], settings=SETTINGS, target=fake_target())


def test_a_finalist_is_exported_and_measured_once(
    run_copy: Run, fake_target: Any, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[str] = []
    probed = Bench._exported

    def counted(bench: Bench, arch: Arch) -> Any:
        exported.append(arch.key)
        return probed(bench, arch)

    monkeypatch.setattr(Bench, "_exported", counted)
    for budget in ("macs<=600K", "macs<=700K"):
        search(run_copy, [budget], settings=SETTINGS, target=fake_target())
    assert len(exported) == len(set(exported))


def test_real_children_of_a_trained_run_are_found(tiny_searched: tuple[Run, Found]) -> None:
    """Without any stand-in but the clock: trained weights, calibrated children, real exports."""
    run, found = tiny_searched
    assert found.best.costs["macs"] <= 500_000
    assert found.best.search_score > 0.8  # a third would be chance
    assert found.best.confirm_score is not None and found.best.confirm_score > 0.8
    with Store.existing(search_file(run)) as store:
        assert store.identity == identity(run, SETTINGS)
        assert {child.key for child in found.finalists} <= {row.key for row in store.confirmed(samples=False)}
        assert len(store.rows()) == found.evaluated


# --- a process that is killed ---

DRIVER = """
import sys
from pathlib import Path

import deploy.targets
import search.evaluate
from conftest import FakeTarget

deploy.targets.Local = lambda threads=1, **_: FakeTarget()
log, advance = Path(sys.argv.pop(1)), search.evaluate.SharedEvaluator.advance

def logged(self, archs, rung):
    found = advance(self, archs, rung)
    with log.open("a") as file:
        file.write("".join(f"{arch.key} {rung}\\n" for arch in found))
    return found

search.evaluate.SharedEvaluator.advance = logged
import nestling

nestling.main()
"""


def start_search(run: Run, log: Path, settings: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(log),
        "search",
        str(run.path),
        "--budget",
        "macs<=600K",
        "--search",
        str(settings),
        "--json",
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def logged(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.slow
def test_a_search_that_is_killed_and_run_again_repeats_nothing_that_was_stored_and_finds_the_same(
    tiny_run: Run, tmp_path: Path
) -> None:
    settings = tmp_path / "search.yaml"
    settings.write_text("evaluations: 30\nbatch: 4\nfinalists: 2\nfirst_rung: 10\nrandom: 4\npolish: 4\n")
    whole = start_search(copy_of(tiny_run, tmp_path / "whole"), tmp_path / "whole.log", settings)
    out, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    run, log = copy_of(tiny_run, tmp_path / "killed"), tmp_path / "killed.log"
    stored: set[str] = set()
    for evaluations in (3, 17, 40):  # killed three times, then left alone
        process = start_search(run, log, settings)
        while len(logged(log)) < evaluations:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Store.existing(search_file(run)) as store:  # whole, whenever it is killed
            now = {f"{row.key} {rung}" for row in store.rows() for rung in range(row.rung + 1)}
        assert stored <= now <= set(logged(log))
        assert len(set(logged(log)) - now) <= 4  # at most the batch that was just being stored
        stored = now
        log.write_text("".join(f"{line}\n" for line in logged(log) if line in stored))
    last = start_search(run, log, settings)
    again, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    lines = logged(log)
    assert len(set(lines)) == len(lines)
    assert sorted(lines) == sorted(logged(tmp_path / "whole.log"))
    strip = {"date", "spent"}
    results = [
        json.loads(text, object_hook=lambda value: {k: v for k, v in value.items() if k not in strip}) for text in (out, again)
    ]
    assert results[0] == results[1]


def test_an_unfinished_run_is_not_searched_and_an_outcome_of_older_weights_not_exported(
    searched_copy: Run, fake_target: Any
) -> None:
    run = searched_copy
    newest = checkpoint.load(sorted(run.checkpoints.glob("step-*"))[-1])
    later = {name: tensor + 1 for name, tensor in newest.tensors["weights"].items()}
    checkpoint.save(
        run.checkpoints, checkpoint.Checkpoint(newest.step + 1, {"weights": later}, {**newest.state, "finished": False})
    )
    run = Run.open(run.path)
    with pytest.raises(InputError, match="not trained to its end"):
        search(run, [], settings=SETTINGS, target=fake_target())
    with pytest.raises(InputError, match="other weights"):
        Found.load(run)
    with pytest.raises(InputError, match="other weights"):
        best_of(run)


def test_a_child_of_its_own_budgets_is_really_searched_for(run_copy: Run, fake_target: Any, judge: Any) -> None:
    settings = SETTINGS.model_copy(update={"evaluations": 24, "options": {"coarse": 4}})
    found = search(run_copy, [], settings=settings, target=fake_target(), children=("params<=16K, macs>=150K",))
    own = found.answers[1]
    assert own.name == "params<=16K, macs>=150K" and own.child.costs["params"] <= 16e3 and own.child.costs["macs"] >= 150e3
    with Store.existing(search_file(run_copy)) as store:
        inside = [row for row in store.rows() if row.costs["params"] <= 16e3 and row.costs["macs"] >= 150e3]
    assert len(inside) >= 8


def test_a_front_holds_a_child_for_every_part_of_the_range(run_copy: Run, fake_target: Any, judge: Any) -> None:
    found = search(run_copy, ["latency_ms<=0.04"], settings=SETTINGS, target=fake_target(), front=3)
    names = [answer.name for answer in found.answers]
    assert names == ["best", "front 1 of 3", "front 2 of 3", "front 3 of 3"]
    highs = [answer.child.latency.high for answer in found.answers[1:] if answer.child.latency]
    caps = [parse_all(answer.budgets[-1:])[0].bound for answer in found.answers[1:]]
    assert caps == sorted(caps) and all(high <= cap for high, cap in zip(highs, caps, strict=True))
    assert Found.load(run_copy) == found


@pytest.mark.parametrize("strategy", ["predicted", "optuna:tpe", "reinforce", "mcts", "random"])
def test_every_strategy_goes_the_whole_way(run_copy: Run, fake_target: Any, judge: Any, strategy: str) -> None:
    pytest.importorskip("optuna")
    settings = SETTINGS.model_copy(update={"strategy": strategy, "options": {}, "evaluations": 8})
    found = search(run_copy, ["macs<=700K"], settings=settings, target=fake_target())
    assert found.best.costs["macs"] <= 700e3
    assert search(run_copy, ["macs<=700K"], settings=settings, target=fake_target()).best == found.best


def test_what_is_kept_of_a_confirmed_child_is_the_metric_of_the_task_whatever_the_search_was_for(
    run_copy: Run, judge: Any, probes: None, fake_target: Any
) -> None:
    settings = SETTINGS.model_copy(update={"objective": "macro_f1"})
    found = search(run_copy, ["macs<=600K"], settings=settings, target=fake_target())
    labels = run_copy.dataset.split("confirm").labels
    with Store.existing(run_copy.path / "search" / "search.sqlite") as store:
        rows = {row.key: row for row in store.confirmed()}
    for row in rows.values():
        samples = unpack(row.samples, row.images, run_copy.task.columns)
        assert row.score == pytest.approx(float((samples["rank"] == 0).mean()))
    samples = unpack(rows[found.best.key].samples, len(labels), run_copy.task.columns)
    wanted = OBJECTIVES["macro_f1"].values(samples, labels, len(run_copy.classes)).mean()
    assert found.best.confirm_score == pytest.approx(wanted)
