"""A look at a data set before it is trained on: what is in it, what is wrong with it, and what a run would make of it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.data.source import Flaw, Source, Unreadable, evenly, over_images
from supernet.data.splits import NAMES, divide, within_limit
from supernet.errors import InputError

MOST_LEAKED = 0.01
"""Fraction of the test images that may also be trained on before it is an error."""
IMBALANCE, FEW = 10.0, 20
"""Largest over smallest class, and images of a class to train on, that are remarked upon."""
SHOWN = 5


@dataclass(frozen=True)
class Spread:
    """Least, median and most."""

    least: float
    median: float
    most: float


@dataclass(frozen=True)
class Same:
    """Images with the same pixels: what each is called, the split and the class that it is in."""

    identities: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass
class Report:
    """What `check` found. There is something to do where there are `errors`."""

    source: str
    images: int
    looked_at: int
    channels: int
    parts: dict[str, int]
    """Images in each part that the maker made; "" where there are none."""
    splits: dict[str, int] = field(default_factory=dict)
    """Images in each split of a run with seed 0; empty where it cannot be divided."""
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Images of each class in each split, or part."""
    sizes: dict[str, Spread] = field(default_factory=dict)
    """Width, height, short side and aspect (width over height) of the images that can be read."""
    modes: dict[str, int] = field(default_factory=dict)
    """How often each of Pillow's modes occurs."""
    unreadable: tuple[Flaw, ...] = ()
    duplicates: tuple[Same, ...] = ()
    """Those across splits first."""
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json_dict(self) -> dict[str, Any]:
        """JSON values."""
        flaws = [flaw._asdict() for flaw in self.unreadable]
        return asdict(self) | {"unreadable": flaws}


def check(
    source: Source, *, skip_unreadable: float = 0.0, batch_size: int | None = None, most: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:  # fmt: skip
    """Decode the images (at most `most`, spread evenly) and report on them; nothing is written.

    `skip_unreadable` and `batch_size` are those of the recipe that will be used.
    """
    indices = evenly(np.arange(len(source)), len(source) if most is None else most)
    seen = _look(source, indices, progress)
    report = Report(source.name, len(source), len(indices), source.channels, dict(Counter(source.parts)))
    report.unreadable, report.modes, report.sizes = seen.flaws, seen.modes, seen.spreads()
    try:
        within_limit(source, seen.flaws, skip_unreadable)
        if seen.flaws:
            report.warnings.append(f"{len(seen.flaws)} images cannot be read and are left out, such as {_shown(seen.flaws)}")
    except InputError as error:
        report.errors.append(str(error))
    try:
        splits = divide(source, seed=0, left_out=seen.flaws)
        of_split = {name: getattr(splits, name) for name in NAMES}
        report.splits = {name: len(own) for name, own in of_split.items()}
    except InputError as error:
        report.errors.append(str(error))
        parts = np.array(source.parts)
        of_split = {part: np.flatnonzero(parts == part) for part in dict.fromkeys(source.parts)}
    counts = {name: np.bincount(source.labels[own], minlength=len(source.classes)) for name, own in of_split.items()}
    report.classes = {label: {name: int(own[i]) for name, own in counts.items()} for i, label in enumerate(source.classes)}
    _duplicates(source, report, seen, of_split)
    if report.splits:
        _judge_splits(report, batch_size)
    if source.channels == 1 and any(mode not in ("1", "L") and not mode.startswith("I") for mode in seen.modes):
        report.warnings.append(
            f"the images are taken to be grey, but some have colours (modes {', '.join(seen.modes)}): these are lost"
        )
    return report


@dataclass
class _Seen:
    """What was found in the images: of each that can be read, its index, a digest of its pixels, mode and size."""

    indices: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)
    sides: list[tuple[int, int]] = field(default_factory=list)
    flaws: tuple[Flaw, ...] = ()

    def spreads(self) -> dict[str, Spread]:
        if not self.sides:
            return {}
        width, height = np.array(self.sides, np.float64).T
        found = {"width": width, "height": height, "short side": np.minimum(width, height), "aspect": width / height}
        return {name: Spread(*(round(float(f(x)), 3) for f in (np.min, np.median, np.max))) for name, x in found.items()}


def _look(source: Source, indices: NDArray[np.int64], progress: Callable[[int, int], None]) -> _Seen:
    def one(i: int) -> tuple[bytes, tuple[str, tuple[int, int]]] | Flaw:
        try:
            image = source.image(i)
        except Unreadable as error:
            return Flaw(i, source.identity(i), error.reason)
        digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
        digest.update(image.tobytes())
        return digest.digest(), source.header(i) or (image.mode, image.size)

    seen, flaws = _Seen(), []
    for place, (i, found) in enumerate(zip(indices.tolist(), over_images(source, indices, one), strict=True)):
        if isinstance(found, Flaw):
            flaws.append(found)
        else:
            digest, (mode, size) = found
            seen.indices.append(i)
            seen.digests.append(digest)
            seen.modes[mode] = seen.modes.get(mode, 0) + 1
            seen.sides.append(size)
        progress(place + 1, len(indices))
    seen.flaws = tuple(flaws)
    return seen


def _duplicates(source: Source, report: Report, seen: _Seen, of_split: dict[str, NDArray[np.int64]]) -> None:
    """Find images with the same pixels; those trained on and tested on come first."""
    where = {int(i): name for name, own in of_split.items() for i in own}
    groups: dict[bytes, list[int]] = {}
    for i, digest in zip(seen.indices, seen.digests, strict=True):
        groups.setdefault(digest, []).append(i)
    same = [
        Same(
            tuple(map(source.identity, group)),
            tuple(where[i] for i in group),
            tuple(source.classes[source.labels[i]] for i in group),
        )
        for group in groups.values()
        if len(group) > 1
    ]
    report.duplicates = tuple(
        sorted(same, key=lambda each: (not {"train", "test"} <= {*each.splits}, len({*each.splits}) == 1))
    )
    for name in [name for name in of_split if name != "train"][::-1]:  # test first
        leaked = [each for each in report.duplicates if {"train", name} <= {*each.splits}]
        images = sum(each.splits.count(name) for each in leaked)
        if images:
            total, pair = len(of_split[name]), " and ".join(leaked[0].identities[:2])
            text = f"{images} of {total} images of {name} are also in train, such as {pair}: remove them"
            (report.errors if name == "test" and images > MOST_LEAKED * total else report.warnings).append(text)
    others = [each for each in report.duplicates if "train" not in each.splits and len({*each.splits}) > 1]
    if others:
        report.warnings.append(
            f"{len(others)} images are in more than one of {', '.join(name for name in of_split if name != 'train')}"
        )
    within = sum(len(each.splits) - 1 for each in report.duplicates if len({*each.splits}) == 1)
    if within:
        report.warnings.append(f"{within} images repeat another one of the same split")
    torn = [each for each in report.duplicates if len({*each.classes}) > 1]
    if torn:
        report.warnings.append(
            f"{len(torn)} images are there under two classes, such as {' and '.join(torn[0].identities[:2])}: correct their labels"
        )


def _judge_splits(report: Report, batch_size: int | None) -> None:
    train = {label: counts["train"] for label, counts in report.classes.items()}
    large, small = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
    if train[large] >= IMBALANCE * train[small]:
        report.warnings.append(
            f"classes are uneven: {train[large]} training images of {large!r} and {train[small]} of {small!r}; "
            "balance: class or sqrt in the recipe draws them more evenly"
        )
    few = [label for label, count in train.items() if count < FEW]
    if few:
        report.warnings.append(
            f"{len(few)} classes have fewer than {FEW} training images, such as {few[0]!r} ({train[few[0]]})"
        )
    for name in NAMES[1:]:
        error = 40 / math.sqrt(report.splits[name])
        if error > 2:
            report.warnings.append(
                f"{name} has {report.splits[name]} images: at 80 % top-1 its standard error is {error:.1f} points, so small "
                "differences between children will not show"
            )
    if batch_size is not None and batch_size > report.splits["train"]:
        report.warnings.append(
            f"a batch of {batch_size} is larger than the {report.splits['train']} training images, so that it would hold all of them: "
            "lower batch_size"
        )


def _shown(flaws: Sequence[Flaw]) -> str:
    return "; ".join(f"{flaw.identity}: {flaw.reason}" for flaw in flaws[:3])
