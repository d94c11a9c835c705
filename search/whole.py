"""The whole way of a run: train, search, export, verify, test, report. Every stage leaves its files and is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import Bundle
from deploy.ship import ship, shipped_already
from deploy.targets import Local
from search.budget import parse_all
from search.commands import search_shown
from search.found import Child, Found
from search.loop import Asked, latency_model, smallest_latency_ms
from search.reach import refuse_impossible
from search.report.content import report_of
from search.settings import SearchConfig, load_search_config
from search.weights import Scales
from supernet import device as devices
from supernet import durable
from supernet import start as starting
from supernet.commands import train_shown
from supernet.console import Display
from supernet.errors import InputError
from supernet.run import Run
from supernet.space import Space
from supernet.task import Estimate


@dataclass(frozen=True)
class Whole:
    """How the whole way is to be walked."""

    data: str
    out: Path
    budgets: tuple[str, ...]
    space: str | None = None
    recipe: str | None = None
    epochs: int | None = None
    overrides: Mapping[str, Any] | None = None
    data_root: Path | None = None
    download: bool = False
    device: str = "auto"
    workers: int = 0
    threads: int = 1
    search: str = "default"
    init: str | None = None
    """Where the initial weights are from (`supernet.warm.read_donor`)."""
    middle: bool = False
    """The budget is the middle between the measured latencies of the smallest and the largest child."""


def walk(way: Whole, display: Display | None = None) -> dict[str, Any]:
    """Walk the whole way; returns the content of `OUT/result.json`. Called again, it continues where it stopped."""
    return _Way(way, devices.choose(way.device), display or Display(quiet=True)).go()


class _Way:
    """The whole way, stage by stage. Every stage leaves its files in the run and is not done again."""

    def __init__(self, way: Whole, device: str, display: Display) -> None:
        self.way, self.device, self.display, self.target = way, device, display, Local(way.threads)
        self.seconds: dict[str, float] = {}

    def go(self) -> dict[str, Any]:
        settings = load_search_config(self.way.search)
        self.target = Local(self.way.threads, precision=settings.precision)
        parse_all(list(self.way.budgets))  # one that cannot be read is an error before anything is trained
        self.seconds = _seconds_before(self.way.out)
        with self._timed("train"):
            run = self._trained()
        budgets = self._budgets(run, settings)
        with self._timed("search"):
            asked = Asked(tuple(budgets), settings=settings, targets={None: self.target})
            found = search_shown(run, asked, self.device, self.display)
            assert found is not None
        with self._timed("export"):
            bundle = self._exported(run, found)
        with self._timed("test"):
            tested = self._tested(run, found, bundle)
        result = _result(run, found, tested, self.seconds)
        durable.write_json(run.path / "result.json", result)
        with self._timed("report"):
            report_of(run, run.path / "report.html")
        durable.write_json(run.path / "result.json", {**result, "seconds": self.seconds})
        return {**result, "seconds": self.seconds}

    def _trained(self) -> Run:
        way = self.way
        if (way.out / "config.json").exists():
            begun = starting.resume(way.out)
            starting.refuse_other(begun.run, way.data, space=way.space, recipe=way.recipe, init=way.init,
                                  overrides=way.overrides)  # fmt: skip
            starting.refuse_changes(
                begun.run, {**(way.overrides or {}), **({"epochs": way.epochs} if way.epochs is not None else {})}
            )
            self._refuse_impossible(begun.run.space)
        else:
            begun = starting.start(
                way.data, way.out, space=way.space, recipe=way.recipe, epochs=way.epochs, overrides=way.overrides, root=way.data_root,
                download=way.download, device=self.device, init=way.init, check=self._refuse_impossible,
            )  # fmt: skip
        for reason in begun.reasons:
            self.display.say(reason)
        train_shown(begun.run, self.device, way.workers, self.display)
        return begun.run

    def _refuse_impossible(self, space: Space) -> None:
        """Budgets that no child can meet end here, before hours of training."""
        budgets = parse_all(list(self.way.budgets))
        elsewhere = [str(budget) for budget in budgets if budget.target is not None]
        if elsewhere:
            raise InputError(f"the whole way measures on this machine alone, but {elsewhere[0]} is of another target: train with "
                             "`nestling train`, then search with `nestling search --target`")  # fmt: skip
        timed = any(budget.metric == "latency_ms" for budget in budgets)
        refuse_impossible(space, budgets, {None: smallest_latency_ms(space, self.target)} if timed else {})
        Scales(space, None, {None: self.target}).refuse_impossible(budgets)

    def _budgets(self, run: Run, settings: SearchConfig) -> list[str]:
        if not self.way.middle:
            return list(self.way.budgets)
        with self.display.stage("profile") as stage, self._timed("profile"):
            model = latency_model(run, self.target, settings, lambda doing: stage.update(0, None, doing))
        middle = (model.smallest_ms + model.largest_ms) / 2
        self.display.say(
            f"latency of the space here: {model.smallest_ms:.4g} to {model.largest_ms:.4g} ms; budget: {middle:.4g} ms, the middle"
        )
        return [f"latency_ms<={middle:.4g}"]

    def _exported(self, run: Run, found: Found) -> Bundle:
        latencies = [latency.as_dict() for latency in found.best.latencies.values()]
        with self.display.stage("export"):
            bundle = shipped_already(run, found.best.arch, run.path / "bundle", latencies)
            if bundle is not None:
                return bundle
            return ship(run, found.best.arch, run.path / "bundle", evaluator=run.evaluator(self.device), latencies=latencies)

    def _tested(self, run: Run, found: Found, bundle: Bundle) -> dict[str, Estimate]:
        """Test accuracy: the chosen child's as exported, of the others as extracted. What was counted before is not read again."""
        before = _tested_before(run, found)
        if before is not None:
            return before
        counted = bundle.manifest["accuracy"]
        tested = {"chosen": Estimate(counted[run.task.metric], counted["low"], counted["high"], counted["images"])}
        evaluator = run.evaluator(self.device)
        with self.display.stage("test"):
            images = run.test_images("smallest and largest child, final table")
            for name, child in list(_three(found).items())[1:]:
                tested[name] = run.task.estimate(evaluator.evaluate(child.arch, images))
        return tested

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add what a stage takes to the run's `seconds.json`, so that a continued run tells the time of all calls.

        What a call spent in the stage in which it was killed is not known.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - start, 2)
            if (self.way.out / "config.json").exists():
                durable.write_json(self.way.out / "seconds.json", self.seconds)


def _tested_before(run: Run, found: Found) -> dict[str, Estimate] | None:
    """Test accuracies from the run's `result.json`, where it is of these very children and weights."""
    path, metric = run.path / "result.json", run.task.metric
    try:
        result = json.loads(path.read_text()) if path.is_file() else {}
        same = result.get("weights_sha256") == run.weights_hash and all(
            result[name]["key"] == child.key for name, child in _three(found).items()
        )
        if not same:
            return None
        return {
            name: Estimate(
                result[name][metric], result[name][f"{metric}_low"], result[name][f"{metric}_high"], result["images"]
            )
            for name in _three(found)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # a result is derived: it is made again


def _seconds_before(out: Path) -> dict[str, float]:
    """What earlier calls of the same run spent, by stage."""
    try:
        return {str(stage): float(seconds) for stage, seconds in json.loads((out / "seconds.json").read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # it is only told, nothing depends on it


def _three(found: Found) -> dict[str, Child]:
    return {"chosen": found.best, "smallest": found.smallest, "largest": found.largest}


def _result(run: Run, found: Found, tested: Mapping[str, Estimate], seconds: Mapping[str, float]) -> dict[str, Any]:
    metric = run.task.metric
    children = {}
    for name, child in _three(found).items():
        estimate, latency = tested[name], child.latency
        assert latency is not None
        children[name] = {
            "key": child.key, metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high,
            "macs": int(child.costs["macs"]), "params": int(child.costs["params"]),
            "peak_memory_bytes": int(child.costs["peak_memory_bytes"]), "model_size_bytes": int(child.costs["model_size_bytes"]),
            "predicted_latency_ms": child.predicted_latency_ms,
            "latency_ms": latency.latency_ms, "latency_ms_low": latency.low, "latency_ms_high": latency.high,
        }  # fmt: skip
    return {
        "format": 2, "task": run.task.name, "metric": metric, **children,
        "budgets": list(found.budgets),
        "images": tested["chosen"].images, "evaluated": found.evaluated, "weights_sha256": run.weights_hash,
        "test_reads": run.test_reads, "notes": list(found.notes), "seconds": dict(seconds),
    }  # fmt: skip
