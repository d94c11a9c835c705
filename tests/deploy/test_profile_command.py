"""`nestling profile`: what it writes, where it goes on, and what it refuses before anything is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nestling
from deploy.latency import LatencyModel
from search.loop import Asked
from search.loop import search as search_loop
from search.settings import SearchConfig
from supernet.errors import InputError
from supernet.run import Run
from supernet.space import load_space

SPACE = load_space("digits")
FEW = ("--children", "6", "--held-out", "6", "--no-blocks")

Command = Callable[..., None]


@pytest.fixture
def device(fake_target: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The target that every text names, but a kit."""
    from deploy import places

    target, real = fake_target(), places.parse_target
    monkeypatch.setattr(
        "deploy.places.parse_target", lambda text, **how: real(text, **how) if text.startswith("kit") else target
    )
    return target


@pytest.fixture
def command(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`nestling profile ...` in a folder of its own; raises what ends it."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> None:
        try:
            nestling.app(["profile", *map(str, arguments)])
        except SystemExit as end:
            assert not end.code, end.code

    return run


def test_a_model_is_written_and_its_error_told(
    command: Command, tmp_path: Path, device: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command("digits", *FEW, "--out", "pi.latency.json")
    model = LatencyModel.load(tmp_path / "pi.latency.json", SPACE, device)
    said = capsys.readouterr().out
    assert "pi.latency.json: none, fake 1, 1 thread(s), fp32" in said
    assert f"on 6 held-out children the mean error is {model.mape:.1%}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["pi.latency.json"]  # no log is left


def test_its_figures_as_json(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("digits", *FEW, "--json")
    told = json.loads(capsys.readouterr().out)
    model = LatencyModel.load(tmp_path / told["file"], SPACE, None)
    assert (told["mape"], told["held_out"], told["blocks"]) == (model.mape, 6, 0)
    assert told["file"] == "fake.latency.json"


def test_a_search_finds_the_profile_of_its_run(
    command: Command, run_copy: Run, device: Any, judge_latency: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command(run_copy.path, *FEW)
    profiled = sum(device.measured)
    settings = SearchConfig(strategy="random", evaluations=6, random=2, polish=0, batch=3, finalists=1, zones=0)
    found = search_loop(run_copy, Asked(("latency_ms<=0.02",), settings=settings, targets={None: device}))
    assert found.best.predicted_latency_ms is not None
    assert sum(device.measured) - profiled <= 6  # the smallest child and finalists, no profile


@pytest.fixture
def judge_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finalists are measured as their probes."""
    from deploy.probe import probe
    from deploy.targets import Model
    from search.finalists import Bench

    def probed(bench: Bench, arch: Any) -> Model:
        space = bench.run.space
        return Model(probe(space, arch), space.family.in_channels, space.resolution(arch))

    monkeypatch.setattr(Bench, "_exported", probed)


def test_cut_off_it_goes_on_where_it_was(
    command: Command, tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = device.measure, []

    def cut(models: Any, **how: Any) -> Any:
        calls.append(len(models))
        if len(calls) == 2:
            raise InputError("the board was unplugged")
        return measure(models, **how)

    more = ("--children", "20", "--held-out", "20", "--no-blocks", "--out", "pi.json")
    monkeypatch.setattr(device, "measure", cut)
    with pytest.raises(InputError, match="unplugged"):
        command("digits", *more)
    assert (tmp_path / "pi.log").exists() and not (tmp_path / "pi.json").exists()
    kept = calls[0] - 1
    calls[:] = [0, 0]
    command("digits", *more)
    assert sum(calls) - (len(calls) - 2) == 40 - kept  # each group has the anchor too
    assert not (tmp_path / "pi.log").exists()


def test_a_model_that_is_not_trusted_says_what_is_off(
    command: Command, device: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # what it takes has nothing to do with what it computes
    device.milliseconds = lambda model: 0.1 + (len(model.SerializeToString()) % 17) / 10
    command("digits", *FEW)
    said = capsys.readouterr().out
    assert "the error is above 5%: " in said and "a search measures its candidates directly then" in said


def test_a_kit_is_written_with_what_to_do(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("digits", *FEW, "--target", "kit", "--out", "board.zip")
    said = capsys.readouterr().out
    assert "board.zip: 13 models" in said and "nestling profile digits --kit board.zip --import results.json" in said
    command("digits", *FEW, "--target", "kit", "--out", "board.zip")  # a kit may take the place of a kit
    with pytest.raises(InputError, match="--import RESULTS and --kit KIT belong together"):
        command("digits", "--kit", tmp_path / "board.zip")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("digits", "--out", "notes.md"), "exists and is no latency model"),
        (("digits", "--out", "notes.md", "--target", "kit"), "exists and is no kit"),
        (("digits", "--out", "nowhere/pi.json"), "is no folder"),
        (("digitz",), "Did you mean 'digits'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_timed(
    command: Command, device: Any, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(InputError, match=told):
        command(*arguments)
    assert device.measured == [] and (tmp_path / "notes.md").read_text() == "mine"
