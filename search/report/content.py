"""What the report of a run shows, gathered from the files of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.card import cell
from deploy.latency import LatencyModel
from search.feasible import Feasible
from search.found import Child, Found
from search.known import scores_of
from search.loop import latency_file
from search.objective import objective_named
from search.report.figures import Measure
from search.report.page import ReportContent, write_report
from search.report.tables import more_tables
from search.store import Store, latest_store
from supernet import durable
from supernet.arch import Arch
from supernet.console import number_of
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.run import Run
from supernet.space import Space


def report_of(run: Run, out: Path) -> Path:
    """Write the report of a run: training alone, or with its latest search and final result where there are such."""
    write_report(out, content_of(run))
    return out


def content_of(run: Run) -> ReportContent:
    """Everything that the run's files know; test results only where they are of the latest search."""
    training = durable.read_lines(run.path / "metrics.jsonl")
    measure = Measure(run.task.metric, run.task.title, run.task.unit, run.task.loss_title)
    if not (run.path / "search" / "found.json").is_file():
        return ReportContent(
            title=run.path.name,
            measure=measure,
            training=training,
            facts=_facts(run, {}),
            notes=["This run was not searched yet."],
        )
    found = Found.load(run)
    result = _result(run, found)
    model = _latency_model(run, found)
    with Store.existing(latest_store(run.path)) as store:
        scored = scores_of(run, store, objective_named(None, run.task))
    return ReportContent(
        title=run.path.name,
        measure=measure,
        summary=[
            _summary(name, child, result.get(name), run.task.metric, found.objective) for name, child in _three(found).items()
        ],
        budgets=found.budgets,
        training=training,
        children=_children(run, found, model, scored),
        front=found.front,
        chosen=found.best.key,
        arch_table=_arch_table(run.space, found.best),
        tables=more_tables(run, found, scored),
        latency_fit=[(child.key, child.predicted_ms, child.latency_ms, True) for child in model.held_out] if model else None,
        latency_fit_error=_fit_error(model) if model else "",
        facts=_facts(run, result),
        notes=_notes(found, result, "Accuracies" if measure.unit == "%" else "Scores", run.task.metric),
    )


def _three(found: Found) -> dict[str, Child]:
    return {"chosen": found.best, "smallest": found.smallest, "largest": found.largest}


def _result(run: Run, found: Found) -> dict[str, Any]:
    path = run.path / "result.json"
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it, `nestling run` writes it again") from error
    whole = isinstance(value, dict) and all(
        isinstance(value.get(name), dict) and value[name].get("key") == child.key for name, child in _three(found).items()
    )
    return value if whole else {}


def _latency_model(run: Run, found: Found) -> LatencyModel | None:
    """The model of the target that the finalists were measured on."""
    if found.best.latency is None:
        return None
    path = latency_file(run, found.best.latency.fingerprint)
    return LatencyModel.load(path, run.space, None) if path.exists() else None


def _summary(name: str, child: Child, tested: Mapping[str, Any] | None, metric: str, objective: str) -> dict[str, Any]:
    """Test score where the final result has it; else the confirm split's, without an interval, where that is of this metric."""
    latency = child.latency
    measured = {column: (each.low, each.high) for column, each in child.latencies.items()}
    measured |= {column: (least, most) for column, (least, _, most) in child.weights.items()}
    shown = tested or ({metric: child.confirm_score} if objective == metric else {})
    return {
        "name": name, "key": child.key, **{part: shown.get(part) for part in (metric, f"{metric}_low", f"{metric}_high")},
        "macs": child.costs["macs"], "params": child.costs["params"], "latency_ms": latency.latency_ms if latency else None,
        "latency_ms_high": latency.high if latency else None, "predicted_latency_ms": child.predicted_latency_ms,
        "measured": measured,
    }  # fmt: skip


def _children(run: Run, found: Found, model: LatencyModel | None, scored: Mapping[Arch, float]) -> list[dict[str, Any]]:
    measured = {child.key: child.latency.latency_ms for child in (*found.finalists, *_three(found).values()) if child.latency}
    with Store.existing(latest_store(run.path)) as store:
        rows = store.rows(samples=False)
    codes = run.space.encode(list(scored))
    predicted = Feasible(run.space, Costs(run.space), (), model).table(codes).get("latency_ms")
    return [
        {
            "key": row.key, "score": score, "stage": row.stage, "measured_latency_ms": measured.get(row.key),
            "costs": {**row.costs, **({"predicted_latency_ms": float(predicted[position])} if predicted is not None else {})},
        }
        for position, (row, score) in enumerate(zip(rows, scored.values(), strict=True))
    ]  # fmt: skip


def _arch_table(space: Space, child: Child) -> list[dict[str, str]]:
    rows = space.family.rows({name: (choice,) for name, choice in child.arch})
    return [{column: cell(value) for column, value in row.items()} for row in rows]


def _fit_error(model: LatencyModel) -> str:
    return f"{model.summary()[0].upper()}{model.summary()[1:]}. Finalists are measured, not predicted."


def _facts(run: Run, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment = _environment(run)
    splits = run.dataset.splits
    sizes = {name: len(getattr(splits, name)) for name in ("train", "search_val", "confirm", "test")}
    seconds = result.get("seconds", {})
    return [
        ("space", f"{run.space.name}, {number_of(run.space.size)} archs"),
        ("data", f"{Path(run.data['name']).name}, {len(run.classes)} classes"),
        ("images", ", ".join(f"{name} {count}" for name, count in sizes.items())),
        ("recipe", f"{run.recipe.name}, {run.recipe.epochs} epochs, batch {run.recipe.batch_size}"),
        ("reads of the test split", str(run.test_reads)),
        ("latency", "ONNX Runtime, batch 1; at one thread the CPU time of that thread"),
        ("processor", f"{environment['processor']}, {environment['cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())),
        *([("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))] if seconds else []),
    ]


def _environment(run: Run) -> dict[str, Any]:
    path = run.path / "environment.json"
    try:
        value = json.loads(path.read_text())
        return {"processor": str(value["processor"]), "cores": value["cores"], "versions": dict(value["versions"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}): restore it from a copy of the run") from error


def _notes(found: Found, result: Mapping[str, Any], scores: str, metric: str) -> list[str]:
    which = "test split" if result else "confirm split (the test split was not read)"
    remark = (
        f"{scores} in the first table are of the {which}; those in the picture are of the search-val split, on which the search "
        "compares children and whose best value is therefore a lucky one."
    )
    other = (
        f"The search made {found.objective} largest: its tables and notes are of that, the first table and the picture are not."
    )
    named = [] if found.objective == metric else [other]
    return [remark, *named, *(f"{note[0].upper()}{note[1:]}." for note in found.notes)]
