"""What a search makes large: a number per image, whose mean is the objective, from what a child did on every image.

Objectives that are no plain means (balanced accuracy, macro F1) are written as means too, so that every paired statistic of
`search.statistics` works on them.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from supernet.errors import InputError
from supernet.samples import Samples
from supernet.task import Task

Values = NDArray[Any]
Labels = NDArray[np.int64]


class Objective(Protocol):
    """What an objective has to bring; a user's own may be any object with these, or a `PerImage`."""

    @property
    def name(self) -> str:
        """Its name in files and on the command line."""
        ...

    @property
    def title(self) -> str:
        """Its name for people."""
        ...

    @property
    def unit(self) -> str:
        """What stands behind a mean value: "%" (of a fraction, written times 100) or a unit."""
        ...

    def show(self, value: float) -> str:
        """A mean value as text, with its unit."""
        ...

    def values(self, samples: Samples, labels: Labels, classes: int) -> Values:
        """A value for every image, shape (images,), larger is better; their mean is the objective on these images."""
        ...


class _Shown:
    """Text of a mean value by the unit."""

    unit: str

    def show(self, value: float) -> str:
        """93.12% or 23.41 dB."""
        return f"{value:.2%}" if self.unit == "%" else f"{value:.2f} {self.unit}".rstrip()


@dataclass(frozen=True)
class TopK(_Shown):
    """Whether the label is among the k classes put first."""

    name: str
    title: str
    k: int
    unit: str = "%"

    def values(self, samples: Samples, labels: Labels, classes: int) -> Values:
        """Bools. Raises `InputError` where k classes are all there are."""
        if self.k >= classes > 1:
            raise InputError(f"{self.name} is of more than {self.k} classes, but there are {classes}: choose top1")
        return _column(samples, "rank", labels) < self.k


@dataclass(frozen=True)
class BalancedAccuracy(_Shown):
    """Mean recall of the classes that occur, as scikit-learn's: an image counts as much as its class is rare."""

    name: str = "balanced_accuracy"
    title: str = "balanced accuracy"
    unit: str = "%"

    def values(self, samples: Samples, labels: Labels, classes: int) -> Values:
        """Weights of the right ones: images / (classes that occur * images of the class), float64; 0 for the others."""
        right = _column(samples, "rank", labels) == 0
        sizes = np.bincount(labels, minlength=classes)
        values: Values = right * (len(labels) / (np.count_nonzero(sizes) * sizes[labels]))
        return values


@dataclass(frozen=True)
class MacroF1(_Shown):
    """Mean F1 of the classes that occur or are predicted, as scikit-learn's.

    F1 of a class is 2 a / s, where a is the fraction of images that are rightly of it and s the fraction labelled so plus that
    predicted so. F1 is no mean over images, but to first order it is (the delta method; Hampel's influence function): an image
    labelled t and predicted p moves the mean F1 of C classes by (2 [t = p] / s_t - F1_t / s_t - F1_p / s_p) / C.
    """

    name: str = "macro_f1"
    title: str = "macro F1"
    unit: str = "%"

    def values(self, samples: Samples, labels: Labels, classes: int) -> Values:
        """F + influence of the image, float64; their mean is exactly F, their spread that of F."""
        predicted = _column(samples, "predicted", labels).astype(np.int64)
        right = predicted == labels
        images, most = len(labels), max(classes, int(predicted.max()) + 1)
        share = (np.bincount(labels, minlength=most) + np.bincount(predicted, minlength=most)) / images
        seen = share > 0
        f1 = np.divide(2 * np.bincount(labels[right], minlength=most) / images, share, out=np.zeros(most), where=seen)
        influence = 2 * right / share[labels] - f1[labels] / share[labels] - f1[predicted] / share[predicted]
        values: Values = f1[seen].mean() + influence / np.count_nonzero(seen)
        return values


@dataclass(frozen=True)
class PerImage(_Shown):
    """A user's own objective: a function (samples, labels) -> a finite value for every image, larger is better."""

    name: str
    title: str
    unit: str
    function: Callable[[Samples, Labels], Values]

    def __post_init__(self) -> None:
        if not self.name or self.name in OBJECTIVES:
            raise InputError(f"an objective of your own has a name of its own, but got {self.name!r}, "
                             f"and {', '.join(OBJECTIVES)} are taken: choose another")  # fmt: skip

    def values(self, samples: Samples, labels: Labels, classes: int) -> Values:
        """What the function gives. Raises `InputError` where it fails, or that is not a finite number (or bool) for every image."""
        wanted = f"the objective {self.name} gives a finite number for each of {len(labels)} images, larger is better"
        try:
            given = np.asarray(self.function(samples, labels))
        except Exception as error:  # whatever a user's code raises
            raise InputError(
                f"{wanted}, but its function failed ({type(error).__name__}: {error}): correct it; samples have {', '.join(samples)}"
            ) from error
        if given.shape != labels.shape or given.dtype.kind not in "bfiu":
            raise InputError(f"{wanted}, but gave {given.dtype} of shape {given.shape}: correct its function")
        if not np.isfinite(given).all():
            first = int(np.flatnonzero(~np.isfinite(given))[0])
            raise InputError(f"{wanted}, but gave {given[first]} for image {first}, one of {int((~np.isfinite(given)).sum())} that are "
                             "not finite: correct its function")  # fmt: skip
        return given if given.dtype == bool else given.astype(np.float64)


def fingerprint(objective: Objective) -> str:
    """Tells two objectives of one name apart, in any process, by the code of a user's function and the plain values that it holds.

    Not by what the function calls, nor by other objects that it holds; of objectives without a function it is the name of their class.
    """
    function = getattr(objective, "function", None)
    told = type(objective).__qualname__ + ("" if function is None else _told(function))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _told(value: Any) -> str:
    """A function, its code or a plain value as text, the same in every process."""
    if isinstance(value, functools.partial):
        return f"partial({_told(value.func)}, {_told(value.args)}, {_told(value.keywords)})"
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"function({_told(value.__code__)}, {_told(value.__defaults__)}, {_told(value.__kwdefaults__)}, {_told(held)})"
    if isinstance(value, types.CodeType):
        return f"code({value.co_code!r}, {value.co_names}, {_told(value.co_consts)})"
    if isinstance(value, dict):
        return f"dict({sorted((_told(key), _told(each)) for key, each in value.items())})"
    if isinstance(value, set | frozenset):
        return f"set({sorted(map(_told, value))})"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_told, value))})"
    if isinstance(value, int | float | str | bytes | complex | None):
        return repr(value)
    return repr(value.tolist()) if isinstance(value, np.ndarray | np.generic) else type(value).__qualname__


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        TopK("top1", "top-1 accuracy", 1), TopK("top5", "top-5 accuracy", 5), BalancedAccuracy(), MacroF1(),
    )
}  # fmt: skip
"""Name -> objective; code may add its own here."""


@dataclass(frozen=True)
class _Metric:
    """The metric of a task that is no objective of ours: a column of its samples, larger is better."""

    task: Task | type[Task]

    @property
    def name(self) -> str:
        return self.task.metric

    @property
    def title(self) -> str:
        return self.task.title

    @property
    def unit(self) -> str:
        return self.task.unit

    def show(self, value: float) -> str:
        return self.task.show(value)

    def values(self, samples: Samples, labels: Labels, classes: int) -> Values:
        column = np.asarray(_column(samples, self.name, labels))
        return column if column.dtype == bool else column.astype(np.float64)


_COLUMNS = {"top1": "rank", "top5": "rank", "balanced_accuracy": "rank", "macro_f1": "predicted"}


def objective_named(name: str | None, task: Task | type[Task]) -> Objective:
    """The objective of that name; of None the task's own metric, which is an objective or a column of its samples.

    Raises `InputError` where the task has no such objective.
    """
    wanted = task.metric if name is None else name
    fitting = [one for one in OBJECTIVES if _COLUMNS.get(one) in {None, *task.columns}]
    if task.metric in task.columns and task.metric not in OBJECTIVES:
        fitting.append(task.metric)
        if wanted == task.metric:
            return _Metric(task)
    if wanted not in fitting:
        raise InputError(
            f"objective of a {task.name} task must be one of {', '.join(fitting)}, but got {wanted!r}: choose one of them"
        )
    return OBJECTIVES[wanted]


def on_first(objective: Objective, samples: Samples, labels: Labels, classes: int) -> Callable[[int], Values]:
    """A function n -> values on the first n images, for a child scored on all; what `Race.run` takes as leaders and references.

    Of objectives that weigh classes these are not the first n of the values on all images.
    """
    known: dict[int, Values] = {}

    def values(images: int) -> Values:
        if images not in known:
            first = {name: column[:images] for name, column in samples.items()}
            known[images] = objective.values(first, labels[:images], classes)
        return known[images]

    return values


def _column(samples: Samples, name: str, labels: Labels) -> Values:
    if name not in samples:
        raise InputError(f"the objective needs the column {name!r} of every image, but the samples have {sorted(samples)}: "
                         "choose an objective of this task")  # fmt: skip
    column = samples[name]
    if len(column) != len(labels) or not len(labels):
        raise InputError(f"an objective is of one label for each of at least one image, but there are {len(column)} images and "
                         f"{len(labels)} labels: give those of the same split")  # fmt: skip
    return column
