"""The page around the pictures: tables, facts and remarks, in one HTML file that asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.budget import MEASURED, Budget, parse_all
from search.report.figures import TOP1, Figure, Measure, Records, accuracy, finite, latency_fit, training
from supernet.durable import write_text

DASH = "\u2013"
SPACE = "\u00a0"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportContent:
    """What the report shows. Fractions are 0..1; whatever is missing (None, empty) is left out or shown as a dash.

    `measure` says how scores are called and written (top1 unless told otherwise). `summary`: rows named "chosen", "smallest",
    "largest" with key, top1, top1_low, top1_high, macs, params, latency_ms, latency_ms_high, predicted_latency_ms. `budgets`: texts
    that `Budget.parse` reads. `training`: lines of the training log. `children`: key, score, stage, costs (macs, params,
    peak_memory_bytes, predicted_latency_ms), measured_latency_ms. `front`: keys of children. `arch_table`: rows of free columns.
    `tables`: more tables: title, what to know of it, rows of free columns. `latency_fit`: (key, predicted ms, measured ms, held out),
    with its error in words. `facts`: name and value. `notes`: remarks in whole sentences.
    """

    title: str
    measure: Measure = TOP1
    summary: Records = ()
    budgets: Sequence[str] = ()
    training: Records = ()
    children: Records = ()
    front: Sequence[str] = ()
    chosen: str | None = None
    arch_table: Records = ()
    tables: Sequence[tuple[str, str, Records]] = ()
    latency_fit: Sequence[tuple[str, float, float, bool]] | None = None
    latency_fit_error: str = ""
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report, atomically. The file is about 5 MB: plotly.js is inside.

    Raises `InputError` for a budget that cannot be read.
    """
    write_text(path, render(content))


def render(content: ReportContent) -> str:
    """Give the report as HTML text."""
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs()
    figures = _figures(content)
    scripts = [library, SCRIPT] if figures else []
    body = "\n".join(
        filter(
            None,
            [
                _head(content),
                _children(content),
                *map(_figure, figures),
                *map(_more, content.tables),
                _arch(content),
                _facts(content),
            ],
        )
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_policy(scripts)}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(content.title)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def _policy(scripts: Sequence[str]) -> str:
    """Allow our own scripts, by their hash, and nothing from outside. Plotly styles elements as it draws."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    rules = {
        "default-src": "'none'",
        "script-src": hashes or "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",  # plotly's "download as image"
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(" ".join(rule) for rule in rules.items())}">'


def _figures(content: ReportContent) -> list[Figure]:
    high = _row(content, "chosen").get("latency_ms_high")
    figures: list[Figure | None] = [
        accuracy(content.children, content.front, content.chosen, parse_all(content.budgets), high, content.measure),
        latency_fit(content.latency_fit or (), content.latency_fit_error),
        *training(content.training, content.measure),
    ]
    return [figure for figure in figures if figure is not None]


def _head(content: ReportContent) -> str:
    """Title, the chosen child in large figures, its budgets, and the remarks."""
    chosen = _row(content, "chosen")
    tiles = [
        (_text(content.measure.name), _score(chosen, content.measure), _interval(chosen, content.measure)),
        ("latency", milliseconds(chosen.get("latency_ms")), _at_most(chosen)),
        ("macs", count(chosen.get("macs")), "multiply-accumulates"),
        ("parameters", count(chosen.get("params")), ""),
    ]
    shown = [
        f'<div class="tile"><span class="name">{name}</span><b>{value}</b><span class="small">{more}</span></div>'
        for name, value, more in tiles
        if value != DASH
    ]
    key = f'<p class="lead">Chosen child <code>{_text(content.chosen)}</code></p>' if content.chosen else ""
    notes = "".join(f"<li>{_text(note)}</li>" for note in content.notes)
    return "\n".join(
        [
            f"<header><h1>{_text(content.title)}</h1>{key}</header>",
            f'<div class="tiles">{"".join(shown)}</div>' if shown else "",
            _budgets(content),
            f'<section class="notes"><h2>Remarks</h2><ul>{notes}</ul></section>' if notes else "",
        ]
    )


def _budgets(content: ReportContent) -> str:
    """List for each budget what the chosen child costs and whether that keeps it."""
    chosen = _row(content, "chosen")
    costs = next((child.get("costs") or {} for child in content.children if child.get("key") == content.chosen), {})
    lines = []
    for budget in parse_all(content.budgets):
        if budget.metric in MEASURED:  # the bound holds on the worse end of the measured interval
            measured = {"latency_ms": (None, chosen.get("latency_ms_high")), **chosen.get("measured", {})}
            value = measured.get(budget.column, (None, None))[0 if budget.lower else 1]
        else:
            value = costs.get(budget.metric) if chosen.get(budget.metric) is None else chosen[budget.metric]
        lines.append(f"<li>{_verdict(budget, value)}</li>")
    return f'<ul class="budgets">{"".join(lines)}</ul>' if lines else ""


def _unit(metric: str) -> Callable[[Any], str]:
    """What writes a value of a metric."""
    if metric in ("latency_ms", "load_ms", "first_ms"):
        return milliseconds
    return kibibytes if metric.endswith("_bytes") else count


def _verdict(budget: Budget, value: Any) -> str:
    asked = f"<code>{_text(str(budget))}</code>"
    if finite(value) is None:
        return f'<span class="unknown">? not measured</span> {asked}'
    shown = _unit(budget.metric)(value)
    if budget.holds(value):
        return f'<span class="good">✓ holds</span> {asked} at {shown}'
    return f'<span class="bad">✗ does not hold</span> {asked} at {shown}'


def _children(content: ReportContent) -> str:
    """Set the chosen, the smallest and the largest child side by side."""
    named = "top-1" if content.measure == TOP1 else content.measure.name
    rows = [
        {
            "child": str(row.get("name", "")),
            named: f"{_score(row, content.measure)} {_interval(row, content.measure)}".strip(),
            "latency": f"{milliseconds(row.get('latency_ms'))} {_at_most(row)}".strip(),
            "predicted latency": milliseconds(row.get("predicted_latency_ms")),
            "macs": count(row.get("macs")),
            "parameters": count(row.get("params")),
            "key": row.get("key") or DASH,
        }
        for row in content.summary
    ]
    known = [name for name in rows[0] if any(row[name] != DASH for row in rows)] if rows else []
    return _section("Children", _table([{name: row[name] for name in known} for row in rows])) if rows else ""


def _arch(content: ReportContent) -> str:
    return _section("The chosen child, stage by stage", _table(content.arch_table)) if content.arch_table else ""


def _more(table: tuple[str, str, Records]) -> str:
    title, caption, rows = table
    return _section(title, f'{_table(rows)}<p class="small">{_text(caption)}</p>') if rows else ""


def _facts(content: ReportContent) -> str:
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in content.facts)
    return _section("Facts", f"<dl>{items}</dl>") if items else ""


def _figure(figure: Figure) -> str:
    """Write the frame that the script draws into, and the drawing as JSON, in which no character can end the element."""
    data = json.dumps(figure.plot, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return _section(
        figure.title,
        f'<figure><div class="plot" id="{figure.name}" role="img" aria-label="{_text(figure.title)}"></div>'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
        f'<script type="application/json" id="{figure.name}-data">{data}</script>',
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _table(rows: Records) -> str:
    """Write a table whose rows become cards on a narrow screen; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    lines = []
    for row in rows:
        values = [DASH if row.get(name) is None else row[name] for name in columns]
        cells = "".join(
            f'<td data-name="{_text(name)}">{_text(value)}</td>' for name, value in zip(columns, values, strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _row(content: ReportContent, name: str) -> Mapping[str, Any]:
    return next((row for row in content.summary if row.get("name") == name), {})


def _score(row: Mapping[str, Any], measure: Measure) -> str:
    value = row.get(measure.key)
    return percent(value) if measure.unit == "%" else DASH if finite(value) is None else f"{value:.2f}{SPACE}{measure.unit}"


def _interval(row: Mapping[str, Any], measure: Measure) -> str:
    low, high = finite(row.get(f"{measure.key}_low")), finite(row.get(f"{measure.key}_high"))
    if low is None or high is None:
        return ""
    return f"({100 * low:.1f} to {percent(high)})" if measure.unit == "%" else f"({low:.2f} to {high:.2f}{SPACE}{measure.unit})"


def _at_most(row: Mapping[str, Any]) -> str:
    high = row.get("latency_ms_high")
    return f"(at most {milliseconds(high)})" if finite(high) is not None else ""


def percent(fraction: Any) -> str:
    """0.9312 as "93.1 %"; a dash where there is no number (so do all below). The space does not break."""
    return DASH if finite(fraction) is None else f"{100 * fraction:.1f}{SPACE}%"


def milliseconds(value: Any) -> str:
    """Three digits: "7.90 ms", "12.3 ms"."""
    return DASH if finite(value) is None else f"{_digits(value)}{SPACE}ms"


def kibibytes(value: Any) -> str:
    """Three digits: "512 KiB"."""
    return DASH if finite(value) is None else f"{_digits(value / 1024)}{SPACE}KiB"


def count(value: Any) -> str:
    """Three digits and a suffix: "41.2 M"; small counts as they are."""
    if finite(value) is None:
        return DASH
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor:
            return f"{_digits(value / factor)}{SPACE}{suffix}"
    return f"{value:g}"


def _digits(value: float) -> str:
    """At least three digits, trailing zeros too, never an exponent where one is not needed."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _text(value: object) -> str:
    """Text for HTML, in an element or an attribute; bytes of a path that are no UTF-8 become question marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


STYLE = """
:root { --page: #f6f7f9; --card: #ffffff; --text: #1d2530; --muted: #5b6675; --grid: #e3e7ec; --line: #9aa5b3;
  --good: #1a7f5a; --bad: #c22f3d; --accent: #2667a8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1b212a; --text: #e4e9f0; --muted: #a0acbb; --grid: #2d3541; --line: #5d6979;
    --good: #55c79a; --bad: #ff8089; --accent: #7db6ee; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 0 0 12px; }
.lead { color: var(--muted); margin: 6px 0 0; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.92em; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 20px; margin-top: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 18px;
  display: flex; flex-direction: column; }
.tile b { font-size: 1.7rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile .name, .small { color: var(--muted); font-size: 0.88rem; }
.budgets { list-style: none; display: flex; flex-wrap: wrap; gap: 8px 24px; margin: 16px 0 0; padding: 0; }
.good, .bad, .unknown { font-weight: 650; }
.good { color: var(--good); } .bad { color: var(--bad); } .unknown { color: var(--muted); }
.notes { border-left: 4px solid var(--accent); }
.notes ul { margin: 0; padding-left: 20px; }
table { width: 100%; border-collapse: collapse; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 600; font-size: 0.86rem; }
th, td { padding: 8px 12px 8px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
figure { margin: 0; }
.plot { width: 100%; height: 440px; }
figcaption { color: var(--muted); font-size: 0.9rem; margin-top: 8px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 10px 28px; margin: 0; }
dt { color: var(--muted); font-size: 0.86rem; }
dd { margin: 0; }
@media (max-width: 640px) {
  main { padding: 20px 12px 40px; }
  section { padding: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: 10px 12px; }
  .tile b { font-size: 1.35rem; }
  .plot { height: 380px; }
  thead { display: none; }
  tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--grid); }
  tbody tr:last-child { border-bottom: 0; }
  td { display: grid; grid-template-columns: 42% 1fr; gap: 8px; padding: 3px 0; border: 0; }
  td:first-child { font-weight: 650; }
  td::before { font-weight: 400; content: attr(data-name); color: var(--muted); }
}
@media print { section { break-inside: avoid; } body { background: none; } }
"""

SCRIPT = """
"use strict";
function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const changes = {"font.color": of("--text"), "hoverlabel.bgcolor": of("--card"), "hoverlabel.bordercolor": of("--line"),
    "hoverlabel.font.color": of("--text"), "modebar.color": of("--muted"), "modebar.activecolor": of("--text"),
    "modebar.bgcolor": "rgba(0,0,0,0)"};
  for (const axis of ["xaxis", "yaxis"]) {
    changes[axis + ".gridcolor"] = of("--grid");
    changes[axis + ".linecolor"] = changes[axis + ".tickcolor"] = of("--line");
  }
  return changes;
}
const config = {responsive: true, displaylogo: false, displayModeBar: "hover", showSendToCloud: false, plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};
const plots = document.querySelectorAll(".plot");
for (const element of plots) {
  const plot = JSON.parse(document.getElementById(element.id + "-data").textContent);
  Plotly.newPlot(element, plot.data, plot.layout, config).then(() => Plotly.relayout(element, colours()));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const element of plots) Plotly.relayout(element, colours());
});
"""
