"""Dividing a source into the images that train, those that search compares on, those that confirm, and the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.data.source import Flaw, Source, flaws
from supernet.errors import InputError

Indices = NDArray[np.int64]
NAMES = ("train", "search_val", "confirm", "test")
FORMAT = 1
MOST_CHECKED = 50_000
"""Images decoded before a run begins, so that a damaged one is not found after an hour; of larger sets, those not trained on."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Indices of a source's images, int64; disjoint, and together with those left out all images.

    They are shuffled: any first images are a fair sample.
    """

    train: Indices
    search_val: Indices
    confirm: Indices
    test: Indices
    left_out: tuple[Flaw, ...] = ()
    """Images that cannot be read, in the order of the source."""

    def without(self, flawed: Sequence[Flaw]) -> Splits:
        """Leave out more images."""
        bad = [flaw.image for flaw in flawed]
        train, search_val, confirm, test = (
            indices[~np.isin(indices, bad)] for indices in (self.train, self.search_val, self.confirm, self.test)
        )
        return Splits(train, search_val, confirm, test, tuple(sorted({*self.left_out, *flawed})))

    def to_json_dict(self, source: Source) -> dict[str, Any]:
        """JSON values that `from_json_dict` reads with the same source."""
        lists = {name: getattr(self, name).tolist() for name in NAMES}
        left_out = {"left_out": [flaw._asdict() for flaw in self.left_out]} if self.left_out else {}
        return {"format": FORMAT, "source": source.name, "fingerprint": source.fingerprint, **lists, **left_out}

    @classmethod
    def from_json_dict(cls, value: Any, source: Source) -> Splits:
        """Read what `to_json_dict` wrote. Raises InputError when the source's images changed since, or the value is damaged."""
        names = {"format", "source", "fingerprint", *NAMES}
        if not isinstance(value, Mapping) or set(value) - {"left_out"} != names or value["format"] != FORMAT:
            raise InputError(
                f"splits of format {FORMAT} have exactly the keys {', '.join(sorted(names))} and may have left_out: the file is damaged"
            )
        if value["fingerprint"] != source.fingerprint:
            raise InputError(
                f"the images of {source.name} changed since the run began (fingerprint {str(value['fingerprint'])[:12]} then, "
                f"{source.fingerprint[:12]} now): put the files back as they were, or start a new run"
            )
        left_out = _flaws(value.get("left_out", []))
        lists = [value[name] for name in NAMES]
        if not all(isinstance(items, list) and all(type(item) is int for item in items) for items in lists):
            raise InputError("splits are lists of image numbers: the file is damaged, start a new run")
        together = sorted([item for items in lists for item in items] + [flaw.image for flaw in left_out])
        if together != list(range(len(source))):
            raise InputError(f"splits hold each of the {len(source)} images once: the file is damaged, start a new run")
        train, search_val, confirm, test = (np.array(items, np.int64) for items in lists)
        return cls(train, search_val, confirm, test, left_out)


def _flaws(value: Any) -> tuple[Flaw, ...]:
    kinds = {"image": int, "identity": str, "reason": str}
    if not isinstance(value, list) or not all(
        isinstance(item, Mapping) and {key: type(entry) for key, entry in item.items()} == kinds for item in value
    ):
        raise InputError("left_out lists images by image, identity and reason: the file is damaged, start a new run")
    return tuple(Flaw(**item) for item in value)


def readable_splits(source: Source, *, seed: int, skip_unreadable: float = 0.0, calibration: int = 0) -> Splits:
    """Divide a source, leaving out what cannot be read: at most the fraction `skip_unreadable` of the images.

    Of at most `MOST_CHECKED` images all are decoded, and those left out are never divided. In larger sets those of search_val,
    confirm and test are, and the first `calibration` of train; what training meets is left to `TrainingBatches`.
    Raises InputError naming the first where there are more, and for a class that then has too few images.
    """
    if not source.encoded:
        return divide(source, seed=seed)
    if len(source) <= MOST_CHECKED:
        return divide(source, seed=seed, left_out=within_limit(source, flaws(source), skip_unreadable))
    splits = divide(source, seed=seed)
    checked = unchecked = np.concatenate([splits.search_val, splits.confirm, splits.test, splits.train[:calibration]])
    while len(unchecked):
        found = (*splits.left_out, *flaws(source, unchecked))
        splits = splits.without(within_limit(source, found, skip_unreadable))
        unchecked = np.setdiff1d(splits.train[:calibration], checked)  # those that moved up
        checked = np.concatenate([checked, unchecked])
    for name in NAMES:
        _every_class(source, getattr(splits, name), name)
    return splits


def within_limit(source: Source, found: Sequence[Flaw], skip_unreadable: float) -> Sequence[Flaw]:
    """Give the unreadable images back. Raises InputError where they are more than this fraction of the source."""
    allowed = int(skip_unreadable * len(source))
    if len(found) > allowed:
        shown = "; ".join(f"{flaw.identity}: {flaw.reason}" for flaw in found[:3])
        text = f"every image must be readable, but {len(found)} of {len(source)} are not"
        if skip_unreadable:
            text = (
                f"{len(found)} of {len(source)} images cannot be read, and skip_unreadable {skip_unreadable:g} allows {allowed}"
            )
        raise InputError(f"{text} ({shown}): repair or remove them, or raise skip_unreadable")
    return found


def divide(
    source: Source, *, seed: int, search_val: float = 0.1, confirm: float = 0.1, test: float = 0.2, most: int = 5000,
    left_out: Sequence[Flaw] = (),
) -> Splits:  # fmt: skip
    """Divide every class alike, by chance from `seed`; every image that is not `left_out` is used exactly once.

    What the maker divided stays so: the maker's test part (or the only val part) is the test split. With both val and test,
    val is halved into search_val and confirm, and train stays whole. Otherwise search_val and confirm are cut from the
    training images: the fractions, 0..1, are of what is cut, and neither gets more than `most` images.
    Raises InputError naming the class that has too few images to be in every split.
    """
    rng = np.random.default_rng([seed, 0, 0, 3])  # a stream of its own: batches draw from [seed, epoch, index, 1 or 2]
    part = np.array(source.parts)
    part[[flaw.image for flaw in left_out]] = "-"
    made = {name: np.flatnonzero(part == name) for name in ("", "train", "val", "test")}
    pool = np.concatenate([made[""], made["train"]])
    if made["val"].size and made["test"].size:
        splits = [pool, *_halves(source, made["val"], rng), made["test"]]
    else:
        theirs = made["test"] if made["test"].size else made["val"]
        wanted = {"search_val": search_val, "confirm": confirm} | ({} if theirs.size else {"test": test})
        cut = _cut(source, pool, wanted, most, rng)
        splits = [cut["train"], cut["search_val"], cut["confirm"], theirs if theirs.size else cut["test"]]
    for name, indices in zip(NAMES, splits, strict=True):
        _every_class(source, indices, name)
    shuffled = [rng.permutation(indices) for indices in splits]
    return Splits(shuffled[0], shuffled[1], shuffled[2], shuffled[3], tuple(sorted(left_out)))


def _cut(source: Source, pool: Indices, wanted: Mapping[str, float], most: int, rng: np.random.Generator) -> dict[str, Indices]:
    """Cut the pool class by class into the wanted splits; the rest is train."""
    if not all(0 < fraction < 1 for fraction in wanted.values()) or sum(wanted.values()) >= 1:
        given = ", ".join(f"{name} {fraction}" for name, fraction in wanted.items())
        raise InputError(f"the fractions of the splits lie between 0 and 1 and leave something to train on, not {given}")
    classes = len(source.classes)
    if most < classes:
        raise InputError(f"most is at least the number of classes ({classes}), so that each is in every split, not {most}")
    sizes = np.bincount(source.labels[pool], minlength=classes)
    caps = {name: len(pool) if name == "test" else most for name in wanted}
    counts = {name: _shares(sizes, min(fraction * len(pool), caps[name])) for name, fraction in wanted.items()}
    pieces: dict[str, list[Indices]] = {name: [] for name in NAMES}
    for label, size in enumerate(sizes):
        taken = {name: int(shares[label]) for name, shares in counts.items()}
        needed = sum(taken.values()) + 1
        if size < needed:
            raise InputError(
                f"class {source.classes[label]!r} of {source.name} has {size} images to divide, and at least {needed} are "
                f"needed, so that each of train, {', '.join(taken)} gets one: add images, or leave the class out"
            )
        own = rng.permutation(pool[source.labels[pool] == label])
        ends = np.cumsum(list(taken.values()))
        for name, piece in zip([*taken, "train"], np.split(own, ends), strict=True):
            pieces[name].append(piece)
    return {name: np.concatenate(pieces[name]) for name in ("train", *wanted)}


def _shares(sizes: Indices, target: float) -> Indices:
    """One image of every class and the rest in proportion to its size, at most `target` in all (or one of each)."""
    beyond = max(target - len(sizes), 0.0)
    shares: Indices = 1 + np.floor(beyond * sizes / sizes.sum()).astype(np.int64)
    return shares


def _halves(source: Source, indices: Indices, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Halve each class; where its number is odd, the first half gets one more."""
    first, second = [], []
    for label, name in enumerate(source.classes):
        own = rng.permutation(indices[source.labels[indices] == label])
        if len(own) < 2:
            raise InputError(
                f"class {name!r} of {source.name} has {len(own)} images in the val part, and at least 2 are needed, "
                "one each for search_val and confirm: add images, or leave the class out"
            )
        middle = (len(own) + 1) // 2
        first.append(own[:middle])
        second.append(own[middle:])
    return np.concatenate(first), np.concatenate(second)


def _every_class(source: Source, indices: Indices, split: str) -> None:
    missing = np.flatnonzero(np.bincount(source.labels[indices], minlength=len(source.classes)) == 0)
    if missing.size:
        name = source.classes[missing[0]]
        val = (
            " (its val part, for there is no test part)"
            if split == "test" and "test" not in source.parts and "val" in source.parts
            else ""
        )
        raise InputError(
            f"class {name!r} of {source.name} has 0 images for {split}{val}, and at least 1 is needed: "
            "add images, or leave the class out"
        )
