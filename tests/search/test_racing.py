"""Races of simulated children: who leaves, what was compared, and how often the true winner is lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from search.objective import OBJECTIVES, on_first
from search.racing import Known, Race, Raced, _quantile, _Scored, regressed
from search.rungs import Rung, rungs
from search.statistics import significantly_worse
from supernet.arch import Arch
from supernet.errors import InputError

IMAGES = 4000
STEPS = rungs(IMAGES, 1024)


def arch(number: int) -> Arch:
    return Arch((("number", number),))


def bits(
    accuracies: list[float] | np.ndarray, rng: np.random.Generator, images: int = IMAGES, shared: float = 0.95
) -> np.ndarray:
    """Right or wrong of children with these true accuracies, of which the images' difficulty makes most."""
    noise = rng.standard_normal((len(accuracies), images))
    ease = stats.norm.ppf(np.asarray(accuracies))[:, None]
    return ease + math.sqrt(shared) * rng.standard_normal(images) + math.sqrt(1 - shared) * noise > 0


class Track:
    """Gives out the first values of children, and remembers who asked for what."""

    def __init__(self, values: np.ndarray, steps: tuple[Rung, ...] = STEPS, failing: dict[int, int] | None = None) -> None:
        self.values, self.steps, self.failing = values, steps, failing or {}
        self.archs = [arch(number) for number in range(len(values))]
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def advance(self, archs: list[Arch], rung: int) -> dict[Arch, np.ndarray]:
        numbers = [int(one["number"]) for one in archs]
        self.asked.append((tuple(numbers), rung))
        return {
            arch(number): self.values[number, : self.steps[rung].images]
            for number in numbers
            if self.failing.get(number) != rung
        }

    def run(
        self, zones: np.ndarray | None = None, leaders: list[Known | None] | None = None, alpha: float = 0.1,
        significance: float = 0.025, protected: tuple[int, ...] = (), references: list[Known] | None = None,
    ) -> dict[int, Raced]:  # fmt: skip
        zones = np.ones((len(self.archs), 1), dtype=bool) if zones is None else zones
        raced = Race(self.steps, alpha, significance).run(
            self.archs, zones, leaders or [None] * zones.shape[1], self.advance, [arch(number) for number in protected],
            references or [],
        )  # fmt: skip
        return {int(one["number"]): result for one, result in raced.items()}


def forwards(raced: dict[int, Raced], steps: tuple[Rung, ...] = STEPS) -> int:
    return sum(steps[one.rung].images + steps[one.rung].calibration_images for one in raced.values())


# -- the rules ---------------------------------------------------------------------------------------------------------------


def test_the_worse_leave_and_the_best_runs_to_the_end() -> None:
    track = Track(bits([0.4, 0.7, 0.4, 0.68, 0.1], np.random.default_rng(0)))
    raced = track.run()
    assert list(raced) == [0, 1, 2, 3, 4]
    assert [one.rung for one in raced.values()] == [0, 2, 0, 1, 0]
    assert [one.decided for one in raced.values()] == [False, True, False, False, False]
    assert track.asked == [((0, 1, 2, 3, 4), 0), ((1, 3), 1), ((1,), 2)]
    for number, one in raced.items():
        assert (one.values == track.values[number, : STEPS[one.rung].images]).all()


def test_a_known_leader_is_a_rival() -> None:
    values = bits([0.8, 0.6, 0.61], np.random.default_rng(0))
    track = Track(values[1:])
    assert [one.rung for one in track.run(leaders=[values[0]]).values()] == [0, 0]
    assert track.asked == [((0, 1), 0)]
    assert all(one.decided for one in Track(values[1:]).run().values())


def test_of_a_leader_only_the_same_images_and_the_mean_count() -> None:
    rng = np.random.default_rng(0)
    values = bits([0.72, 0.70, 0.69, 0.68], rng)
    turned = np.concatenate([values[0, :1024], rng.permutation(values[0, 1024:])])
    results = [Track(values[1:]).run(leaders=[leader]) for leader in (values[0], turned)]
    assert [one.rung for one in results[0].values()] == [one.rung for one in results[1].values()]
    elsewhere = np.concatenate([np.sort(values[0, :256]), values[0, 256:]])  # the same mean, but on other images
    assert [one.rung for one in Track(values[1:]).run(leaders=[elsewhere]).values()] != [
        one.rung for one in results[0].values()
    ]


def test_zones_are_left_one_by_one() -> None:
    """A child lives while it may win in one of its zones."""
    values = bits([0.8, 0.5, 0.5, 0.5, 0.3], np.random.default_rng(0))
    zones = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0]], bool)
    raced = Track(values).run(zones)
    assert [raced[number].decided for number in range(5)] == [True, False, True, True, False]
    assert raced[4].rung == 0
    assert raced[1].rung == 0


def test_leaders_of_other_zones_are_no_rivals() -> None:
    values = bits([0.9, 0.5], np.random.default_rng(0))
    raced = Track(values[1:]).run(np.array([[False, True]]), [values[0], None])
    assert raced[0].decided


def test_the_protected_run_to_the_end() -> None:
    track = Track(bits([0.8, 0.2, 0.2], np.random.default_rng(0)))
    raced = track.run(np.array([[True], [True], [False]]), protected=(1, 2))
    assert all(one.decided for one in raced.values())


def test_the_failed_are_left_out_and_asked_no_more() -> None:
    values = bits([0.8, 0.79, 0.78, 0.2], np.random.default_rng(0))
    track = Track(values, failing={0: 1, 2: 0, 3: 0})
    assert list(track.run()) == [1]
    assert track.asked == [((0, 1, 2, 3), 0), ((0, 1), 1), ((1,), 2)]
    assert Track(values, failing=dict.fromkeys(range(4), 0)).run() == {}


def test_the_order_of_the_children_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    values, order = bits(rng.uniform(0.6, 0.7, 12), rng), rng.permutation(12)
    straight, turned = Track(values).run(), Track(values[order]).run()
    assert len({one.rung for one in straight.values()}) == 3
    assert [turned[position].rung for position in range(12)] == [straight[number].rung for number in order]


@pytest.mark.parametrize("images", [1, 2, 3, 5, 4000])
def test_identical_children_stay_together(images: int) -> None:
    values = np.repeat(bits([0.6], np.random.default_rng(0)), 4, axis=0)
    steps = (Rung(images, 256), Rung(images + 1000, 256))
    longer = np.concatenate([values, values], axis=1)[:, : images + 1000]
    assert all(one.decided for one in Track(longer, steps).run(leaders=[longer[0]], references=[longer[1]]).values())
    assert all(one.decided for one in Track(np.ones_like(longer), steps).run().values())


@pytest.mark.parametrize("images", [1, 2])
def test_a_few_images_decide_nothing(images: int) -> None:
    values = np.array([[True], [False]]).repeat(1000, axis=1)
    assert all(one.decided for one in Track(values, (Rung(images, 256), Rung(1000, 256))).run().values())


def test_a_single_rung_is_no_race() -> None:
    values = bits([0.9, 0.1], np.random.default_rng(0))
    assert all(one.decided for one in Track(values, rungs(4000, 256, first=4000)).run().values())
    assert Track(values[:0]).run() == {}


def test_a_stricter_race_keeps_more() -> None:
    values = bits(np.random.default_rng(1).normal(0.7, 0.02, 24), np.random.default_rng(0))
    kept = [
        forwards(Track(values).run(alpha=alpha, significance=level))
        for alpha, level in ((0.2, 0.025), (0.1, 0.025), (0.02, 0.025), (0.02, 0.5))
    ]
    assert kept == sorted(set(kept))


# -- what it is worth --------------------------------------------------------------------------------------------------------


def barely_ahead(values: np.ndarray, rng: np.random.Generator, leads: float = 1.2) -> np.ndarray:
    """The last child, made better or worse until its lead over the best other one is so many times the least significant one."""
    best, last = values[values[:-1].mean(1).argmax()], values[-1].copy()
    least = 1.96 * math.sqrt(np.mean(best != last) / last.size)
    missing = round((best.mean() + leads * least - last.mean()) * last.size)
    last[rng.choice(np.flatnonzero(last != (missing > 0)), abs(missing), replace=False)] = missing > 0
    return last


@pytest.mark.parametrize("led", [False, True])
def test_a_child_that_would_win_is_dropped_as_seldom_as_promised(led: bool) -> None:
    """`alpha`, for winners barely significant on all images; a leader and references that no race has chosen."""
    dropped, races = 0, 100
    for seed in range(races):
        rng = np.random.default_rng([seed, 23 + led])
        values = bits(np.append(rng.normal(0.69, 0.006, 23), 0.71), rng, 2000)
        values[-1] = barely_ahead(values, rng)
        track = Track(values[12:], rungs(2000, 1024))
        leader = int(values[:12].mean(1).argmax())
        raced = track.run(leaders=[values[leader]], references=list(values[:12])) if led else track.run()
        dropped += not raced[11].decided
    assert dropped / races <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / races)


def search(seed: int, alpha: float = 0.1) -> tuple[float, float, bool]:
    """Ten batches of 16: how many fewer forwards, the loss of true accuracy, and whether the final child is significantly worse."""
    rng = np.random.default_rng([seed, 29])
    true = rng.normal(0.7, 0.01, 160)
    values = bits(true, rng, shared=0.96)
    decided: list[int] = []
    spent = 0
    for start in range(0, 160, 16):
        leader = max(decided, key=lambda child: values[child].mean(), default=None)
        raced = Track(values[start : start + 16]).run(
            leaders=[None if leader is None else values[leader]], references=list(values[decided[-32:]]), alpha=alpha
        )
        spent += forwards(raced)
        decided += [start + number for number, one in raced.items() if one.decided]
    final, winner = max(decided, key=lambda child: values[child].mean()), int(values.mean(1).argmax())
    return 160 * (4000 + 1024) / spent, true[winner] - true[final], significantly_worse(values[final], values[winner])


@pytest.mark.slow
def test_a_search_by_races_ends_as_well_with_a_quarter_of_the_forwards() -> None:
    ratios, losses, worse = zip(*(search(seed) for seed in range(100)), strict=True)
    assert 1 / np.mean(1 / np.array(ratios)) >= 4
    assert np.mean(worse) <= 0.05
    assert np.mean(losses) <= 0.002


def test_a_few_searches_by_races() -> None:
    ratios, losses, worse = zip(*(search(seed) for seed in range(8)), strict=True)
    assert 1 / np.mean(1 / np.array(ratios)) >= 4
    assert not any(worse)
    assert np.mean(losses) <= 0.003


# -- the estimate of what comes ----------------------------------------------------------------------------------------------


def test_references_make_the_estimate_better_and_no_less_honest() -> None:
    """Against the paired difference to one child; errors are as large as the residuals say."""
    squares, paired, claimed, errors = [], [], [], []
    for seed in range(60):
        values = bits([0.7] * 24, np.random.default_rng([seed, 31])).astype(np.float64)
        known = [_Scored.of(one, IMAGES) for one in values[:20]]
        finals, residuals = regressed(values[20:, :256], known)
        off = finals - values[20:].mean(1)
        errors += list(off)
        squares.append(np.mean(off**2))
        claimed.append(np.mean(residuals**2) * (1 / 256 - 1 / IMAGES))
        away = values[20:, :256].mean(1) - values[0, :256].mean() + values[0].mean()
        paired.append(np.mean((away - values[20:].mean(1)) ** 2))
    assert np.mean(squares) < 0.65 * np.mean(paired)
    assert 0.8 < np.mean(squares) / np.mean(claimed) < 1.2
    assert abs(np.mean(errors)) < 3 * math.sqrt(np.mean(squares) / len(errors) * 2)


def test_an_easy_start_is_seen_through() -> None:
    """The first images are easier than the rest: references tell, and the estimate is of all images."""
    rng = np.random.default_rng(0)
    values = bits([0.7] * 17, rng).astype(np.float64)
    values = values[:, np.argsort(-values[:8].mean(0) + 0.8 * rng.random(IMAGES), kind="stable")]
    finals, _ = regressed(values[8:, :1000], [_Scored.of(one, IMAGES) for one in values[:8]])
    assert values[8:, :1000].mean() > values[8:].mean() + 0.1
    assert finals == pytest.approx(values[8:].mean(1), abs=0.05)


def test_without_references_it_is_the_mean() -> None:
    values = bits([0.7, 0.6], np.random.default_rng(0)).astype(np.float64)
    constant = [_Scored.of(np.ones(IMAGES), IMAGES)]
    for known in ([], constant):
        finals, residuals = regressed(values[:, :100], known)
        assert finals == pytest.approx(values[:, :100].mean(1))
        assert residuals == pytest.approx(values[:, :100] - finals[:, None])


@pytest.mark.parametrize(("rivals", "table"), [(1, 1.64), (2, 1.92), (3, 2.06), (5, 2.23), (9, 2.42)])
def test_quantiles_are_those_of_dunnett(rivals: int, table: float) -> None:
    """Dunnett (1955), table 1a: one-sided, 5 %, infinite degrees of freedom."""
    assert _quantile(rivals, 0.05) == pytest.approx(table, abs=0.006)


# -- other objectives --------------------------------------------------------------------------------------------------------


def test_floats_race() -> None:
    rng = np.random.default_rng(0)
    quality = np.array([25.0, 24.0, 24.9, 22.0])
    values = quality[:, None] + rng.normal(0, 4, 2000) + rng.normal(0, 1, (4, 2000))
    raced = Track(values.astype(np.float32), (Rung(256, 256), Rung(2000, 256))).run()
    assert [one.decided for one in raced.values()] == [True, False, True, False]


@pytest.mark.parametrize("name", ["macro_f1", "balanced_accuracy"])
def test_objectives_that_weigh_classes_race_against_leaders_on_the_same_images(name: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 2000, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    right = bits([0.8, 0.79, 0.6], rng, 2000)
    predicted = np.where(right, labels, (labels + 1) % 5)
    samples = [{"predicted": row, "rank": (row != labels).astype(np.uint16)} for row in predicted]
    known = [on_first(OBJECTIVES[name], one, labels, 5) for one in samples]
    steps = (Rung(300, 256), Rung(2000, 256))

    def advance(archs: list[Arch], rung: int) -> dict[Arch, np.ndarray]:
        return {one: known[int(one["number"])](steps[rung].images) for one in archs}

    raced = Race(steps).run([arch(1), arch(2)], np.ones((2, 1), bool), [known[0]], advance, references=known[:1])
    assert [one.decided for one in raced.values()] == [True, False]


# -- mistakes ----------------------------------------------------------------------------------------------------------------

TWO = [arch(0), arch(1)]
BOTH = np.ones((2, 1), dtype=bool)


def give(values: np.ndarray) -> object:
    return lambda archs, rung: dict.fromkeys(archs, values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Race([]), "rungs of more and more images"),
        (lambda: Race([Rung(10, 1), Rung(10, 1)]), "rungs of more and more images"),
        (lambda: Race(STEPS, alpha=0), "alpha lies between"),
        (lambda: Race(STEPS, significance=0.6), "significance above 0"),
        (lambda: Race(STEPS).run([arch(0)] * 2, BOTH, [None], give(np.ones(256))), "distinct"),
        (lambda: Race(STEPS).run(TWO, BOTH[:1], [None], give(np.ones(256))), "zones are bools"),
        (lambda: Race(STEPS).run(TWO, BOTH.astype(int), [None], give(np.ones(256))), "zones are bools"),
        (lambda: Race(STEPS).run(TWO, BOTH, [], give(np.ones(256))), "zones are bools"),
        (lambda: Race(STEPS).run(TWO, BOTH, [None], give(np.ones(255))), "the same 256 images"),
        (lambda: Race(STEPS).run(TWO, BOTH, [None], give(np.full(256, np.nan))), "finite values"),
        (lambda: Race(STEPS).run(TWO, BOTH, [np.ones(256)], give(np.ones(256))), "the same 4000 images"),
        (lambda: Race(STEPS).run(TWO, BOTH, [None], give(np.ones(256)), references=[np.ones(9)]), "the same 4000 images"),
    ],
)
def test_mistakes_are_told_in_one_line(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
