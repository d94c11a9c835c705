"""The report in a real browser: every figure is drawn, nothing is fetched, nothing hostile runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.report import ReportContent, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install nestling[dev])")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is on the PATH"),
]

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"><svg onload=alert(1)><a href='javascript:alert(1)'>"


def content(name: str = "", **changes: Any) -> ReportContent:
    """Made-up results; `name` is put in front of every text."""
    children = [
        {
            "key": f"{name}{i}",
            "score": 0.9 + i / 1000,
            "stage": f"{name}coarse" if i % 2 else f"{name}fine",
            "costs": {"macs": 1e6 * i, "params": 1e5, "predicted_latency_ms": 1 + i / 10},
            "measured_latency_ms": 1 + i / 9 if i % 7 == 0 else None,
        }
        for i in range(60)
    ]
    parts = {"loss": 1.0, "top1": 0.5}
    whole: dict[str, Any] = {
        "title": f"{name}Report",
        "summary": [{"name": "chosen", "key": f"{name}35", "top1": 0.93, "latency_ms": 4.9, "latency_ms_high": 5.0}],
        "budgets": ["latency_ms<=8"],
        "training": [{"epoch": i / 4, "children": dict.fromkeys(("largest", "smallest", "random"), parts)} for i in range(20)],
        "children": children,
        "front": [f"{name}{i}" for i in range(0, 60, 5)],
        "chosen": f"{name}35",
        "arch_table": [{f"{name}column": f"{name}value"}],
        "latency_fit": [(f"{name}{i}", 1.0 + i, 1.1 + i, i % 2 == 0) for i in range(10)],
        "latency_fit_error": f"{name}error",
        "facts": [(f"{name}fact", f"{name}value")],
        "notes": [f"{name}note"],
    }
    return ReportContent(**{**whole, **changes})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield running
        running.close()


class Visit:
    """A page opened from a file, with everything it asked for, said and popped up."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.requests: list[str] = []
        self.said: list[str] = []
        self.dialogs: list[str] = []
        self.url = path.as_uri()
        self.page = browser.new_page(**settings)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", self._dismiss)
        self.page.goto(self.url)
        for plot in self.page.locator(".plot").all():
            plot.locator("svg.main-svg .legend").first.wait_for()

    def _dismiss(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def check_quiet(self) -> None:
        assert [url for url in self.requests if url != self.url and not url.startswith("data:")] == []
        assert self.said == []
        assert self.dialogs == []


def test_every_figure_is_drawn_and_nothing_is_fetched(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, content())
    visit = Visit(browser, path)
    for name in ("accuracy", "latency-fit", "training-loss", "training-top1"):
        assert visit.count(f"#{name} svg.main-svg") > 0
    # cloud 48, front 12 (the chosen child is one of them), measured 8, the star 1
    assert visit.count("#accuracy .scatterlayer .point") == 48 + 12 + 8 + 1
    assert visit.count("#accuracy .shapelayer path") == 1
    assert visit.count("#latency-fit .scatterlayer .point") == 10
    for name in ("training-loss", "training-top1"):
        assert visit.count(f"#{name} .scatterlayer .js-line") == 3
    check_colours(visit)
    visit.check_quiet()


def check_colours(visit: Visit) -> None:
    """Text of the page and of the pictures follows the scheme, also when it changes while the page is open."""
    for scheme, colour in (("dark", "rgb(228, 233, 240)"), ("light", "rgb(29, 37, 48)")):
        visit.page.emulate_media(color_scheme=scheme)
        for selector, what in (("body", "color"), ("#accuracy .xtick text", "fill")):
            playwright.expect(visit.page.locator(selector).first).to_have_css(what, colour)


def test_hostile_names_are_shown_and_not_run(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, content(HOSTILE))
    visit = Visit(browser, path)
    assert visit.page.title() == f"{HOSTILE}Report"
    assert visit.page.locator("h1").inner_text() == f"{HOSTILE}Report"
    assert visit.count("main img, main a, main script:not([type='application/json'])") == 0
    legend = visit.page.locator("#accuracy .legendtext").first.text_content()
    assert legend == f"{HOSTILE}coarse"
    point = visit.page.locator("#accuracy .scatterlayer .point").last  # the star, on top of all others
    point.hover(force=True)
    visit.page.wait_for_selector("#accuracy .hoverlayer .hovertext")
    assert "<script>alert(1)</script>" in visit.page.locator("#accuracy .hovertext").first.text_content()
    assert visit.count("#accuracy .hoverlayer a, #accuracy .hoverlayer image") == 0
    visit.check_quiet()


def test_the_policy_stops_what_would_still_get_in(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, content())
    injected = '<img src="http://127.0.0.1:9/x.png" onerror="alert(1)"><script>alert(2)</script></main>'
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", injected, 1), encoding="utf-8")
    visit = Visit(browser, path)
    visit.page.wait_for_timeout(200)
    assert visit.dialogs == []
    assert len([text for text in visit.said if "Content Security Policy" in text]) >= 3


def test_the_page_fits_a_phone(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    table = [{f"column {i}": "a long value 1234567890" for i in range(12)}]
    write_report(path, content(arch_table=table, notes=["0123456789" * 30]))
    visit = Visit(browser, path, viewport={"width": 360, "height": 700})
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    assert visit.page.evaluate("document.querySelector('#accuracy svg.main-svg').getBoundingClientRect().width") <= 360
    visit.check_quiet()
