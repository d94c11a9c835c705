"""What the terminal shows of the front: of any width and height, with and without a terminal, and after a kill."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from search.live import LINE_S, ROWS, STAGE_S, LiveFront, plot
from supernet.console import Display

ROOT = Path(__file__).parents[2]
ROWS_GIVEN: list[dict[str, Any]] = [
    {"score": 0.5 + place / 40, "macs": 10.0 ** (5 + place / 5), "latency_ms": 0.1 * (place + 1), "stage": f"mutants of [{place}]"}
    for place in range(15)
]  # fmt: skip
OTHERS = [{"score": 0.45, "macs": 9e6, "front": False}]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def display(*, terminal: bool, width: int = 80, height: int = 25, quiet: bool = False, encoding: str = "utf-8") -> Display:
    made = Display(quiet=quiet)
    made.console = Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), force_terminal=terminal, width=width, height=height, quiet=quiet,
        highlight=False, color_system=None, _environ={"TERM": "xterm"},
    )  # fmt: skip
    return made


def written(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.TextIOWrapper)
    file.flush()
    raw = file.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(file.encoding)


def drawn(rows: list[dict[str, Any]], **terminal: Any) -> list[str]:
    """The lines of one drawing."""
    shown = display(terminal=True, **terminal)
    live = LiveFront(shown, show="{:.1%}".format, metric="top1", clock=Clock())
    live.update(rows, 12, 64, "coarse")
    shown.console.print(live)
    return written(shown.console).splitlines()


def test_a_drawing_has_the_progress_a_table_of_few_rows_and_a_plot() -> None:
    lines = drawn([*ROWS_GIVEN, *OTHERS], width=80, height=40)
    assert lines[0].split("  ")[0] == "12 of 64 children: coarse"
    assert lines[1].split() == ["top1", "macs", "latency_ms", "stage"]
    table = lines[2 : 2 + ROWS]
    assert table[0].split() == ["85.0%", "6.31e+7", "1.5", "mutants", "of", "[14]"]
    assert table[-1].split() == ["50.0%", "100,000", "0.1", "mutants", "of", "[0]"]
    assert len({line.split()[0] for line in table}) == ROWS
    plotted = "\n".join(lines[2 + ROWS :])
    assert plotted.count("●") == len(ROWS_GIVEN)
    assert plotted.count("·") == 1


@pytest.mark.parametrize("width", [1, 2, 5, 12, 20, 31, 40, 50, 80, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 7, 9, 14, 25, 60])
def test_a_drawing_fits_into_a_terminal_of_any_size(width: int, height: int) -> None:
    lines = drawn([*ROWS_GIVEN, *OTHERS], width=width, height=height)
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= max(1, height - 1) or width < 12


def test_forty_columns_hold_table_and_plot() -> None:
    lines = drawn(ROWS_GIVEN, width=40, height=25)
    assert lines[1].split() == ["top1", "macs", "latency_ms"]
    assert sum(line.count("●") for line in lines) == len(ROWS_GIVEN)
    assert all(not line.rstrip().endswith("…") for line in lines)


@pytest.mark.parametrize("rows", [[], ROWS_GIVEN[:1], [ROWS_GIVEN[0]] * 3, [{"score": 0.0, "macs": 0.0}, {"score": -3.0, "macs": 0.0}],
                                  [{"score": float("nan"), "macs": 1.0}, {"score": 1.0, "macs": float("inf")}]])  # fmt: skip
def test_few_equal_or_odd_children_are_drawn_too(rows: list[dict[str, Any]]) -> None:
    assert drawn(rows)[0].startswith("12 of 64 children: coarse")


def test_names_of_stages_are_text_and_no_markup() -> None:
    assert "[red]x[/nothing]" in "\n".join(drawn([{**ROWS_GIVEN[0], "stage": "[red]x[/nothing]"}, ROWS_GIVEN[1]], width=80))


def test_a_terminal_without_unicode_gets_ascii() -> None:
    lines = drawn([*ROWS_GIVEN, *OTHERS], encoding="ascii")
    assert sum(line.count("*") for line in lines) == len(ROWS_GIVEN)


@pytest.mark.parametrize("columns", range(12, 40, 3))
def test_a_plot_keeps_order_and_size(columns: int) -> None:
    lines = plot(ROWS_GIVEN[::7], columns, 5, "{:.2f}".format)
    assert all(len(line) <= columns for line in lines)
    at = [(line, where) for line, text in enumerate(lines) for where, mark in enumerate(text) if mark == "●"]
    assert len(at) == 3
    up, right = sorted(at, key=lambda each: -each[0]), sorted(at, key=lambda each: each[1])
    assert up == right  # dearer ones are better, and higher up


def test_a_pipe_gets_lines_when_the_stage_changes_and_now_and_then() -> None:
    shown, clock = display(terminal=False, width=120), Clock()
    with LiveFront(shown, show="{:.1%}".format, clock=clock) as live:
        live.update([], 0, 64, "coarse")
        live.update(ROWS_GIVEN, 3, 64, "coarse")
        clock.now += LINE_S
        live.update(ROWS_GIVEN, 4, 64, "coarse")
        live.update(ROWS_GIVEN, 5, None, "fine")
        clock.now += STAGE_S
        live.update(ROWS_GIVEN, 6, None, "fine")
        live.update(ROWS_GIVEN, 7, None, "fine")
        live.say("a worker [ended]")
    found = "; best 85.0% at 6.31e+7 macs, 15 on the front"
    assert written(shown.console).splitlines() == [
        "0 of 64 children: coarse", f"4 of 64 children: coarse{found}", f"6 children: fine{found}", "a worker [ended]",
        f"7 children: fine{found}",
    ]  # fmt: skip


def test_quiet_is_quiet() -> None:
    for terminal in (True, False):
        shown = display(terminal=terminal, quiet=True)
        with LiveFront(shown) as live:
            live.update(ROWS_GIVEN, 3, 64, "coarse")
        assert written(shown.console) == ""


def test_many_updates_are_drawn_a_few_times_a_second_and_remarks_stand_above() -> None:
    shown = display(terminal=True)
    with LiveFront(shown) as live:
        for done in range(5_000):
            live.update(ROWS_GIVEN, done, 5_000, "coarse")
        live.say("a worker ended")
    text = written(shown.console)
    assert text.count("children: coarse") < 500
    assert text.rindex("a worker ended") < text.rindex("children: coarse")
    assert "4999 of 5000" in text


# --- a real terminal ---

PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
sys.path.insert(0, {root!r})
from search.live import LiveFront
from supernet.console import Display
rows = [{{"score": i / 9, "macs": 10.0 ** i, "stage": "coarse"}} for i in range(9)]
with LiveFront(Display()) as live:
    live.update(rows, 1, 9, "coarse")
    print("begun", flush=True)
    time.sleep(60)
"""


def in_terminal(columns: int, ending: signal.Signals) -> tuple[str, int]:
    """What a terminal is sent by a search that a signal ends."""
    import fcntl
    import struct
    import termios

    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT))], stderr=other, stdout=subprocess.PIPE, text=True,
        env={**environment, "TERM": "xterm"},
    )  # fmt: skip
    os.close(other)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        sent = _read(main, until=b"coarse")
        process.send_signal(ending)
        process.wait(30)
        sent += _read(main, until=None)
    finally:
        process.kill()
        process.communicate()
        os.close(main)
    return sent.decode(), process.returncode


def _read(terminal: int, until: bytes | None) -> bytes:
    sent, end = b"", time.monotonic() + 30
    while time.monotonic() < end and (until is None or until not in sent):
        if not select.select([terminal], [], [], 1 if until is None else 30)[0]:
            break
        try:
            sent += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    return sent


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name)
def test_the_cursor_is_there_however_a_search_ends(ending: signal.Signals) -> None:
    sent, code = in_terminal(40, ending)
    assert code != 0
    assert "1 of 9 children: coarse" in sent
    assert sent.rfind("\x1b[?25h") >= sent.rfind("\x1b[?25l")
    plain: Mapping[int, str] = dict(enumerate(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent).replace("\r", "\n").split("\n")))
    traceback = [line for line, text in plain.items() if "Traceback" in text]
    assert all(len(text) <= 40 for line, text in plain.items() if not traceback or line < traceback[0])
