"""What a search found: the chosen child, the ends of the space, the front, and how sure all of it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.targets import Latency
from supernet import durable
from supernet.arch import Arch
from supernet.costs import METRICS
from supernet.errors import InputError
from supernet.run import Run

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Child:
    """A child of a run, with what is known of it. Scores are in the unit of the task's metric, on the search-val and confirm splits."""

    run: Path
    arch: Arch
    costs: Mapping[str, float]
    search_score: float
    confirm_score: float | None = None
    predicted_latency_ms: float | None = None
    latency: Latency | None = None

    @property
    def key(self) -> str:
        """The arch's key."""
        return self.arch.key

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "key": self.key, "arch": self.arch.as_dict(), "costs": dict(self.costs), "search_score": self.search_score,
            "confirm_score": self.confirm_score, "predicted_latency_ms": self.predicted_latency_ms,
            "latency": self.latency.as_dict() if self.latency else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search."""

    run: Path
    budgets: tuple[str, ...]
    best: Child
    smallest: Child
    largest: Child
    finalists: tuple[Child, ...]
    front: tuple[str, ...]
    """Keys of the evaluated children that no other beats in both score and main cost."""
    evaluated: int
    notes: tuple[str, ...]
    weights_sha256: str
    """The weights that were searched; other weights make other scores."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": FORMAT, "budgets": list(self.budgets), "best": self.best.as_dict(), "smallest": self.smallest.as_dict(),
            "largest": self.largest.as_dict(), "finalists": [child.as_dict() for child in self.finalists], "front": list(self.front),
            "evaluated": self.evaluated, "notes": list(self.notes), "weights_sha256": self.weights_sha256,
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
            child = {name: _child(run, value[name]) for name in ("best", "smallest", "largest")}
            return cls(
                run.path, _texts(value["budgets"]), child["best"], child["smallest"], child["largest"],
                tuple(_child(run, entry) for entry in value["finalists"]), _texts(value["front"]), int(value["evaluated"]),
                _texts(value["notes"]), str(value["weights_sha256"]),
            )  # fmt: skip
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error!r}): search again, which repeats no evaluation") from error


def _child(run: Run, value: Mapping[str, Any]) -> Child:
    confirm, predicted, latency = (value[name] for name in ("confirm_score", "predicted_latency_ms", "latency"))
    return Child(
        run.path,
        run.space.arch(value["arch"], "found.json"),
        {name: _number(value["costs"][name]) for name in METRICS},
        _number(value["search_score"]),
        None if confirm is None else _number(confirm),
        None if predicted is None else _number(predicted),
        None if latency is None else Latency.from_dict(latency),
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(text, str) and text for text in values):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(values)
