"""What a search says of its own latency models, and what the dashboard takes from its outcome."""

from __future__ import annotations

from typing import Any

import pytest

import nestling
from search.budget import parse_all
from search.dashboard import _of_latest
from search.loop import Asked
from search.loop import search as search_loop
from search.settings import SearchConfig
from supernet.run import Run
from tests.conftest import macs_of

SETTINGS = SearchConfig(
    strategy="random", evaluations=6, random=2, polish=0, batch=3, finalists=2, profile_children=10, zones=0
)


@pytest.mark.parametrize(("factor", "said"), [(0.5, "faster"), (2.0, "slower"), (1.0, None)])
def test_a_device_whose_speed_changed_after_its_profile_is_told(
    run_copy: Run, fake_target: Any, judge: Any, factor: float, said: str | None
) -> None:
    speed = [1.0]
    target = fake_target(lambda model: speed[0] * (0.01 + macs_of(model) / 1e8))
    asked = Asked(("latency_ms<=0.1",), settings=SETTINGS, targets={None: target})
    search_loop(run_copy, asked)
    speed[0] = factor
    (run_copy.path / "search" / "search.sqlite").unlink()
    notes = [note for note in search_loop(run_copy, asked).notes if "than when it was profiled" in note]
    assert len(notes) == (said is not None)
    if said:
        assert f"is {factor:.2f} times what the latency model predicts" in notes[0] and f"the device is {said}" in notes[0]


def test_the_dashboard_knows_the_budgets_of_the_latest_search(run_copy: Run, fake_target: Any, judge: Any) -> None:
    assert _of_latest(run_copy) == ()
    search_loop(run_copy, Asked(("macs<=1M", "params>=1K"), settings=SETTINGS, targets={None: fake_target()}))
    assert _of_latest(run_copy) == parse_all(["macs<=1M", "params>=1K"])


def test_show_has_the_objective_of_the_latest_search(
    run_copy: Run, fake_target: Any, judge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS.model_copy(update={"objective": "macro_f1"})
    search_loop(run_copy, Asked((), settings=settings, targets={None: fake_target()}))
    with pytest.raises(SystemExit):
        nestling.app(["search", "show", str(run_copy.path), "--sort", "macro_f1", "--json"])
    assert '"macro_f1"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nestling.app(["search", "show", str(run_copy.path)])
    said = capsys.readouterr().out
    assert "score is top-1 accuracy, the latest search was for macro F1" in " ".join(said.split())
