"""More tables of the report: the finalists and how sure the choice is, children for other budgets, what matters in the space."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from search.found import Child, Found
from search.importance import importance
from search.objective import Labels, Objective, PerImage, Values, objective_named
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.run import Run
from supernet.samples import Samples

Table = tuple[str, str, list[dict[str, Any]]]
"""Title, what to know of it, and rows."""


def more_tables(run: Run, found: Found, scored: Mapping[Arch, float]) -> list[Table]:
    """Those that say something; an empty one is left out. `scored`: every evaluated child with its score."""
    tables = [_finalists(run, found), _further(run, found), _importance(run, scored), _rivals(run)]
    return [table for table in tables if table[2]]


def _finalists(run: Run, found: Found) -> Table:
    answer, show = found.answers[0], objective_of(run, found).show
    rows = [
        {
            "finalist": child.key, **_scores(child, show), "p (Holm)": _p_value(answer.p_values.get(child.key)),
            "may be the best": "yes" if child.key in answer.tied else "no", "chosen": "yes" if child.key == answer.child.key else "",
        }
        for child in answer.finalists
    ]  # fmt: skip
    caption = (
        "Compared on the same confirm images, which the search did not see. Expected: what a finalist is to be expected to reach on "
        "other images, drawn towards the mean of all, since the best of several owes part of its score to luck. p: how often two "
        "equally good children would differ by at least as much on so many images (two-sided, adjusted by Holm); a large p is no proof "
        "that they are equal. Of those that may be the best (95 % confidence set) the cheapest was chosen."
    )
    return "Finalists", caption, rows


def _further(run: Run, found: Found) -> Table:
    rows, show = [], objective_of(run, found).show
    for answer in found.answers[1:]:
        latency, costs = answer.child.latency, answer.child.costs
        rows.append({
            "for": answer.name, "budgets": ", ".join(answer.budgets), "child": answer.child.key, **_scores(answer.child, show),
            "macs": f"{costs['macs']:,.0f}", "parameters": f"{costs['params']:,.0f}",
            "latency": f"{latency.latency_ms:.4g} ms (at most {latency.high:.4g})" if latency else None,
        })  # fmt: skip
    return "Children for other budgets", "Each was chosen like the first, among finalists of its own.", rows


def _importance(run: Run, scored: Mapping[Arch, float]) -> Table:
    """Which dimensions the scores of the evaluated children depend on, at equal macs."""
    archs = list(scored)
    codes = run.space.encode(archs)
    result = importance(run.space, codes, np.array(list(scored.values())), Costs(run.space).macs(codes).astype(np.float64))
    shares = {row.dimension: [max(0.0, part) for part in (row.share, row.low, row.high)] for row in result.rows}
    rows = [
        {"dimension": name, "share of the variance": "{:.0%} ({:.0%} to {:.0%})".format(*part)} for name, part in shares.items()
    ]
    return "What matters, at equal macs", result.why, rows


def _rivals(run: Run) -> Table:
    """Networks of others, trained on the same data and measured beside a child of ours (`benchmarks/worth_it.py` writes it)."""
    path = run.path / "rivals.json"
    if not path.is_file():
        return "Is it worth it?", "", []
    try:
        rows = [{str(name): str(value) for name, value in row.items()} for row in json.loads(path.read_text())["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}): remove it") from error
    return (
        "Is it worth it?",
        "Networks of others, trained on the same images, beside the child at the same measured latency.",
        rows,
    )


def objective_of(run: Run, found: Found) -> Objective:
    """What a search made largest, to write its scores; of a user's own objective no more than the name is known, so no unit."""
    try:
        return objective_named(found.objective, run.task)
    except InputError:
        return PerImage(found.objective, found.objective, "", _unknown)


def _unknown(samples: Samples, labels: Labels) -> Values:
    raise InputError("an objective of the user's own is only known in the program that searched with it: search from there")


def _scores(child: Child, show: Callable[[float], str]) -> dict[str, Any]:
    estimate = child.estimate
    return {
        "search-val": show(child.search_score),
        "confirm": show(child.confirm_score) if child.confirm_score is not None else None,
        "expected": f"{show(estimate.value)} ({show(estimate.low)} to {show(estimate.high)})" if estimate else None,
    }


def _p_value(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
