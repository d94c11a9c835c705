"""Measuring again what a card says, and saying whether the two agree; where they do not, what is different now."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import Bundle
from deploy.measure import measure
from deploy.measurement import Measured, Measurement
from deploy.timing import BUSY_STEAL, Timing
from supernet.errors import InputError

SPREAD = 0.02
"""Two runs on one idle machine differ by so much, at 95 %, beside what their intervals say (benchmarks of repeated measurements)."""
VAGUE = 0.1
"""A ratio whose interval reaches further than this cannot tell differences that matter apart: it is said."""
CLOCK_APART, DEGREES_APART = 0.1, 10.0
"""Differences of frequency (a part) and temperature (degrees Celsius) that are told."""
HERE = re.compile(r"local(:\d{1,4})?(\?runtime=\w+)?")
"""Targets that a card may choose by itself: this machine. Another one is told our files and runs commands, so a person names it."""


@dataclass(frozen=True, slots=True)
class Again:
    """One file measured twice. `ratio` is the latency now over that then, with its interval `low` to `high`."""

    then: Measured
    now: Measured
    ratio: float
    low: float
    high: float
    differences: tuple[str, ...]
    """What else is not as it was, in words; the first one where the file itself is another."""

    @property
    def same_file(self) -> bool:
        """Whether the very same bytes were measured."""
        return self.then.sha256 == self.now.sha256

    @property
    def within_noise(self) -> bool:
        """Whether nothing says that the latency is another one."""
        return self.low <= 1 <= self.high

    @property
    def holds(self) -> bool:
        """Whether the card is right: the same file, and as fast."""
        return self.same_file and self.within_noise

    def sentences(self) -> list[str]:
        """The verdict, then what differs, a line each."""
        then, now = self.then.timing, self.now.timing
        figures = f"{then.latency_ms:.4g} ms then, {now.latency_ms:.4g} ms now"
        if self.within_noise:
            lines = [f"{self.now.file}: within noise: {figures}, {100 * (self.ratio - 1):+.1f} % (95 %: {100 * (self.low - 1):+.1f} to "
                     f"{100 * (self.high - 1):+.1f} %)"]  # fmt: skip
            if self.high - self.low > 2 * VAGUE:
                lines.append(
                    "the intervals are so wide that a smaller difference would not be seen: measure on a quieter machine"
                )
        else:
            low, high = sorted(abs(100 * (end - 1)) for end in (self.low, self.high))
            word = "slower" if self.ratio > 1 else "faster"
            lines = [f"{self.now.file}: {word} by {abs(100 * (self.ratio - 1)):.1f} % ({low:.1f} to {high:.1f} %): {figures}"]
        if not then.stable:
            lines.append(f"the card's own latency is not known well: {then.why}")
        return [*lines, *self.differences, *self.now.remarks()]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"file": self.now.file, "holds": self.holds, "same_file": self.same_file, "within_noise": self.within_noise,
                "then_ms": self.then.timing.latency_ms, "now_ms": self.now.timing.latency_ms, "ratio": self.ratio,
                "ratio_low": self.low, "ratio_high": self.high, "differences": list(self.differences),
                "timing": self.now.timing.as_dict()}  # fmt: skip


def measure_again(card: Measurement, bundle: Bundle, text: str | None = None, most_seconds: float | None = None) -> list[Again]:
    """Repeat the latencies of a card on its target, by its protocol. `text` names the target where that is not this machine.

    Raises `InputError` where the bundle has not the card's files, or the target is neither this machine nor named by `text`.
    """
    if text is None and not HERE.fullmatch(card.target):
        raise InputError(
            "the card is of another machine than this one, to which files are sent only if you name it: add "
            f"--target {shlex.quote(card.target)}"
        )
    missing = sorted({model.file for model in card.models} - set(bundle.fact("files")))
    if missing:
        raise InputError(f"the card measures {missing[0]!r}, which {bundle.path} does not hold: give the bundle that it is of")
    seconds = card.most_seconds if most_seconds is None else most_seconds
    found = measure(bundle, text or card.target, batch=card.batch, width=card.width, most_seconds=seconds, weigh=False)
    models = {model.file: model for model in found.models}
    return [_compared(card, then, found, models[then.file]) for then in card.models]


def bundle_of(path: Path) -> Bundle:
    """The bundle that a card lies in. Raises `InputError` where it lies elsewhere."""
    if not (path.parent / "manifest.json").is_file():
        raise InputError(f"{path} does not lie in a bundle: give the bundle, too: nestling measure --verify {path} BUNDLE")
    return Bundle.open(path.parent)


def ratio_of(then: Timing, now: Timing) -> tuple[float, float, float]:
    """Latency now over that then, and an interval of at least 95 %: both intervals and `SPREAD`, independent, as logarithms.

    Every interval counts by its longer side, to both sides: by the wall clock the least time is the lower end, but others may have
    raised it.
    """
    ratio = now.latency_ms / then.latency_ms
    reach = math.exp(math.hypot(_reach(then), _reach(now), math.log1p(SPREAD)))
    return ratio, ratio / reach, ratio * reach


def _reach(timing: Timing) -> float:
    return math.log(max(timing.high_ms / timing.latency_ms, timing.latency_ms / timing.low_ms))


def _compared(card: Measurement, then: Measured, found: Measurement, now: Measured) -> Again:
    differences = []
    if then.sha256 != now.sha256:
        differences.append(f"another file: SHA-256 {then.sha256[:12]}... in the card, {now.sha256[:12]}... now")
    differences += [*_devices(card.device, found.device), *_conditions(card, found), *_timings(then.timing, now.timing)]
    return Again(then, now, *ratio_of(then.timing, now.timing), tuple(differences))


def _devices(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in sorted(set(then) | set(now)) if name != "hash" and then.get(name) != now.get(name)]
    return [f"{name}: {then.get(name, 'not told')} in the card, {now.get(name, 'not told')} now" for name in names]


def _conditions(card: Measurement, found: Measurement) -> list[str]:
    """Governor, frequency and temperature where both are known; each as it was at the end, when the device had worked."""
    then, now, said = card.after or {}, found.after or {}, []
    if then.get("governor") and now.get("governor") and then["governor"] != now["governor"]:
        said.append(f"governor: {then['governor']} in the card, {now['governor']} now")
    clocks, degrees = _both(then, now, "frequency_mhz"), _both(then, now, "temperature_c")
    if clocks and abs(clocks[1] - clocks[0]) > CLOCK_APART * clocks[0]:
        said.append(f"frequency: {clocks[0]:.0f} MHz in the card, {clocks[1]:.0f} MHz now")
    if degrees and abs(degrees[1] - degrees[0]) > DEGREES_APART:
        said.append(f"temperature: {degrees[0]:.0f} degrees Celsius in the card, {degrees[1]:.0f} now")
    cores = found.device.get("cores")
    if type(cores) is int:
        busy = [model.timing.load > cores for model in (card.models[0], found.models[0])]
        if busy[0] != busy[1]:
            loads = [model.timing.load for model in (card.models[0], found.models[0])]
            said.append(f"load: {loads[0]:.1f} in the card, {loads[1]:.1f} now, on {cores} cores")
    return said


def _both(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    pair = then.get(name), now.get(name)
    return (
        None if any(isinstance(value, str) or value is None for value in pair) else (float(pair[0] or 0), float(pair[1] or 0))
    )


def _timings(then: Timing, now: Timing) -> list[str]:
    said = []
    if then.throttled != now.throttled:
        said.append(f"throttled: {_yes(then.throttled)} in the card, {_yes(now.throttled)} now")
    if (then.steal > BUSY_STEAL) != (now.steal > BUSY_STEAL):
        said.append(f"stolen by the host: {then.steal:.1%} of the time in the card, {now.steal:.1%} now")
    return said


def _yes(value: bool) -> str:
    return "yes" if value else "no"
