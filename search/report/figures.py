"""The pictures of the report, as plotly figures: training curves, accuracy against cost, predicted against measured latency.

Colours are chosen to be read on white and on black; those of text and grid are set by the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from search.budget import METRICS, Budget

MOST_CLOUD_POINTS = 5_000
"""More dots than these cannot be told apart and make a browser slow."""
MOST_CURVE_POINTS = 500
"""A longer training log is averaged over neighbouring steps."""

BLUE, ORANGE, GREEN, RED, VIOLET, GREY = "#3d85c6", "#e08a3c", "#2fa37c", "#e0525f", "#9b7fd1", "#8c96a6"
STAGE_COLOURS = (GREY, "#6fa8dc", "#b59ae0", "#c2a878", "#7fb8a4")
CHILD_COLOURS = {"largest": BLUE, "smallest": ORANGE, "random": GREY}

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Measure:
    """How scores are called and written: `key` in the records, `name` for people, `unit` "%" (of fractions) or what stands behind.

    `loss` says what the training loss is.
    """

    key: str = "top1"
    name: str = "top-1 accuracy"
    unit: str = "%"
    loss: str = "cross entropy to the labels"

    @property
    def hover(self) -> str:
        """A score as plotly writes it beside the mouse."""
        return "%{y:.2%}" if self.unit == "%" else f"%{{y:.4g}} {self.unit}"

    @property
    def axis(self) -> dict[str, Any]:
        """Ticks of an axis of scores."""
        return {"tickformat": ".2~%"} if self.unit == "%" else {"tickformat": None, "ticksuffix": f" {self.unit}"}


TOP1 = Measure()


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture: `plot` is plotly's JSON value (`data` and `layout`); title and caption are plain text."""

    name: str
    title: str
    caption: str
    plot: Mapping[str, Any]


def training(records: Records, measure: Measure = TOP1) -> list[Figure]:
    """Loss and score of the largest, the smallest and the random children over the epochs; what was not logged is left out.

    `records` are lines of the training log: `{"epoch": float, "children": {"largest": {"loss": ..., "top1": ...}, ...}}`.
    """
    size = math.ceil(len(records) / MOST_CURVE_POINTS)
    averaged = f" Each point is the mean of {size} logged steps." if size > 1 else ""
    said = "Accuracy" if measure.unit == "%" else _first_up(measure.name)
    kinds = [
        (
            "loss",
            "Training loss",
            f"{_first_up(measure.loss)} on the batches trained on, of each kind of child, whatever it learns from.",
        ),
        (measure.key, f"Training {measure.name}", f"{said} on the batches trained on, not on held-out images."),
    ]
    figures = []
    for what, title, caption in kinds:
        traces = [trace for child in CHILD_COLOURS if (trace := _curve(records, child, what, max(size, 1), measure))]
        if traces:
            ticks = measure.axis if what == measure.key else {"tickformat": None}
            y_axis = {"title": {"text": f"training {measure.name if what == measure.key else what}"}, **ticks}
            layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": y_axis, "hovermode": "x unified"}
            figures.append(Figure(f"training-{what}", title, caption + averaged, _plot(traces, layout)))
    return figures


def accuracy(
    children: Records, front: Sequence[str], chosen: str | None, budgets: Sequence[Budget], latency_ms_high: float | None,
    measure: Measure = TOP1,
) -> Figure | None:  # fmt: skip
    """Score of every child against its latency (predicted, else measured, else its macs), with the front and the chosen child.

    None when fewer than two children have a score and such a cost. The cloud is thinned to `MOST_CLOUD_POINTS`, the
    front never. `latency_ms_high` is the upper end of the chosen child's measured latency.
    """
    metric = _metric(children)
    points = [point for child in children if (point := _point(child, metric)) is not None]
    if len(points) < 2:
        return None
    percent = measure.unit == "%" and all(0 <= point.y <= 1 for point in points)
    value, what = ("%{y:.2%}", "accuracy") if percent else ("%{y:.4g}", "score")
    ticks: Mapping[str, Any] = {"tickformat": ".2~%" if percent else None}
    if measure.unit != "%":
        value, what, ticks = measure.hover, measure.name, measure.axis
    names = set(front)
    best = sorted((point for point in points if point.key in names), key=lambda point: (point.x, -point.y))
    others = [point for point in points if point.key not in names and point.key != chosen]
    cloud = _thinned(others)
    hover = f"%{{text}}<br>{value} at {_AXES[metric].hover}<extra></extra>"
    traces = [*_cloud(cloud, hover), *_front(best, hover)]
    if metric == "predicted_latency_ms":
        traces += _measured([point for point in points if point.key != chosen], value)
    traces += [_star(point, metric, value, latency_ms_high) for point in points if point.key == chosen]
    layout = {
        "xaxis": {"title": {"text": _AXES[metric].title}, **_AXES[metric].ticks},
        "yaxis": {"title": {"text": f"{what} on the search split"}, **ticks},
        **_limits(budgets, metric),
    }
    caption = f"{_counted(len(children), len(points), len(others), len(cloud))} {_AXES[metric].caption}"
    title = f"{_first_up(what)} against {'macs' if metric == 'macs' else 'latency'}"
    return Figure("accuracy", title, f"{caption} The line is the best {what} seen up to each cost.", _plot(traces, layout))


def latency_fit(points: Sequence[tuple[str, float, float, bool]], error: str) -> Figure | None:
    """Predicted against measured latency of whole children, `points` being (key, predicted ms, measured ms, held out).

    `error` says how wrong the predictor is, in words. None when there is no point.
    """
    known = [(key, p, m, held) for key, p, m, held in points if finite(p) is not None and finite(m) is not None]
    if not known:
        return None
    ends = [min(min(p, m) for _, p, m, _ in known), max(max(p, m) for _, p, m, _ in known)]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "exact",
            "x": ends,
            "y": ends,
            "line": {"color": GREY, "dash": "dot", "width": 1.5},
            "hoverinfo": "skip",
        }
    ]
    for held_out, name, colour in ((False, "used for the fit", BLUE), (True, "held out", ORANGE)):
        part = [(key, p, m) for key, p, m, held in known if bool(held) is held_out]
        if part:
            marker = {"color": colour, "size": 8, "symbol": "diamond" if held_out else "circle", "opacity": 0.85}
            hover = "%{text}<br>predicted %{x:.4g} ms, measured %{y:.4g} ms<extra></extra>"
            traces.append(_scatter(name, part, marker, hover))
    layout = {"xaxis": {"title": {"text": "predicted latency (ms)"}}, "yaxis": {"title": {"text": "measured latency (ms)"}}}
    caption = f"{error} On the dotted line the prediction is exact; above it the child is slower than predicted.".strip()
    return Figure("latency-fit", "Predicted against measured latency", caption, _plot(traces, layout))


@dataclass(frozen=True, slots=True)
class _Point:
    """A child in the plane: its cost, its score, and its measured latency where there is one."""

    key: str
    stage: str
    x: float
    y: float
    measured_ms: float | None


@dataclass(frozen=True, slots=True)
class _Axis:
    title: str
    hover: str
    caption: str
    ticks: Mapping[str, Any]


_AXES = {
    "predicted_latency_ms": _Axis(
        "latency (ms)",
        "%{x:.4g} ms predicted",
        "Dots are at the predicted latency, diamonds at the measured one; so is the star, if the chosen child was measured.",
        {},
    ),
    "measured_latency_ms": _Axis("measured latency (ms)", "%{x:.4g} ms measured", "Latency is measured.", {}),
    "macs": _Axis("macs (multiply-accumulates)", "%{x:.4s} macs", "No latency is known.", {"exponentformat": "SI"}),
}
"""What the children are drawn against, the first that is known."""


def _metric(children: Records) -> str:
    return next((metric for metric in _AXES if any(_cost(child, metric) is not None for child in children)), "macs")


def _cost(child: Mapping[str, Any], metric: str) -> float | None:
    costs = child.get("costs") or {}
    return finite(child.get(metric) if metric == "measured_latency_ms" else costs.get(metric))


def _point(child: Mapping[str, Any], metric: str) -> _Point | None:
    """Place a child in the plane; one without this cost or a score has no place."""
    x, y = _cost(child, metric), finite(child.get("score"))
    if x is None or y is None:
        return None
    return _Point(str(child["key"]), str(child.get("stage") or ""), x, y, finite(child.get("measured_latency_ms")))


def _cloud(points: Sequence[_Point], hover: str) -> list[dict[str, Any]]:
    """One trace for each stage of the search, in the order in which the stages appear."""
    stages = list(dict.fromkeys(point.stage for point in points))
    traces = []
    for number, stage in enumerate(stages):
        marker = {"color": STAGE_COLOURS[number % len(STAGE_COLOURS)], "size": 5, "opacity": 0.55}
        part = [(point.key, point.x, point.y) for point in points if point.stage == stage]
        traces.append(_scatter(stage or "children", part, marker, hover))
    return traces


def _front(points: Sequence[_Point], hover: str) -> list[dict[str, Any]]:
    """Draw the front's children, and the best score that each cost can buy as a staircase (a front over two costs zigzags)."""
    if not points:
        return []
    best = np.maximum.accumulate([point.y for point in points])
    steps = [point for point, top in zip(points, best, strict=True) if point.y == top]
    line = {"color": GREEN, "width": 2, "shape": "hv"}
    stairs = {"x": [point.x for point in steps], "y": [point.y for point in steps], "line": line, "hoverinfo": "skip"}
    marker = {"color": GREEN, "size": 8, "line": {"width": 1, "color": "#ffffff"}}
    dots = _scatter("Pareto front", [(point.key, point.x, point.y) for point in points], marker, hover)
    return [{"type": "scatter", "mode": "lines", "showlegend": False, **stairs}, dots]


def _measured(points: Sequence[_Point], value: str) -> list[dict[str, Any]]:
    known = _thinned([point for point in points if point.measured_ms is not None])
    marker = {"color": VIOLET, "size": 9, "symbol": "diamond-open", "line": {"width": 2}}
    hover = f"%{{text}}<br>{value} at %{{x:.4g}} ms measured<extra></extra>"
    return [_scatter("measured", [(point.key, point.measured_ms, point.y) for point in known], marker, hover)] if known else []


def _star(point: _Point, metric: str, value: str, latency_ms_high: float | None) -> dict[str, Any]:
    """Draw the chosen child at its measured latency where there is one, with a bar up to the upper end of its interval."""
    measured_ms = None if metric == "macs" else point.measured_ms
    where = _AXES[metric if measured_ms is None else "measured_latency_ms"].hover
    x = point.x if measured_ms is None else measured_ms
    marker = {"color": RED, "size": 17, "symbol": "star", "line": {"width": 1.2, "color": "#ffffff"}}
    trace = _scatter("chosen", [(point.key, x, point.y)], marker, f"chosen: %{{text}}<br>{value} at {where}<extra></extra>")
    high = finite(latency_ms_high)
    if measured_ms is not None and high is not None and high > measured_ms:
        reach = {"type": "data", "symmetric": False, "array": [high - measured_ms], "arrayminus": [0]}
        trace["error_x"] = {**reach, "color": RED, "thickness": 2}
    return trace


def _limits(budgets: Sequence[Budget], metric: str) -> dict[str, Any]:
    """Draw a dashed line where a budget bounds what the horizontal axis shows."""
    shown = metric if metric in METRICS else "latency_ms"
    drawn = [budget for budget in budgets if budget.column == shown]
    line = {"color": RED, "dash": "dash", "width": 1.5}
    shapes = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1, "line": line}
        for x in (budget.bound for budget in drawn)
    ]
    where = {
        "xref": "x",
        "yref": "paper",
        "y": 0,
        "xanchor": "right",
        "yanchor": "bottom",
        "textangle": -90,
        "showarrow": False,
    }
    texts = [{"x": budget.bound, "text": _plain(str(budget)), "font": {"color": RED, "size": 12}, **where} for budget in drawn]
    return {"shapes": shapes, "annotations": texts}


def _counted(total: int, placed: int, others: int, drawn: int) -> str:
    """Say how many children were evaluated and how many of them the picture shows."""
    parts = [f"{total:,} children evaluated, one dot each."]
    if drawn < others:
        parts.append(
            f"The front is whole; of the {others:,} others {drawn:,} are drawn, evenly picked in the order of evaluation."
        )
    if placed < total:
        parts.append(f"{total - placed:,} without this cost or a score are left out.")
    return " ".join(parts)


def _curve(records: Records, child: str, what: str, size: int, measure: Measure) -> dict[str, Any] | None:
    """One line of the training curves: means over `size` neighbouring records; a gap where nothing was logged."""
    x, y = [], []
    for start in range(0, len(records), size):
        part = records[start : start + size]
        x.append(_mean(record.get("epoch") for record in part))
        y.append(_mean(((record.get("children") or {}).get(child) or {}).get(what) for record in part))
    if all(value is None for value in y):
        return None
    mode = "lines+markers" if len(x) <= 40 else "lines"
    line = {"color": CHILD_COLOURS[child], "width": 2}
    number = measure.hover if what == measure.key else "%{y:.4g}"
    hover = f"{child}: {number}<extra></extra>"
    return {
        "type": "scatter",
        "mode": mode,
        "name": child,
        "x": x,
        "y": y,
        "line": line,
        "marker": {"size": 5},
        "hovertemplate": hover,
    }


def _scatter(
    name: str, points: Sequence[tuple[str, float | None, float]], marker: Mapping[str, Any], hover: str
) -> dict[str, Any]:
    x, y, text = [p[1] for p in points], [p[2] for p in points], [_plain(p[0]) for p in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _plain(name),
        "x": x,
        "y": y,
        "text": text,
        "marker": dict(marker),
        "hovertemplate": hover,
    }


def _plot(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> dict[str, Any]:
    """Check a figure and give it as a JSON value, without plotly's own theme."""
    import plotly.graph_objects as go

    common = {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 16, "r": 16, "t": 16, "b": 16},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "xanchor": "left", "x": 0, "itemsizing": "constant"},
        "hovermode": "closest",
        "showlegend": True,
    }
    axis = {"automargin": True, "zeroline": False, "ticks": "outside", "ticklen": 5, "showline": True}
    merged = {**common, **layout, **{name: {**axis, **layout[name]} for name in ("xaxis", "yaxis")}}
    figure: dict[str, Any] = go.Figure(data=list(traces), layout=merged).to_plotly_json()
    return figure


def _thinned(points: Sequence[_Point]) -> list[_Point]:
    """At most `MOST_CLOUD_POINTS` of them, evenly picked."""
    picked = np.linspace(0, len(points) - 1, min(len(points), MOST_CLOUD_POINTS)).astype(int)
    return [points[i] for i in picked]


def _first_up(text: str) -> str:
    """The same text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _mean(values: Iterable[Any]) -> float | None:
    known = [number for value in values if (number := finite(value)) is not None]
    return sum(known) / len(known) if known else None


def finite(value: Any) -> float | None:
    """Give a finite float, or None: JSON has no other."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _plain(text: str) -> str:
    """Text that plotly shows as it is: it reads a small HTML of its own."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
