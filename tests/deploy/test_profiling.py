"""A measurement goes on where it was cut off, never with what belongs to another one, and takes a device's drift out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from deploy.plan import Plan
from deploy.profiling import profile
from supernet.errors import InputError
from supernet.space import load_space

SPACE = load_space("digits")
FEW: dict[str, Any] = {"children": 6, "held_out": 6, "blocks": False}


def test_a_measurement_that_was_cut_off_times_only_what_is_left(fake_target: Any, tmp_path: Path) -> None:
    log = tmp_path / "digits.log"
    whole = profile(SPACE, fake_target(), log=log, **FEW)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # four timings, and a torn one
    target = fake_target()
    again = profile(SPACE, target, log=log, **FEW)
    assert sum(target.measured) == len(lines) - 1 - 4 + 1  # and the anchor
    assert replace(again, minutes=0.0) == replace(whole, minutes=0.0)
    rest = fake_target()
    profile(SPACE, rest, log=log, **FEW)
    assert rest.measured == []


@pytest.mark.parametrize(
    "change, word", [({"children": 8}, "another plan"), ({"seed": 1}, "another plan"), ({}, "another device")]
)
def test_timings_of_another_plan_or_device_are_refused(
    fake_target: Any, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    log = tmp_path / "digits.log"
    profile(SPACE, fake_target(), log=log, **FEW)
    before = log.read_bytes()
    with pytest.raises(InputError, match=word):
        profile(SPACE, fake_target(label="fake" if change else "other"), log=log, **{**FEW, **change})
    assert log.read_bytes() == before


@dataclass
class Drifting:
    """Measures as another target does, but every second group takes 1.7 times as long."""

    of: Any
    calls: int = 0

    name, precision = "drifting", "fp32"

    def fingerprint(self) -> dict[str, Any]:
        found: dict[str, Any] = self.of.fingerprint()
        return found

    def measure(self, models: Any, **how: Any) -> Any:
        slow, self.calls = 1.0 + 0.7 * (self.calls % 2), self.calls + 1
        found = self.of.measure(models, **how)
        names = [name for name in found[0].as_dict() if name.endswith("_ms")]
        return [replace(timing, **{name: slow * getattr(timing, name) for name in names}) for timing in found]


def test_a_device_that_is_slower_for_a_while_gives_the_same_model(fake_target: Any) -> None:
    """Every group's times are scaled by what the anchor took in it."""
    many: dict[str, Any] = {"children": 30, "held_out": 30, "blocks": False}
    steady, drifting = profile(SPACE, fake_target(), **many), profile(SPACE, Drifting(fake_target()), **many)
    assert (steady.drift, drifting.drift) == (1.0, pytest.approx(1.7))
    ratios = [drifting.predict(SPACE, arch) / steady.predict(SPACE, arch) for arch in Plan(SPACE, 30, 30).whole]
    assert max(ratios) / min(ratios) == pytest.approx(1.0, abs=1e-6)
