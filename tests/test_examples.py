"""The examples run as a user would run them, and the README's commands and files exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_example_runs(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning:supernet"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_a_family_of_ones_own_passes_the_conformance_suite_outside_this_project(tmp_path: Path) -> None:
    """As a third party runs it: their directory, their pytest settings (none)."""
    shutil.copytree(ROOT / "examples" / "own_family", tmp_path / "theirs")
    (tmp_path / "theirs" / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_vgg.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path / "theirs", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 60


SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
MINUTES: dict[str, list[str]] = {
    "gpu_check": ["--device", "cpu"], "quality_cifar": [], "train_step": [], "ranking": [], "worth_it": [], "search_cost": [],
    "search_eval": [], "search_cluster": [], "racing": [], "search_truth": [], "latency_model": [], "exactness": [],
    "export_latency": [],
}  # fmt: skip
"""Benchmarks that are run by hand, and their options."""


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, marks=pytest.mark.nightly if path.stem in MINUTES else pytest.mark.slow) for path in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_the_benchmark_ends_with_a_line_of_json(script: Path) -> None:
    import json

    command = [sys.executable, str(script), "--quick", *MINUTES.get(script.stem, [])]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert isinstance(json.loads(done.stdout.strip().splitlines()[-1]), dict)


def test_every_command_and_link_of_the_readme_exists() -> None:
    import nestling

    text = (ROOT / "README.md").read_text()
    known = {command.name or command.callback.__name__ for command in nestling.app.registered_commands if command.callback}
    known |= {
        str(group.name or (group.typer_instance and group.typer_instance.info.name)) for group in nestling.app.registered_groups
    }
    assert set(re.findall(r"nestling ([a-z]+)[ `]", text)) <= known
    assert known <= set(re.findall(r"nestling ([a-z]+)[ `]", text))
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"    make ([a-z]+)", text):
        assert f"\n{target}:" in makefile
