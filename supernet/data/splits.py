"""Dividing a source into the images that train, those that search compares on, those that confirm, and the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.data.sources import Source
from supernet.errors import InputError

Indices = NDArray[np.int64]
NAMES = ("train", "search_val", "confirm", "test")
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Splits:
    """Indices of a source's images, int64; disjoint, together all images. Shuffled: any first images are a fair sample."""

    train: Indices
    search_val: Indices
    confirm: Indices
    test: Indices

    def to_json_dict(self, source: Source) -> dict[str, Any]:
        """JSON values that `from_json_dict` reads with the same source."""
        lists = {name: getattr(self, name).tolist() for name in NAMES}
        return {"format": FORMAT, "source": source.name, "fingerprint": source.fingerprint, **lists}

    @classmethod
    def from_json_dict(cls, value: Any, source: Source) -> Splits:
        """Read what `to_json_dict` wrote. Raises InputError when the source's images changed since, or the value is damaged."""
        names = {"format", "source", "fingerprint", *NAMES}
        if not isinstance(value, Mapping) or set(value) != names or value["format"] != FORMAT:
            raise InputError(f"splits of format {FORMAT} have exactly the keys {', '.join(sorted(names))}: the file is damaged")
        if value["fingerprint"] != source.fingerprint:
            raise InputError(
                f"the images of {source.name} changed since the run began (fingerprint {str(value['fingerprint'])[:12]} then, "
                f"{source.fingerprint[:12]} now): put the files back as they were, or start a new run"
            )
        lists = [value[name] for name in NAMES]
        if not all(isinstance(items, list) and all(type(item) is int for item in items) for items in lists):
            raise InputError("splits are lists of image numbers: the file is damaged, start a new run")
        if sorted(item for items in lists for item in items) != list(range(len(source))):
            raise InputError(f"splits hold each of the {len(source)} images once: the file is damaged, start a new run")
        return cls(*(np.array(items, np.int64) for items in lists))


def divide(
    source: Source, *, seed: int, search_val: float = 0.1, confirm: float = 0.1, test: float = 0.2, most: int = 5000
) -> Splits:
    """Divide every class alike, by chance from `seed`; every image is used exactly once.

    What the maker divided stays so: the maker's test part (or the only val part) is the test split. With both val and test,
    val is halved into search_val and confirm, and train stays whole. Otherwise search_val and confirm are cut from the
    training images: the fractions, 0..1, are of what is cut, and neither gets more than `most` images.
    Raises InputError naming the class that has too few images to be in every split.
    """
    rng = np.random.default_rng([seed, 0, 0, 3])  # a stream of its own: batches draw from [seed, epoch, index, 1 or 2]
    part = np.array(source.parts)
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
    return Splits(*(rng.permutation(indices) for indices in splits))


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
        raise InputError(
            f"class {name!r} of {source.name} has 0 images for {split}, and at least 1 is needed: "
            "add images, or leave the class out"
        )
