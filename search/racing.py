"""Racing: children are scored on more and more images, and those that cannot become the best leave early.

A *zone* is a budget, or a part of one, in which children compete; its *leader* is the best child so far, scored on all images.
After each rung but the last an arch leaves if in every zone it belongs to some rival is too far ahead: the leader, or an arch of this
race, on the same images. What a child will have on all images is estimated by its own values and by those of the *references*
(children scored on all images, the leaders among them): where the images so far were easier for these than all images are, they
were for the child (the regression estimator of survey sampling; Cochran 1977, chapter 7). Images still to come are finite in number,
so the error shrinks by 1 - images / all images.

The guarantee is one on the result. Let a child, scored on all images, be significantly better (one-sided, level `significance`)
than every rival of its zone that the race finishes; it is dropped with a chance of at most about `alpha`, all rungs and rivals
together. Children that would be ahead by less than that are dropped more freely: on all images nobody could tell them from the
leader. Since only the loss of the final winner matters, the chance is the same for any number of children and races.

It holds for images in random order (those of the splits are), normal errors, as far as a rung's calibration does not shift a child's
score, and against leaders and references that no race has chosen: simulated, 2 % are dropped at an alpha of 10 %. Those that came
through races were lucky on the first images, which makes later races harsher: of children that are barely significant
`benchmarks/racing.py` sees 6 % dropped at an alpha of 5 %, 16 % at 10 % (and 36 % by successive halving of the same price).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.rungs import Rung
from supernet.arch import Arch
from supernet.errors import InputError

Values = NDArray[Any]
Floats = NDArray[np.float64]
Known = Values | Callable[[int], Values]
"""Values of a child on all images; or, where those of the first n are not the first n of them (`search.objective`), a function of n."""

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Weights on the references are drawn towards their mean; how much (of a reference's square sum) is told by leaving images out."""
LEADER_SHARE = 0.9
"""Of alpha, where a zone has a leader; the rest is for rivals in the race."""


@dataclass(frozen=True, slots=True)
class Raced:
    """How an arch fared: its values on the images of its last rung, that rung, and whether it came to the end."""

    values: Values
    rung: int
    decided: bool


@dataclass(frozen=True)
class Race:
    """Rules of a race. `alpha` is the chance to drop a child that would have won significantly (one-sided, at `significance`).

    0.025 is that of the two-sided tests in reports. A `significance` of 0.5 protects any lead at all, and drops fewer.
    """

    rungs: Sequence[Rung]
    alpha: float = 0.1
    significance: float = 0.025

    def __post_init__(self) -> None:
        images = [rung.images for rung in self.rungs]
        if not images or images != sorted(set(images)):
            raise InputError(f"a race needs rungs of more and more images, but got {images}: see search.rungs.rungs")
        if not (0 < self.alpha < 0.5 and 0 < self.significance <= 0.5):
            raise InputError(f"alpha lies between 0 and 0.5 and significance above 0 and up to 0.5, but got {self.alpha} and "
                             f"{self.significance}: 0.1 and 0.025 are usual")  # fmt: skip

    def run(
        self, archs: Sequence[Arch], zones: NDArray[np.bool_], leaders: Sequence[Known | None],
        advance: Callable[[list[Arch], int], Mapping[Arch, Values]], protected: Collection[Arch] = (),
        references: Sequence[Known] = (),
    ) -> dict[Arch, Raced]:  # fmt: skip
        """Race distinct `archs` and tell how far each came, in their order; those that failed are left out.

        `zones` (archs, zones) says who competes where; `leaders` are those of the zones, None where there is none yet.
        `advance(archs, rung)` gives each arch's values on all images of that rung, from the first; an arch missing in it failed.
        `protected` archs run to the end. Archs of no zone are dropped after the first rung. `references` are more children that
        were scored on all images, best 16 to 64 of cost alike; with them decisions come earlier.
        Raises `InputError` where shapes do not fit or values are not finite.
        """
        self._check(archs, zones, leaders)
        whole = self.rungs[-1].images
        known_leaders = [None if leader is None else _Scored.of(leader, whole) for leader in leaders]
        known = [*(leader for leader in known_leaders if leader), *(_Scored.of(one, whole) for one in references)]
        zones_of = dict(zip(archs, zones, strict=True))
        raced: dict[Arch, Raced] = {}
        running = list(archs)
        for step, rung in enumerate(self.rungs):
            given = advance(list(running), step) if running else {}
            for failed in set(running) - set(given):
                raced.pop(failed, None)
            running = [arch for arch in running if arch in given]
            raced |= {arch: Raced(_checked(given[arch], rung.images), step, rung.images == whole) for arch in running}
            if running and rung.images < whole:
                leads = _Leads.on(np.stack([raced[arch].values for arch in running]), known_leaders, known, whole,
                                  _normal_quantile(self.significance))  # fmt: skip
                out = self._beaten(leads, np.stack([zones_of[arch] for arch in running]))
                running = [arch for arch, beaten in zip(running, out, strict=True) if arch in protected or not beaten]
        return {arch: raced[arch] for arch in archs if arch in raced}

    def _beaten(self, leads: _Leads, zones: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which children are beaten in every zone that they are in, shape (children,)."""
        alpha = self.alpha / (len(self.rungs) - 1)
        beaten = np.ones(len(zones), dtype=bool)
        for zone, of_leader in enumerate(leads.of_leaders):
            inside = np.flatnonzero(zones[:, zone])
            if not len(inside):
                continue
            rivals, share = len(inside) - 1, 0.0
            out = np.zeros(len(inside), dtype=bool)
            if of_leader is not None:
                share = LEADER_SHARE if rivals else 1.0
                out |= of_leader[inside] > _normal_quantile(alpha * share)
            if rivals:
                out |= leads.of_rivals[np.ix_(inside, inside)].max(1) > _quantile(rivals, alpha * (1 - share))
            beaten[inside] &= out
        return beaten

    def _check(self, archs: Sequence[Arch], zones: NDArray[np.bool_], leaders: Sequence[Known | None]) -> None:
        if len(set(archs)) != len(archs):
            raise InputError(
                f"the archs of a race are distinct, but of {len(archs)} only {len(set(archs))} are: leave repeats out"
            )
        if zones.shape != (len(archs), len(leaders)) or zones.dtype != bool:
            raise InputError(f"zones are bools for each of {len(archs)} archs and {len(leaders)} leaders, but are {zones.dtype} of "
                             f"shape {zones.shape}: give a column a zone, and a leader or None for it")  # fmt: skip


@dataclass(frozen=True)
class _Scored:
    """A child scored on all images."""

    mean: float
    first: Callable[[int], Values]

    @classmethod
    def of(cls, known: Known, whole: int) -> _Scored:
        values = _checked(known if isinstance(known, np.ndarray) else known(whole), whole)
        first = (lambda images: values[:images]) if isinstance(known, np.ndarray) else known
        return cls(float(values.mean(dtype=np.float64)), first)


@dataclass(frozen=True)
class _Leads:
    """By how many standard errors each child would miss even the smallest lead that counts, on all images, over a rival."""

    of_leaders: list[Floats | None]
    """A zone: shape (children,), or None without a leader."""
    of_rivals: Floats
    """Shape (children, children): over each of the others in the race; nothing (-inf) over itself."""

    @classmethod
    def on(cls, values: Values, leaders: Sequence[_Scored | None], known: Sequence[_Scored], whole: int, lead: float) -> _Leads:
        """From the children's `values`; `lead` is the smallest that counts, in standard errors of a difference on all images.

        As Agresti and Min (2005) do, each pair gets two images more, one for either side, with the largest difference seen.
        """
        images = values.shape[1]
        present = [leader for leader in leaders if leader]
        first = [_checked(leader.first(images), images).astype(np.float64) for leader in present]
        rows = np.stack([*values.astype(np.float64), *first])
        finals, residuals = regressed(rows[: len(values)], known)
        finals = np.append(finals, [leader.mean for leader in present])
        residuals = np.concatenate([residuals, np.zeros((len(present), images))])
        ahead = finals[:, None] - finals
        most = float(np.ptp(rows, axis=0).max())
        variance = (_squares(residuals) + 2 * most**2) / images + ahead**2
        error = np.sqrt(variance * (1 / images - 1 / whole))
        least = lead * np.sqrt(np.maximum(_squares(rows - rows.mean(1, keepdims=True)), 0) / images / whole)
        missing = np.divide(least - ahead, error, out=np.zeros_like(error), where=error > 0)
        np.fill_diagonal(missing, -np.inf)
        children = slice(len(values))
        columns = iter(missing[children, len(values) :].T)
        return cls([next(columns) if leader else None for leader in leaders], missing[children, children])


def regressed(values: Floats, known: Sequence[_Scored]) -> tuple[Floats, Floats]:
    """From values (children, images so far): the means on all images to expect, and the distance of each image to its prediction.

    Shapes (children,) and (children, images). Ridge regression of each child on the references: their mean, and weights around
    it. The distances are those of images left out of the fit (Allen 1974), so that many references do not flatter; the ridge is
    the one for which they are least.
    """
    images, means = values.shape[1], values.mean(1, keepdims=True)
    if not known:
        return means[:, 0], values - means
    first = np.stack([_checked(one.first(images), images).astype(np.float64) for one in known])
    inputs = first - first.mean(1, keepdims=True)
    toward_all = np.array([one.mean for one in known]) - first.mean(1)
    away = values - means - inputs.mean(0)  # from the mean reference
    left, singular, right = np.linalg.svd(inputs, full_matrices=False)  # (references, k), (k,), (k, images)
    total = float(np.sum(singular**2)) / len(known)
    if total == 0:
        return means[:, 0], values - means
    inner = away @ right.T
    best: tuple[float, Floats, Floats] | None = None
    for ridge in RIDGES:
        kept = singular**2 / (singular**2 + ridge * total)
        leverage = 1 / images + kept @ right**2
        residuals = (away - inner * kept @ right) / np.maximum(1 - leverage, 1e-3)
        loss = float(np.sum(residuals**2))
        if best is None or loss < best[0]:
            weights = 1 / len(known) + (inner * singular / (singular**2 + ridge * total)) @ left.T
            best = loss, means[:, 0] + weights @ toward_all, residuals
    assert best is not None
    return best[1], best[2]


@lru_cache
def _normal_quantile(alpha: float) -> float:
    from scipy.stats import norm

    return float(norm.isf(alpha))


@lru_cache
def _quantile(rivals: int, alpha: float) -> float:
    """Exceeded with a chance of `alpha` by the best of equal rivals, in standard errors of its lead over the child.

    The rivals' leads all hold the child's own luck (correlation 1/2): Gupta (1965), Dunnett (1955).
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    points, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def beyond(quantile: float) -> float:
        return float(1 - weights @ norm.cdf(math.sqrt(2) * quantile + points) ** rivals) - alpha

    return float(brentq(beyond, -10.0, 12.0))


def _squares(rows: Floats) -> Floats:
    """Sum of the squared differences of each two rows, shape (rows, rows)."""
    products = rows @ rows.T
    own = np.diag(products)
    return np.maximum(own[:, None] + own - 2 * products, 0)


def _checked(values: Values, images: int) -> Values:
    if values.shape != (images,) or not np.isfinite(values).all():
        raise InputError(f"a race compares children on the same {images} images by finite values, but got values of shape "
                         f"{values.shape}: score every image")  # fmt: skip
    return values
