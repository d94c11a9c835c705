"""The children of a search as a table: what is known of each in one row, for the terminal and for other programs.

A row is a dict with the same columns for every child: key, stage, rung, score, images, confirm_score, each cost, latency_ms@TARGET with
its interval for every target measured on, likewise what was weighed there, macs_spent, seconds, created, and every dimension of the
arch as `arch.NAME`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search import pareto
from search.budget import Budget
from search.objective import OBJECTIVES, Objective
from search.records import PROBE, Row
from search.store import Store
from supernet import durable
from supernet.errors import InputError
from supernet.samples import Columns, unpack

INSTALL = "pip install 'nestling[data]'"
ZONES = 8
"""Rows of `best_by_zone`, unless told otherwise."""

Child = dict[str, Any]


def children(store: Store, columns: Columns | None = None) -> list[Child]:
    """A row for every evaluated child, in the order of evaluation; what is not known is None.

    With a task's `columns`, also `samples.NAME`: an array of a value for every image, in the split's order.
    Raises `InputError` where the file is damaged.
    """
    confirmed = {each.key: each for each in store.confirmed(samples=False)}
    measured = _measured(store)
    targets = sorted({name for known in measured.values() for name in known})
    found = []
    for row in store.rows(samples=columns is not None):
        result, known = confirmed.get(row.key), measured.get(row.key, {})
        found.append({
            "key": row.key, "stage": row.stage, "rung": row.rung, "score": row.score, "images": row.images,
            "confirm_score": result.score if result else None, "confirm_images": result.images if result else None, **row.costs,
            **{name: known.get(name) for name in targets},
            "macs_spent": row.macs_spent, "seconds": row.seconds, "created": row.created,
            **{f"arch.{name}": choice for name, choice in _arch(store, row).items()},
            **(_samples(store, row, columns) if columns else {}),
        })  # fmt: skip
    names = list(dict.fromkeys(name for child in found for name in child))
    return [{name: child.get(name) for name in names} for child in found]


def _measured(store: Store) -> dict[str, dict[str, float]]:
    """Key of a child -> column -> what was measured: latencies in ms, and weights."""
    found: dict[str, dict[str, float]] = {}
    for each in store.measurements():
        values = {"latency_ms": each.latency_ms, "latency_ms_low": each.latency_ms_low, "latency_ms_high": each.latency_ms_high}
        found.setdefault(each.key, {}).update({f"{name}@{each.target}": value for name, value in values.items()})
    for weighed in store.weighed():
        for metric, (low, middle, high) in weighed.spans.items():
            values = {metric: middle, f"{metric}_low": low, f"{metric}_high": high}
            found.setdefault(weighed.key, {}).update({f"{name}@{weighed.target}": value for name, value in values.items()})
    return found


def _arch(store: Store, row: Row) -> dict[str, Any]:
    try:
        return dict(json.loads(row.arch).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{store.path}: the arch of {row.key} is damaged: restore a copy, or search again") from error


def _samples(store: Store, row: Row, columns: Columns) -> dict[str, Any]:
    try:
        return {f"samples.{name}": values for name, values in unpack(row.samples, row.images, columns).items()}
    except ValueError as error:
        raise InputError(
            f"{store.path}: the samples of {row.key} are damaged ({error}): restore a copy, or search again"
        ) from error


def scored(
    table: Sequence[Child], objective: Objective, labels: NDArray[np.int64], classes: int, *, keep: bool = False
) -> list[Child]:
    """Rows of `children` with samples, and a column of the objective's mean on the images that each was scored on.

    `labels` are those of the search split, shape (images,). The samples are left out, unless they are to be kept.
    """
    found = []
    for child in table:
        samples = {name.removeprefix("samples."): child[name] for name in child if name.startswith("samples.")}
        value = float(objective.values(samples, labels[: child["images"]], classes).mean(dtype=np.float64))
        others = {name: each for name, each in child.items() if keep or not name.startswith("samples.")}
        found.append({"key": others.pop("key"), objective.name: value, **others})
    return found


# --- choosing rows ---


def chosen(
    table: Sequence[Child], *, stage: str | None = None, budgets: Sequence[Budget] = (), sort: str = "score", limit: int | None = None
) -> list[Child]:  # fmt: skip
    """Children of a stage that meet every budget, sorted by a column, the first `limit` of them.

    Scores come from the largest down (those of a higher rung first: a child that left the race early was scored on fewer images, and
    may owe its score to luck), all else from the smallest up, unknown values last. A latency counts with the worse end of its
    interval as measured; where no target is named, on all. A child of which a budget's cost is not known does not meet it.
    Raises `InputError` for a stage or a column that no child has.
    """
    found = list(table)
    if stage is not None:
        stages = sorted({child["stage"] for child in table})
        if stage not in stages:
            raise InputError(f"--stage must be one of {', '.join(stages) or 'none yet'}, but got {stage!r}")
        found = [child for child in found if child["stage"] == stage]
    for budget in budgets:
        columns = columns_of(table, budget)
        found = [child for child in found if all(meets(child, budget, names) for names in columns)]
    return _sorted(table, found, sort)[:limit]


def columns_of(table: Sequence[Child], budget: Budget) -> list[list[str]]:
    """The columns that hold a budget's cost: the metric, or the worse ends of measured intervals on the target named, or on all.

    For each target that of the exported child, then that of its probe. Raises `InputError` where no child has any.
    """
    known = list(table[0]) if table else []
    end = f"{budget.metric}_{'low' if budget.lower else 'high'}@"
    targets: dict[str, list[str]] = {}
    for name in known:
        if name.startswith(end):
            target = target_of(name).removeprefix(PROBE)
            if budget.target in (None, target, target.split(":")[0]):
                targets.setdefault(target, []).append(name)
    found = [sorted(names, key=lambda name: PROBE in name) for names in targets.values()]
    found = found or [[name] for name in known if name == budget.metric]
    if table and not found:
        raise InputError(
            f"the cost in {budget} is not known of any child here: give a budget over what was counted or measured"
        )
    return found


def meets(child: Child, budget: Budget, columns: Sequence[str]) -> bool:
    """Whether a child keeps a budget by the first of the columns that is known of it; none is no."""
    value = next((child[name] for name in columns if child.get(name) is not None), None)
    return value is not None and budget.holds(value)


def target_of(column: str) -> str:
    """The target in the name of a column of what was measured, without the hash of its fingerprint: "local:threads=1"."""
    return column.split("@", 1)[1].rsplit(":", 1)[0]


def _sorted(table: Sequence[Child], found: list[Child], column: str) -> list[Child]:
    known = [name for name in (table[0] if table else ()) if not name.startswith("samples.")]
    if table and column not in known:
        raise InputError(f"--sort must be one of {', '.join(known)}, but got {column!r}")
    there, missing = (
        [child for child in found if child[column] is not None],
        [child for child in found if child[column] is None],
    )
    if column == "score":
        return sorted(there, key=lambda child: (-child["rung"], -child["score"]))
    if column == "confirm_score" or column in OBJECTIVES or column.startswith("images_per_s"):
        return [*sorted(there, key=lambda child: -child[column]), *missing]
    mixed = len({isinstance(child[column], str) for child in there}) > 1  # choices such as 3 and "none"
    return [*sorted(there, key=lambda child: str(child[column]) if mixed else child[column]), *missing]


def best_by_zone(table: Sequence[Child], cost: str = "macs", zones: int = ZONES) -> list[Child]:
    """The best child of each zone of a cost, the cheapest zone first, with the column `front`: whether none cheaper is as good.

    Zones are equally wide in the cost's logarithm, from the cheapest child to the dearest; empty ones are left out. Only children
    of the highest rung count, for others were scored on fewer images; those without the cost do not. Of equals the cheapest wins.
    Raises `InputError` for a column that no child has or that is no positive number.
    """
    if table and cost not in table[0]:
        raise InputError(f"--cost must be a column that children have, but got {cost!r}: take one such as macs")
    highest = max((child["rung"] for child in table), default=0)
    known = [child for child in table if child["rung"] == highest and child[cost] is not None]
    if not all(isinstance(child[cost], int | float) and child[cost] > 0 for child in known):
        raise InputError(f"--cost must be a positive number of every child, but {cost!r} is not: take one such as macs")
    if not known:
        return []
    costs = np.log([child[cost] for child in known])
    edges = np.linspace(costs.min(), costs.max(), zones + 1)[1:-1]
    front = {known[place]["key"] for place in pareto.front([child["score"] for child in known], costs[:, None])}
    best: dict[int, Child] = {}
    for zone, child in zip(np.searchsorted(edges, costs, side="left").tolist(), known, strict=True):
        rival = best.get(zone)
        if rival is None or (child["score"], -child[cost]) > (rival["score"], -rival[cost]):
            best[zone] = child
    return [{**best[zone], "front": best[zone]["key"] in front} for zone in sorted(best)]


def for_terminal(table: Sequence[Child], show: Callable[[float], str]) -> list[dict[str, object]]:
    """The columns that fit a terminal, for `supernet.console.print_table`; scores written by `show` (a task's)."""
    found = []
    for child in table:
        latencies = {
            f"ms on {target_of(name)}": "-" if value is None else f"{value:.4g}"
            for name, value in child.items() if name.startswith("latency_ms@")
        }  # fmt: skip
        found.append({
            **({"front": "*" if child["front"] else ""} if "front" in child else {}),
            "key": child["key"], "score": show(child["score"]),
            **{name: each.show(child[name]) for name, each in OBJECTIVES.items() if name in child}, "images": child["images"],
            "confirm": "-" if child["confirm_score"] is None else show(child["confirm_score"]),
            **{name: int(child[name]) for name in ("macs", "params") if child.get(name) is not None}, **latencies,
            "stage": child["stage"], "rung": child["rung"],
        })  # fmt: skip
    return found


# --- files ---


def export(table: Sequence[Child], out: Path) -> Path:
    """Write the rows as .csv, .parquet or .json (a list of objects), as the suffix says; whole or not at all.

    In CSV a missing value is empty, and a text that a spreadsheet would take for a formula begins with an apostrophe. Raises
    `InputError` for another suffix, where CSV is asked for samples, where pyarrow is missing, and `WriteError` on a full disk.
    """
    writers: Mapping[str, Callable[[Sequence[Child]], bytes]] = {".csv": _csv, ".parquet": _parquet, ".json": _json}
    if out.suffix not in writers:
        raise InputError(f"--out must end with one of {', '.join(writers)}, but got {out.name!r}")
    durable.write_bytes(out, writers[out.suffix](table))
    return out


def _csv(table: Sequence[Child]) -> bytes:
    samples = [name for name in (table[0] if table else ()) if name.startswith("samples.")]
    if samples:
        raise InputError("--samples, a value for every image, does not fit into CSV: export to .parquet or .json")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_cell(name) for name in (table[0] if table else ())])
    writer.writerows([_cell(value) for value in child.values()] for child in table)
    return text.getvalue().encode()


def _cell(value: object) -> object:
    """A cell that no spreadsheet calculates (CWE-1236)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value


def _json(table: Sequence[Child]) -> bytes:
    for child in table:
        for name, value in child.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} of {child['key']} is {value}, which JSON does not know: export to .csv or .parquet")
    plain = (
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in child.items()} for child in table
    )
    try:
        lines = ",\n".join(json.dumps(child, allow_nan=False) for child in plain)
    except ValueError as error:
        raise InputError("a sample is no finite number, which JSON does not know: export to .parquet") from error
    return f"[\n{lines}\n]\n".encode()


def _parquet(table: Sequence[Child]) -> bytes:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"Parquet is written by pyarrow, which is not installed: {INSTALL}") from error
    columns = {name: _one_kind([child[name] for child in table]) for name in (table[0] if table else ())}
    sink = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), sink, compression="zstd")
    return sink.getvalue()


def _one_kind(values: list[Any]) -> list[Any]:
    """A column of choices of several kinds (a number or "none") as JSON texts: a column of Parquet has one type."""
    kinds = {float if type(value) in (int, float) else type(value) for value in values if value is not None}
    return [None if value is None else json.dumps(value) for value in values] if len(kinds) > 1 else values
