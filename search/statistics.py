"""Which children really differ: all comparisons are of the same images, and the best of many is never taken at its word.

Values have the shape (images,) for one child and (children, images) for several: bools (right or wrong) or floats, larger is better.

*Pairs.* Bools are compared by the exact McNemar test (the binomial test of the images on which just one child is right), floats by
the paired t test. For several pairs named beforehand `holm` holds the chance of any false claim at `alpha`.

*The best of several.* `confidence_set` says which children may be the best. Holm's tests of each child against the observed best
would not: that child was picked because it looked best, so its luck is in every test. Of 10 equal children (8 % of the images
discordant, 2,000 images, 2,000 runs) that way calls some child worse in 13 % of the runs instead of 5 %, `confidence_set` in 4.5 %.

*What to report.* The largest of several means is too large (the winner's curse); `shrunk` gives the estimate to print.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from supernet.errors import InputError
from supernet.task import Classification, Comparison, Estimate, Regression

Values = NDArray[Any]
Floats = NDArray[np.float64]

MOST_DRAWN = 4_000_000
"""Images drawn at a time by the bootstrap (32 MB)."""


def compare(one: Values, other: Values) -> Comparison:
    """Mean of one child less that of another on the same images: exact McNemar test of bools, paired t test of floats.

    Raises `InputError` for no images (floats: fewer than two), for values that are not finite and for shapes that differ.
    """
    _check_pair(one, other)
    if one.dtype == bool and other.dtype == bool:
        return Classification().compare(one, other)
    return Regression().compare(one.astype(np.float64), other.astype(np.float64))


def paired_bootstrap(one: Values, other: Values, rng: np.random.Generator, resamples: int = 2000) -> Comparison:
    """The same by drawing images anew, with replacement (Efron 1979): percentile interval, two-sided p (2/(resamples + 1) or more).

    Raises `InputError` as `compare` does.
    """
    _check_pair(one, other)
    if not len(one):
        raise InputError("children are compared on at least one image, but there is none: give more images")
    steps, counts = np.unique(one.astype(np.float64) - other.astype(np.float64), return_counts=True)
    means = np.concatenate([  # images of equal difference are drawn together
        rng.multinomial(len(one), counts / len(one), size=size) @ steps / len(one)
        for size in _pieces(resamples, len(steps))
    ])  # fmt: skip
    difference = float(counts @ steps / len(one))
    low, high = np.quantile(means, [0.025, 0.975])
    slack = 1e-12 * float(np.abs(steps).max())
    beyond = min(int(np.sum(means <= slack)), int(np.sum(means >= -slack)))
    return Comparison(difference, float(low), float(high), min(1.0, 2 * (beyond + 1) / (resamples + 1)))


def holm(p_values: ArrayLike) -> Floats:
    """Adjusted p of several tests, in their order: those at most alpha may all be claimed, with a chance of alpha of any false one.

    Holm (1979), step-down Bonferroni. Raises `InputError` for what is no probability.
    """
    given: Floats = np.asarray(p_values, np.float64)
    if given.ndim != 1 or not ((given >= 0) & (given <= 1)).all():
        raise InputError(f"p values are a list of numbers from 0 to 1, but got {p_values!r}: give the p of each test")
    order = np.argsort(given, kind="stable")
    steps = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def confidence_set(values: Values, rng: np.random.Generator, alpha: float = 0.05, resamples: int = 1000) -> NDArray[np.bool_]:
    """Which children may be the best, shape (children,): all best ones are in it with a chance of about 1 - alpha.

    The model confidence set of Hansen, Lunde and Nason (2011), section 3.1: the largest |t| of all pairs is compared with its
    bootstrap distribution (the same images are drawn for all children); while it is significant, the child that is worst against
    some other leaves. Every child gets two images more, on which it alone is as much better, or worse, as any child is on any
    image (Agresti and Min 2005 do so for paired proportions): a handful of discordant images decides nothing.
    Raises `InputError` for no child, no image, or values that are not finite.
    """
    exact = _matrix(values)
    deviations = exact - exact.mean(0)
    differing = deviations[:, (exact != exact[0]).any(0)]  # where all children agree none is told from another
    if not differing.size:
        return np.ones(len(exact), dtype=bool)
    images = exact.shape[1] + 2 * len(exact)
    most = np.ptp(differing, axis=0).max() * np.eye(len(exact))
    differing = np.concatenate([differing, most, -most], axis=1)
    means = differing.sum(1) / images
    drawn = _resampled_means(differing, images, rng, resamples) - means
    covariance = differing @ differing.T / images - np.outer(means, means)
    spread = np.diag(covariance)
    errors = np.sqrt(np.maximum(spread[:, None] + spread - 2 * covariance, 0) / images)
    kept = np.arange(len(exact))
    while len(kept) > 1:
        error = errors[np.ix_(kept, kept)]
        np.fill_diagonal(error, np.inf)
        t = (means[kept, None] - means[kept]) / error
        largest = np.zeros(resamples)
        for row, child in enumerate(kept[:-1]):  # |t| of a pair counts once
            away = np.abs(drawn[:, child, None] - drawn[:, kept[row + 1 :]]) / error[row, row + 1 :]
            largest = np.maximum(largest, away.max(1))
        if (1 + np.sum(largest >= t.max())) / (1 + resamples) > alpha:
            break
        kept = np.delete(kept, np.argmin(t.min(1)))
    return np.isin(np.arange(len(exact)), kept)


def shrunk(values: Values) -> list[Estimate]:
    """Mean of every child, drawn towards the mean of all as far as the children differ by chance; with its 95 % interval.

    Empirical Bayes (Efron and Morris 1975): true means are taken as normal with a variance tau^2, which is what the means spread
    beyond the noise of the children *against each other* (difficulty that all share is no noise here). The interval holds the
    common noise, the child's own, and that of the shrinkage (Morris 1983); of bools it is Wilson's with as many images as have that
    variance. Raises `InputError` for no child, values that are not finite, and fewer than one image (floats: two).
    """
    exact = _matrix(values)
    children, images = exact.shape
    if children == 1:
        return [Classification().estimate(values[0]) if values.dtype == bool else Regression().estimate(exact[0])]
    means, common = exact.mean(1), exact.mean(0)
    middle = float(means.mean())
    noise = (exact - common).var(1) / images  # of a child's distance to the mean of all
    own = noise * children / (children - 1)
    tau2 = max(0.0, (float(np.sum((means - middle) ** 2)) - float(noise.sum())) / (children - 1))
    kept = tau2 / (tau2 + own) if tau2 > 0 else np.zeros(children)
    shrunken = middle + kept * (means - middle)
    of_shrinking = (1 - kept) ** 2 * (tau2 / children + 2 / max(1, children - 3) * (means - middle) ** 2)
    variance = common.var() / images + kept * own + of_shrinking
    wrap = _wilson if values.dtype == bool else _student
    return [wrap(float(value), float(error), images) for value, error in zip(shrunken, variance, strict=True)]


def smallest_detectable(
    one: Values | float, other: Values | None = None, images: int | None = None, *, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Difference of the means that a paired two-sided test at `alpha` finds with a chance of `power` on so many images.

    Of two children, whose own number of images is taken where none is given, or of the fraction of images on which just one of two
    is right. Bools by Connor (1987), and no less than McNemar's exact test needs (infinite where there are too few images); floats
    by the normal approximation. Raises `InputError` where images are missing, or for what is no fraction.
    """
    from scipy.stats import norm

    reach, strength = float(norm.isf(alpha / 2)), float(norm.ppf(power))
    discordant: float
    if isinstance(one, int | float):
        discordant = float(one)
    elif other is None:
        raise InputError("a detectable difference is of two children, but only one was given: give the other, or a fraction")
    else:
        _check_pair(one, other)
        images = len(one) if images is None else images
        if not (one.dtype == bool and other.dtype == bool):
            away = one.astype(np.float64) - other
            return (reach + strength) * float(away.std(ddof=1)) / math.sqrt(images)
        discordant = float(np.mean(one != other))
    if images is None or images < 1 or not 0 <= discordant <= 1:
        raise InputError(f"a detectable difference needs images and a discordant fraction 0..1, but got {images} and {discordant}: "
                         "give both")  # fmt: skip
    needed = math.ceil(math.log2(2 / alpha))  # discordant images, all of one side, that are significant
    if needed > images:
        return math.inf
    # z_alpha sqrt(psi) + z_power sqrt(psi - d^2) = d sqrt(images), squared and solved for d
    middle, rest = math.sqrt(images * discordant) * reach, discordant * (reach**2 - strength**2)
    wide = images + strength**2
    difference = (middle + math.sqrt(max(0.0, middle**2 - wide * rest))) / wide
    return max(difference, needed / images)


def significantly_worse(values: Values, leader: Values, alpha: float = 0.05) -> bool:
    """Whether a child is worse than the leader on the same images, one-sided: exact binomial test (bools) or paired t test.

    Never so of bools without discordant images, or of floats of one image. Raises `InputError` as `compare` does.
    """
    from scipy.stats import binom, t

    _check_pair(values, leader)
    if values.dtype == bool and leader.dtype == bool:
        wins, losses = int(np.sum(values & ~leader)), int(np.sum(~values & leader))
        return bool(wins + losses) and float(binom.cdf(wins, wins + losses, 0.5)) < alpha
    if len(values) < 2:
        return False
    away = values.astype(np.float64) - leader
    error = float(away.std(ddof=1)) / math.sqrt(len(away))
    if error == 0:
        return float(away[0]) < 0
    return float(t.cdf(float(away.mean()) / error, len(away) - 1)) < alpha


def _resampled_means(values: Floats, images: int, rng: np.random.Generator, resamples: int) -> Floats:
    """Means of `images` drawn with replacement from these (children, few) and others that are 0; shape (resamples, children)."""
    few = values.shape[1]
    means = []
    for size in _pieces(resamples, images):
        drawn = rng.integers(images, size=(size, images))
        rows, columns = np.nonzero(drawn < few)
        counts = np.bincount(rows * few + drawn[rows, columns], minlength=size * few).reshape(size, few)
        means.append(counts @ values.T / images)
    return np.concatenate(means)


def _pieces(resamples: int, width: int) -> list[int]:
    """Sizes of pieces of a bootstrap that fit into memory; they sum to `resamples`."""
    if resamples < 1:
        raise InputError(f"a bootstrap needs at least 1 resample, but got {resamples}: 1000 are usual")
    most = max(1, MOST_DRAWN // width)
    return [most] * (resamples // most) + ([resamples % most] if resamples % most else [])


def _wilson(value: float, variance: float, images: int) -> Estimate:
    """Wilson's interval of as many images as give that variance."""
    worth = value * (1 - value) / variance if variance > 0 and 0 < value < 1 else images
    z = 1.96
    middle, wide = (value + z * z / (2 * worth)) / (1 + z * z / worth), z / (1 + z * z / worth)
    reach = wide * math.sqrt(value * (1 - value) / worth + z * z / (4 * worth * worth))
    return Estimate(value, min(value, max(0.0, middle - reach)), max(value, min(1.0, middle + reach)), images)


def _student(value: float, variance: float, images: int) -> Estimate:
    from scipy.stats import t

    if images < 2:
        raise InputError(f"a mean with its interval needs at least two images, but there are {images}: give more images")
    reach = float(t.ppf(0.975, images - 1)) * math.sqrt(variance * images / (images - 1))
    return Estimate(value, value - reach, value + reach, images)


def _matrix(values: Values) -> Floats:
    """As float64, shape (children, images). Raises `InputError`."""
    if values.ndim != 2 or not values.size:
        raise InputError(f"values are an array (children, images), none of them 0, but its shape is {values.shape}: give both")
    exact: Floats = values.astype(np.float64)
    if not np.isfinite(exact).all():
        raise InputError("values must be finite, but some are not: score such images with the worst value instead")
    return exact


def _check_pair(one: Values, other: Values) -> None:
    if one.shape != other.shape or one.ndim != 1:
        raise InputError(f"children are compared on the same images, but got the shapes {one.shape} and {other.shape}: "
                         "give a value of each for every image")  # fmt: skip
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise InputError("values must be finite, but some are not: score such images with the worst value instead")
