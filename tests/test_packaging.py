"""The wheel: what travels in it, and that it works from any directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install -e '.[dev]'")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_configurations_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"supernet", "deploy", "search", "nestling.py"}
    shipped = {name.removeprefix("supernet/configs/") for name in names if name.startswith("supernet/configs/")}
    assert shipped == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_the_command_works_from_the_wheel_in_another_directory(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert run("-c", "import nestling, supernet; print(nestling.__file__, supernet.__file__)").count(str(tmp_path)) == 2
    spaces = {row["space"] for row in json.loads(run("-m", "nestling", "spaces", "--json"))}
    assert {"attentivenas", "digits"} <= spaces
    described = json.loads(run("-m", "nestling", "describe", "--space", "digits", "--arch", "smallest", "--json"))
    assert {"key", "macs", "params", "peak_memory_bytes"} <= described.keys()
