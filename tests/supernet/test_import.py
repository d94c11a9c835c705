"""What importing costs: nothing heavy is loaded, nothing is written, and no network is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "torchvision", "timm", "onnx", "onnxruntime", "sklearn", "scipy", "plotly", "safetensors", "fvcore", "ray"]

WATCH = """
import json, os, sys
touched = []
def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.mkdir", "os.remove", "os.rename", "shutil.")):
        touched.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        touched.append(f"open {arguments[0]} {arguments[1]}")
sys.addaudithook(watch)
before = dict(os.environ)
try:
    exec(sys.argv.pop(1))
except SystemExit as end:
    assert not end.code, end.code
changed = sorted(name for name in {**before, **os.environ} if before.get(name) != os.environ.get(name))
print("\\n" + json.dumps({"modules": sorted({name.split(".")[0] for name in sys.modules}), "touched": touched, "changed": changed}))
"""


def after(code: str, *arguments: str) -> dict[str, Any]:
    """What a fresh interpreter has loaded and touched after running `code`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", WATCH, code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    report: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return {**report, "shown": found.stdout}


@pytest.mark.parametrize(
    "name", ["supernet", "deploy", "search", "nestling", "supernet.commands, deploy.commands, search.commands"]
)
def test_importing_loads_nothing_heavy_and_touches_nothing(name: str) -> None:
    report = after(f"import {name}")
    assert not set(HEAVY) & set(report["modules"])
    assert report["touched"] == []
    assert report["changed"] == []


def test_the_help_comes_without_torch() -> None:
    report = after("import nestling; nestling.main()", "--help")
    assert not set(HEAVY) & set(report["modules"])
    assert not [event for event in report["touched"] if event.startswith("socket")]
    assert "train" in report["shown"]


@pytest.mark.parametrize("command", ["spaces", "describe", "train", "search", "export", "report"])
def test_the_help_of_a_command_comes_without_torch(command: str) -> None:
    assert not set(HEAVY) & set(after("import nestling; nestling.main()", command, "--help")["modules"])


def test_public_names_are_loaded_when_they_are_used() -> None:
    import supernet

    assert set(dir(supernet)) == set(supernet.__all__)
    assert [getattr(supernet, name).__name__ for name in supernet.__all__] == supernet.__all__
    with pytest.raises(AttributeError, match="module 'supernet' has no attribute 'Supernett'"):
        _ = supernet.Supernett


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "nowhere"], "give the images with --data"),
        (["train", "--out", "nowhere", "--resume"], "nowhere is not a run directory"),
        (["train", "--out", "nowhere", "--resume", "--space", "digits"], "--resume continues the run as it was configured"),
        (["train", "--out", "nowhere", "--data", "digts"], "there is no data called 'digts' (did you mean digits?)"),
        (["train", "--out", "nowhere", "--data", "digits", "--device", "tpu"], "a device is one of auto, cpu, cuda, but got 'tpu'"),
        (["train", "--out", "nowhere", "--data", "digits", "--set", "epochs"], "an override is written key=value"),
        (["describe", "--space", "digit"], "spaces are named"),
        (["describe", "--space", "digits", "--arch", "medium"], "an arch is 'smallest', 'largest' or"),
    ],
)  # fmt: skip
def test_an_error_of_the_user_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import nestling

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nestling", *arguments])
    with pytest.raises(SystemExit) as ended:
        nestling.main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"nestling: {message}")
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
