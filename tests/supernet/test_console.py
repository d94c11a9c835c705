"""Tables for people: whole where they fit, else row by row, so that a key can be copied."""

from __future__ import annotations

import pytest
from rich.console import Console

from supernet import console

ROWS = [
    {"key": "0123456789ab", "confirm": "97.14%", "expected": "97.14% (94.23% to 98.90%)", "macs": 448984, "arch": (3, 3, 5)},
    {"key": "ba9876543210", "confirm": "98.14%", "expected": "98.14% (95.23% to 99.90%)", "macs": 1448984, "arch": (3, 3, 3)},
]


@pytest.mark.parametrize("width", [30, 60, 200])
def test_no_key_and_no_number_is_broken(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        console, "Console", lambda **settings: Console(**settings, width=width, force_terminal=True, color_system=None)
    )
    console.print_table(ROWS, "[bold]children")
    out = capsys.readouterr().out
    assert "[bold]children" in out  # a title is no markup
    for text in ("0123456789ab", "ba9876543210", "448,984", "1,448,984", "3, 3, 5"):
        assert any(text in line for line in out.splitlines()), out
    assert ("┃" in out) == (width == 200)
    assert all(len(line) <= max(width, 46) for line in out.splitlines())


def test_a_pipe_gets_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(ROWS)
    assert len(capsys.readouterr().out.splitlines()) == 6
    console.print_table([])
    assert capsys.readouterr().out.strip() == ""
