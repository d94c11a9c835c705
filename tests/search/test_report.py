"""The report's text: what it says, what it leaves out, and that nothing in it is markup but ours."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.budget import Budget
from search.report import ReportContent, write_report
from search.report.figures import MOST_CLOUD_POINTS, accuracy, latency_fit, training
from search.report.page import DASH, count, kibibytes, milliseconds, percent, render
from supernet.errors import InputError

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1) //",
    "</title></style><b>",
    "\udcff\x00é",
]


def child(number: int, *, latency: bool = True, **changes: Any) -> dict[str, Any]:
    costs = {"macs": 1e6 * (number + 1), "params": 2e5, "peak_memory_bytes": 300_000.0}
    if latency:
        costs["predicted_latency_ms"] = 1.0 + number / 10
    made = {"key": f"key{number}", "score": 0.9 + 0.0001 * (number % 50), "stage": "coarse", "costs": costs}
    return {**made, "measured_latency_ms": None, **changes}


def record(step: int, top1: float | None = 0.5) -> dict[str, Any]:
    parts = {name: {"loss": 2.0 / (step + 1), "top1": top1} for name in ("largest", "smallest", "random")}
    return {"step": step, "epoch": step / 10, "learning_rate": 0.1, "children": parts}


def content(**changes: Any) -> ReportContent:
    chosen = {
        "name": "chosen",
        "key": "key3",
        "top1": 0.9312,
        "top1_low": 0.92,
        "top1_high": 0.9411,
        "macs": 4e6,
        "params": 2e5,
    }
    whole: dict[str, Any] = {
        "title": "Digits on a phone",
        "summary": [
            {**chosen, "latency_ms": 7.9, "latency_ms_high": 8.125, "predicted_latency_ms": 7.75},
            {"name": "smallest", "key": "key0", "top1": None, "macs": 1_234_567, "params": 999_950},
        ],
        "budgets": ["latency_ms<=8", "macs<=5M", "peak_memory_bytes<=1MiB"],
        "training": [record(step) for step in range(30)],
        "children": [child(i, measured_latency_ms=1.3 if i == 3 else None) for i in range(40)],
        "front": ["key0", "key3", "key10"],
        "chosen": "key3",
        "arch_table": [{"stage": "stem", "width": 16}, {"stage": "stage 1", "kernel": "3, 5"}],
        "latency_fit": [("key0", 1.0, 1.1, False), ("key1", 1.1, 1.2, True)],
        "latency_fit_error": "Off by 1.8 % on average.",
        "facts": [("device", "Intel Xeon & co")],
        "notes": ["No significant difference to the second."],
    }
    return ReportContent(**{**whole, **changes})


class Page(html.parser.HTMLParser):
    """What a browser makes of the page: elements with their attributes, scripts, and the text that is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.words += data.replace("\u00a0", " ")

    def plot(self, name: str) -> dict[str, Any]:
        scripts = [attributes for tag, attributes in self.elements if tag == "script"]
        return json.loads(self.scripts[[attributes.get("id") for attributes in scripts].index(f"{name}-data")])


def traces(plot: Any) -> dict[str, Any]:
    return {trace.get("name", "line"): trace for trace in plot["data"]}


@pytest.mark.slow
def test_the_page_says_what_was_given_with_units() -> None:
    page = Page(render(content()))
    for text in (
        "Digits on a phone",
        "93.1 %",
        "(92.0 to 94.1 %)",
        "7.90 ms",
        "(at most 8.12 ms)",
        "7.75 ms",
        "4.00 M",
        "1.23 M",
        "1,000 K",
        "Off by 1.8 % on average.",
        "Intel Xeon & co",
        "No significant difference to the second.",
        "3, 5",
        "key3",
    ):
        assert text in page.words, text


def test_a_budget_on_latency_is_judged_on_the_upper_end_and_without_a_measurement_not_at_all() -> None:
    page = Page(render(content()))
    assert "✗ does not hold latency_ms<=8 at 8.12 ms" in page.words
    assert "✓ holds macs<=5M at 4.00 M" in page.words
    assert "✓ holds peak_memory_bytes<=1MiB at 293 KiB" in page.words
    unmeasured = content(summary=[{"name": "chosen", "key": "key3", "latency_ms": 1.0, "predicted_latency_ms": 1.0}])
    assert "? not measured latency_ms<=8" in Page(render(unmeasured)).words
    with pytest.raises(InputError, match="metric<=number"):
        render(content(budgets=["fast"]))


def test_missing_numbers_are_a_dash() -> None:
    rows = [{"name": "chosen", "top1": None, "macs": None}, {"name": "largest", "top1": 0.5, "macs": float("nan")}]
    page = Page(render(ReportContent(title="t", summary=rows, arch_table=[{"a": None, "b": 0}])))
    assert page.words.count(DASH) == 2  # one top-1 and one cell; columns without any number are left out
    assert "macs" not in page.words


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"accuracy", "latency-fit", "training-loss", "training-top1"}),
        ({"training": []}, {"accuracy", "latency-fit"}),
        ({"training": [record(i, None) for i in range(3)]}, {"accuracy", "latency-fit", "training-loss"}),
        ({"latency_fit": None}, {"accuracy", "training-loss", "training-top1"}),
        ({"children": [child(3)]}, {"latency-fit", "training-loss", "training-top1"}),
        ({"children": []}, {"latency-fit", "training-loss", "training-top1"}),
        (
            {"children": [{"key": "a", "score": None, "stage": None, "costs": None}] * 3, "latency_fit": [], "training": []},
            set(),
        ),
    ],
)
def test_a_figure_without_data_is_left_out(changes: dict[str, Any], names: set[str]) -> None:
    page = Page(render(content(**changes)))
    assert {attributes["id"] for tag, attributes in page.elements if attributes.get("class") == "plot"} == names
    assert ("Plotly.newPlot" in "".join(page.scripts)) == bool(names)


def test_an_empty_content_is_a_page_with_a_title() -> None:
    assert Page(render(ReportContent(title="Nothing yet"))).words.split() == ["Nothing", "yet"] * 2


def hostile_content(name: str) -> ReportContent:
    """The same text wherever a text can be given."""
    children = [child(i, key=f"{name}{i}", stage=name, measured_latency_ms=2.0) for i in range(5)]
    return content(
        title=name,
        summary=[{"name": "chosen", "key": name, "top1": 0.5}, {"name": name, "key": name, "top1": 0.5}],
        children=children,
        front=[f"{name}0"],
        chosen=f"{name}1",
        arch_table=[{name: name}],
        latency_fit=[(name, 1.0, 2.0, True)],
        latency_fit_error=name,
        facts=[(name, name)],
        notes=[name],
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_text_that_is_given_is_never_markup(name: str) -> None:
    page, plain = Page(render(hostile_content(name))), Page(render(hostile_content("plain")))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(attributes) for _, attributes in page.elements] == [sorted(attributes) for _, attributes in plain.elements]
    shown = name.replace("\udcff", "?")
    assert page.words.count(shown) == plain.words.count("plain")
    for trace in page.plot("accuracy")["data"]:  # plotly reads a small HTML of its own
        assert not re.search("[<>]", "".join([trace.get("name", ""), *trace.get("text", [])]))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(name=st.text())
def test_any_text_can_be_written(name: str) -> None:
    page = Page(render(hostile_content(name)))
    assert [tag for tag, _ in page.elements].count("script") == 6
    page.plot("accuracy")


def test_the_page_refers_to_nothing_outside_itself() -> None:
    text = render(content())
    page = Page(text)
    library = max(page.scripts, key=len)
    assert "plotly.js" in library[:100]
    assert not re.search(r"(?i)https?://|//[a-z]|url\(|@import|\bsrc=", text.replace(library, ""))
    links = [attributes.get("href") for tag, attributes in page.elements if attributes.get("href")]
    assert links == ["data:,"]


def test_the_policy_forbids_everything_but_our_own_scripts() -> None:
    page = Page(render(content()))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-\S+' 'sha256-\S+'", rules["script-src"])
    assert not re.search(r"http|\*|'self'|unsafe-eval", policy)


def test_fifty_thousand_children_are_thinned_but_never_the_front() -> None:
    children = [child(i, stage="coarse" if i < 30_000 else "fine") for i in range(50_000)]
    front = [f"key{i}" for i in range(0, 50_000, 97)]
    figure = accuracy(children, front, "key5", [], None)
    assert figure is not None
    drawn = traces(figure.plot)
    assert len(drawn["coarse"]["x"]) + len(drawn["fine"]["x"]) == MOST_CLOUD_POINTS
    assert 0.55 < len(drawn["coarse"]["x"]) / MOST_CLOUD_POINTS < 0.65
    assert set(drawn["Pareto front"]["text"]) == set(front)
    assert drawn["chosen"]["text"] == ["key5"]
    assert "50,000 children evaluated" in figure.caption
    assert "5,000 are drawn" in figure.caption
    few = accuracy(children[:100], front, "key5", [], None)
    assert few is not None
    assert "are drawn" not in few.caption
    assert sum(len(traces(few.plot)[name]["x"]) for name in ("coarse", "Pareto front", "chosen")) == 100


def test_every_measured_child_is_drawn_where_it_was_measured() -> None:
    children = [child(i, measured_latency_ms=100.0 + i if i % 10_000 == 7 else None) for i in range(20_000)]
    figure = accuracy(children, [], "key7", [Budget("latency_ms", 3.0), Budget("macs", 1.0)], 108.5)
    assert figure is not None
    drawn = traces(figure.plot)
    assert drawn["measured"]["x"] == [10_107.0]
    assert drawn["chosen"]["x"] == [107.0]
    assert drawn["chosen"]["error_x"]["array"] == [1.5]
    assert [shape["x0"] for shape in figure.plot["layout"]["shapes"]] == [3.0]


def test_without_latency_accuracy_is_drawn_against_macs() -> None:
    figure = accuracy([child(i, latency=False) for i in range(9)], ["key8"], "key8", [Budget("macs", 5e6)], None)
    assert figure is not None
    assert figure.title == "Accuracy against macs"
    assert figure.plot["layout"]["xaxis"]["title"]["text"] == "macs (multiply-accumulates)"
    assert [shape["x0"] for shape in figure.plot["layout"]["shapes"]] == [5e6]
    assert traces(figure.plot)["chosen"]["x"] == [9e6]


def test_a_score_that_is_no_fraction_is_not_printed_as_percent() -> None:
    figure = accuracy([child(i, score=-float(i)) for i in range(9)], [], None, [], None)
    assert figure is not None
    assert "tickformat" not in figure.plot["layout"]["yaxis"]
    assert figure.plot["layout"]["yaxis"]["title"]["text"] == "score on the search split"
    assert "%{y:.2%}" not in str(figure.plot)


def test_the_line_of_the_front_never_falls() -> None:
    scores = [0.5, 0.7, 0.6, 0.8]
    figure = accuracy([child(i, score=s) for i, s in enumerate(scores)], [f"key{i}" for i in range(4)], None, [], None)
    assert figure is not None
    line, dots = figure.plot["data"]
    assert line["y"] == [0.5, 0.7, 0.8]
    assert dots["y"] == scores


def test_children_without_a_score_or_a_cost_are_counted_in_the_caption() -> None:
    children = [child(0), child(1), child(2, score=None), child(3, score=float("nan")), child(4, costs={})]
    figure = accuracy(children, [], None, [], None)
    assert figure is not None
    assert "5 children evaluated" in figure.caption
    assert "3 without this cost or a score are left out" in figure.caption


def test_numbers_of_numpy_are_numbers() -> None:
    children = [{"key": "a", "score": np.float32(0.5), "stage": "s", "costs": {"macs": np.int64(5 + i)}} for i in range(2)]
    figure = accuracy(children, [], None, [], None)
    assert figure is not None
    assert json.loads(json.dumps(figure.plot))["data"][0]["x"] == [5.0, 6.0]
    assert percent(np.float32(0.5)) == "50.0\u00a0%"


def test_a_long_training_log_is_averaged() -> None:
    loss, top1 = training([record(step) for step in range(1200)])
    largest = traces(loss.plot)["largest"]
    assert len(largest["x"]) == 400
    assert largest["y"][0] == pytest.approx((2 + 1 + 2 / 3) / 3)
    assert largest["x"][0] == pytest.approx(0.1)
    assert "mean of 3 logged steps" in loss.caption
    assert traces(top1.plot)["random"]["y"] == [0.5] * 400
    short = training([record(step) for step in range(3)])[0]
    assert traces(short.plot)["smallest"]["y"] == [2.0, 1.0, 2 / 3]
    assert "mean of" not in short.caption


def test_a_step_without_a_child_is_a_gap_in_its_curve() -> None:
    records = [record(0), {"step": 1, "epoch": 0.1, "children": {"largest": {"loss": float("nan"), "top1": None}}}, record(2)]
    loss, _ = training(records)
    assert traces(loss.plot)["largest"]["y"] == [2.0, None, 2 / 3]
    only_largest = [{"epoch": 0.0, "children": {"largest": {"loss": 1.0, "top1": None}}}]
    assert [list(traces(figure.plot)) for figure in training(only_largest)] == [["largest"]]


def test_the_latency_fit_tells_held_out_children_from_the_others() -> None:
    figure = latency_fit([("a", 1.0, 1.5, False), ("b", 2.0, 1.75, True), ("c", float("nan"), 1.0, True)], "Off by 2 %.")
    assert figure is not None
    drawn = traces(figure.plot)
    assert (drawn["used for the fit"]["x"], drawn["used for the fit"]["y"]) == ([1.0], [1.5])
    assert (drawn["held out"]["x"], drawn["held out"]["y"]) == ([2.0], [1.75])
    assert drawn["exact"]["x"] == drawn["exact"]["y"] == [1.0, 2.0]
    assert figure.caption.startswith("Off by 2 %. ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(1.0), "100.0 %"),
        (percent(None), DASH),
        (milliseconds(0.0512), "0.0512 ms"),
        (milliseconds(12.345), "12.3 ms"),
        (milliseconds(99.96), "100 ms"),
        (milliseconds(1234.5), "1,234 ms"),
        (milliseconds(float("inf")), DASH),
        (count(999), "999"),
        (count(41_234_567), "41.2 M"),
        (count(1.8e9), "1.80 G"),
        (count(None), DASH),
        (kibibytes(2048), "2.00 KiB"),
    ],
)
def test_numbers_are_printed_with_three_digits_and_a_unit(text: str, expected: str) -> None:
    assert text.replace("\u00a0", " ") == expected


def test_the_report_is_written_whole_over_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, content())
    assert path.read_text(encoding="utf-8") == render(content())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_report_does_not_need_torch() -> None:
    code = "import sys, search.report as r; r.page.render(r.ReportContent(title='t')); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
