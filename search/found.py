"""What a search found: the chosen child, the ends of the space, the front, and how sure all of it is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.targets import Latency
from supernet import durable
from supernet.arch import Arch
from supernet.costs import METRICS
from supernet.errors import InputError
from supernet.run import Run
from supernet.task import Estimate

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Child:
    """A child of a run, with what is known of it. Scores are means of the search's objective, on the search-val and confirm splits."""

    run: Path
    arch: Arch
    costs: Mapping[str, float]
    search_score: float
    confirm_score: float | None = None
    predicted_latency_ms: float | None = None
    latencies: Mapping[str, Latency] = field(default_factory=dict)
    """Measured: "latency_ms", and "latency_ms@NAME" for every other target of the search."""
    estimate: Estimate | None = None
    """What it is to be expected to reach on other images: the confirm score, shrunken among the finalists, with its 95 % interval."""
    weights: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Where a budget bounds one: "resident_bytes", "load_ms@NAME", ... -> least, median and most of what was measured."""

    @property
    def key(self) -> str:
        """The arch's key."""
        return self.arch.key

    @property
    def latency(self) -> Latency | None:
        """That of the target without a name."""
        return self.latencies.get("latency_ms")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "key": self.key, "arch": self.arch.as_dict(), "costs": dict(self.costs), "search_score": self.search_score,
            "confirm_score": self.confirm_score, "predicted_latency_ms": self.predicted_latency_ms,
            "latencies": {name: latency.as_dict() for name, latency in self.latencies.items()},
            "estimate": dataclasses.asdict(self.estimate) if self.estimate else None,
            "weights": {name: list(span) for name, span in self.weights.items()},
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """The child found for one set of budgets, and how sure that is."""

    name: str
    budgets: tuple[str, ...]
    """All that it meets, those of the whole search among them."""
    child: Child
    finalists: tuple[Child, ...]
    tied: tuple[str, ...]
    """Keys of the finalists that may be the best, at 95 %; the child is the cheapest of them."""
    p_values: Mapping[str, float]
    """Key -> p of "as good as the chosen child" on the confirm images (exact McNemar test where scores are right or wrong, else t),
    adjusted by Holm."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name, "budgets": list(self.budgets), "child": self.child.as_dict(),
            "finalists": [child.as_dict() for child in self.finalists], "tied": list(self.tied), "p_values": dict(self.p_values),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search."""

    run: Path
    budgets: tuple[str, ...]
    objective: str
    answers: tuple[Answer, ...]
    """The first is the best child that meets the budgets; then those for `--child` and `--front`."""
    smallest: Child
    largest: Child
    front: tuple[str, ...]
    """Keys of the children scored on all images that no other beats in both score and main cost."""
    evaluated: int
    spent: Mapping[str, float]
    """What the search cost: `macs` of calibration and evaluation of every child in the store, and `macs_alone`, what it would have
    been with every child calibrated and scored on all images by itself."""
    notes: tuple[str, ...]
    weights_sha256: str
    """The weights that were searched; other weights make other scores."""
    precision: str = "fp32"
    """int8: scores and latencies are those of quantised children."""

    @property
    def best(self) -> Child:
        """The best child that meets the budgets."""
        return self.answers[0].child

    @property
    def finalists(self) -> tuple[Child, ...]:
        """The best child and those that it was chosen from."""
        return self.answers[0].finalists

    @property
    def children(self) -> tuple[Child, ...]:
        """Every child found, each once, in the order of the answers."""
        return tuple({answer.child.key: answer.child for answer in self.answers}.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": FORMAT, "budgets": list(self.budgets), "objective": self.objective, "best": self.best.as_dict(),
            "answers": [answer.as_dict() for answer in self.answers], "smallest": self.smallest.as_dict(),
            "largest": self.largest.as_dict(), "front": list(self.front), "evaluated": self.evaluated, "spent": dict(self.spent),
            "notes": list(self.notes), "weights_sha256": self.weights_sha256, "precision": self.precision,
        }  # fmt: skip

    def save(self) -> Path:
        """Write the outcome into the run, as its latest."""
        path = self.run / "search" / "found.json"
        durable.write_json(path, self.as_dict())
        return path

    @classmethod
    def load(cls, run: Run) -> Found:
        """The latest outcome of a run. Raises `InputError` where there is none, or it is damaged."""
        path = run.path / "search" / "found.json"
        if not path.is_file():
            raise InputError(f"{run.path} was not searched yet: run `nestling search {run.path}` first")
        try:
            value = json.loads(path.read_text())
            if value["format"] != FORMAT:
                raise InputError(f"{path} has format {value['format']!r}, this version reads {FORMAT}: search again")
            if value["weights_sha256"] != run.weights_hash:
                raise InputError(f"{path} is of other weights than {run.path} has now: search again")
            answers = tuple(_answer(run, entry) for entry in value["answers"])
            if not answers:
                raise ValueError("it has no child")
            return cls(
                run.path, _texts(value["budgets"]), str(value["objective"]), answers, _child(run, value["smallest"]),
                _child(run, value["largest"]), _texts(value["front"]), int(value["evaluated"]), _numbers(value["spent"]),
                _texts(value["notes"]), str(value["weights_sha256"]), str(value.get("precision", "fp32")),
            )  # fmt: skip
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error!r}): search again, which repeats no evaluation") from error


def _answer(run: Run, value: Mapping[str, Any]) -> Answer:
    return Answer(
        str(value["name"]), _texts(value["budgets"]), _child(run, value["child"]),
        tuple(_child(run, entry) for entry in value["finalists"]), _texts(value["tied"]), _numbers(value["p_values"]),
    )  # fmt: skip


def _child(run: Run, value: Mapping[str, Any]) -> Child:
    confirm, predicted, estimate = (value[name] for name in ("confirm_score", "predicted_latency_ms", "estimate"))
    return Child(
        run.path,
        run.space.arch(value["arch"], "found.json"),
        {name: _number(value["costs"][name]) for name in METRICS},
        _number(value["search_score"]),
        None if confirm is None else _number(confirm),
        None if predicted is None else _number(predicted),
        {str(name): Latency.from_dict(latency) for name, latency in value["latencies"].items()},
        None if estimate is None else _estimate(estimate),
        {str(name): _span(span) for name, span in value.get("weights", {}).items()},
    )


def _estimate(value: Mapping[str, Any]) -> Estimate:
    low, middle, high = (_number(value[name]) for name in ("low", "value", "high"))
    return Estimate(middle, low, high, int(value["images"]))


def _span(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    least, median, most = map(_number, value)
    return least, median, most


def _numbers(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no mapping")
    return {str(name): _number(number) for name, number in value.items()}


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(text, str) and text for text in values):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(values)
