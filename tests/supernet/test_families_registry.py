"""Families of other packages are found by their entry point; one that cannot be loaded is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supernet import families as registry
from supernet.errors import InputError
from supernet.space import load_space

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_family"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of somebody else, as an installer leaves it: code, and metadata with an entry point."""
    (tmp_path / "vgg.py").write_text((EXAMPLE / "vgg.py").read_text().replace('FAMILIES["vgg"] = KIND', "OTHER = 3"))
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nestling.families]\nvgg = vgg:KIND\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._installed.cache_clear()
    yield metadata / "entry_points.txt"
    registry._installed.cache_clear()
    sys.modules.pop("vgg", None)


def test_a_family_of_an_installed_package_is_one_of_ours(installed: Path) -> None:
    assert "vgg" not in registry.FAMILIES and {"vgg", "mbconv"} <= registry.families().keys()
    space = load_space(str(EXAMPLE / "vgg.yaml"))
    assert space.size == 3 * (3 * 2) * (3 * 3)
    assert len(space.plan(space.largest)) == 2 + 3 + 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere:KIND", "cannot be loaded .*nowhere.*: repair or remove its package"),
        ("vgg:OTHER", "must be a FamilyKind, but is int"),
    ],
)
def test_a_family_that_cannot_be_loaded_is_named(installed: Path, value: str, message: str) -> None:
    installed.write_text(f"[nestling.families]\nvgg = {value}\n")
    with pytest.raises(InputError, match=f"the family 'vgg' .*{message}"):
        load_space(str(EXAMPLE / "vgg.yaml"))


def test_an_unknown_family_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"family: must be one of \[.*'mbconv'.*\], but got 'vgg'"):
        load_space(str(EXAMPLE / "vgg.yaml"))
