"""What makers of data sets call things: the parts of a set, and the classes that labels name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from supernet.errors import InputError

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Word in a name -> part."""


def parts_of_files(names: Sequence[str]) -> list[str]:
    """Tell each file's part by the words of its path: "imagenet-train-0001.tar", "validation/0.parquet".

    "" for all where they all say the same or nothing. Raises InputError where only some say one, or one says two.
    """
    found = []
    for name in names:
        parts = {PARTS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in PARTS}
        if len(parts) > 1:
            raise InputError(f"{name} is of one part, but its name says {' and '.join(sorted(parts))}: rename it")
        found.append(parts.pop() if parts else "")
    if len(set(found)) > 1 and "" in found:
        raise InputError(
            f"{names[found.index('')]} does not say of which part it is, and other files do: name all of them train-..., val-... or "
            "test-..., or none"
        )
    return found if len(set(found)) > 1 else [""] * len(found)


def classes_of(labels: Sequence[int | str], name: str, *, numbers: bool = True) -> tuple[list[str], NDArray[np.int64]]:
    """Class names and, for every label, the number of its class, int64. Classes are those that occur, in order.

    Labels that all are whole numbers are put in the order of the numbers (unless not `numbers`), others in that of the names.
    Raises InputError for a number below 0 (the usual mark of "not labelled") and an empty name.
    """
    texts = {label: str(label).strip() for label in set(labels)}
    if "" in texts.values():
        raise InputError(f"{name}: a label is a number or a name, but one is empty: give every image a label")
    if numbers and all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in texts.values()):
        least = min(map(int, texts.values()))
        if least < 0:
            raise InputError(f"{name}: labels are numbers from 0, but one is {least}: leave out images without a label")
        texts = {label: str(int(text)) for label, text in texts.items()}
        classes = sorted(set(texts.values()), key=int)
    else:
        classes = sorted(set(texts.values()))
    number = {text: i for i, text in enumerate(classes)}
    return classes, np.array([number[texts[label]] for label in labels], np.int64)


def every_class_occurs(name: str, classes: Sequence[str], labels: NDArray[np.int64]) -> None:
    """Raise InputError where a class has no image at all."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if empty.size:
        raise InputError(f"{name} has no image of class {classes[empty[0]]!r}: add some, or leave the class out")
