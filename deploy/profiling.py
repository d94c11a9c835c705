"""Measures a space on a target: every distinct block alone and whole children, in mixed order, so that a latency model can be made.

Devices are not always equally fast: heat, and programs on the same core, change it by tens of percent within minutes. What is timed
in one group, in turn, is comparable; so one child, the *anchor*, is in every group, and a group's times are scaled to what it usually
takes. What was timed is written down at once; a measurement that was cut off goes on from there if the device is still the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploy.fit import BASE, Floats, fit, predicted
from deploy.kit import Kit, job_of, read_results, write_kit
from deploy.latency import LatencyModel, Whole, ingredients, signature
from deploy.plan import ANCHOR, CHILDREN, HELD_OUT, Plan
from deploy.targets import MOST_SECONDS, Model, Target, differing
from deploy.timing import WIDTH, Timing
from supernet import durable
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import Space

FORMAT = 2
BLOCK_WIDTH, BLOCK_SECONDS = 0.1, 2.5
"""How sure the time of a single block has to be: a child has some twenty, whose errors even out."""
WHOLE_SECONDS = 60.0
"""How long a group of whole children is timed at most, where they are large (300 million macs)."""

Progress = Callable[[str], None]


@dataclass
class Log:
    """Timings by key, of one device, each with what the anchor took in its group; in a file, where there is a path, a line each."""

    fingerprint: Mapping[str, Any]
    path: Path | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Of what the timings are, so far as it decides the anchor: those of another anchor cannot be scaled to this one's."""
    known: dict[str, tuple[Timing, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self._read(self.path)
        else:
            self._write({"format": FORMAT, "fingerprint": dict(self.fingerprint), "plan": dict(self.plan)})

    def add(self, key: str, timing: Timing, anchor_ms: float) -> None:
        """Keep a timing."""
        self.known[key] = timing, anchor_ms
        self._write({"key": key, "timing": timing.as_dict(), "anchor_ms": anchor_ms})

    @property
    def drift(self) -> float:
        """How much slower the device was at its slowest than at its fastest, a ratio."""
        anchors = [anchor_ms for _, anchor_ms in self.known.values()]
        return max(anchors) / min(anchors)

    def scaled(self) -> dict[str, Timing]:
        """All timings as if the device had always been as fast as it usually was."""
        usual = float(np.median([anchor_ms for _, anchor_ms in self.known.values()]))
        return {key: _times(timing, usual / anchor_ms) for key, (timing, anchor_ms) in self.known.items()}

    def _write(self, value: Mapping[str, Any]) -> None:
        if self.path is not None:
            durable.append_line(self.path, json.dumps(value))

    def _read(self, path: Path) -> None:
        """What a measurement that was cut off has. Raises `InputError` for what is none, or of another device."""
        try:
            head, *lines = durable.read_lines(path)
            if head["format"] != FORMAT or not isinstance(head["fingerprint"], dict):
                raise ValueError("another version wrote it")
            self.known = {str(line["key"]): (Timing.from_dict(line["timing"]), float(line["anchor_ms"])) for line in lines}
            if not all(0 < anchor_ms < math.inf for _, anchor_ms in self.known.values()):
                raise ValueError("an anchor took no time")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be gone on from: it is no log of a measurement, or damaged ({error}): move it away, then measure anew"
            ) from error
        if head.get("plan") != dict(self.plan):
            raise InputError(
                f"{path} holds timings of another plan ({head.get('plan')}, now {dict(self.plan)}): give the command that began it, "
                "or move that file away and measure anew"
            )
        if head["fingerprint"] != dict(self.fingerprint):
            raise InputError(
                f"{path} holds timings of another device: {differing(head['fingerprint'], self.fingerprint)}: go on there, or move "
                "that file away and measure anew"
            )


def profile(
    space: Space, target: Target, *, children: int = CHILDREN, held_out: int = HELD_OUT, seed: int = 0, blocks: bool = True,
    log: Path | None = None, progress: Progress | None = None,
) -> LatencyModel:  # fmt: skip
    """Time blocks and whole children of a space on a target, and fit a latency model to `children`, proven on `held_out` others.

    Without `blocks`, or in a space of too many, operators alone are fitted. `log` is a file of timings to go on from. Raises
    `InputError` where the target cannot be measured.
    """
    begun, plan = time.monotonic(), Plan(space, children, held_out, seed, blocks, target.precision)
    known = Log(target.fingerprint(), log, plan.about)
    measure(plan, target, known, progress or (lambda _: None))
    return fitted(plan, known, minutes=(time.monotonic() - begun) / 60)


def measure(plan: Plan, target: Target, log: Log, say: Progress) -> None:
    """Time what the log does not have yet, in groups that the anchor belongs to."""
    anchor, groups = plan.anchor.model(), plan.groups(log.known)
    macs = float(Costs(plan.space).macs(plan.space.encode(plan.whole)).mean())
    longest = float(np.clip(MOST_SECONDS * macs / 1e8, MOST_SECONDS, WHOLE_SECONDS))
    for number, part in enumerate(groups, 1):
        say(f"timing blocks and children on {target.name}: group {number} of {len(groups)}")
        width, seconds = (WIDTH, longest) if part[0].whole else (BLOCK_WIDTH, BLOCK_SECONDS)
        *timings, anchored = target.measure([*(job.model() for job in part), anchor], width=width, most_seconds=seconds)
        for job, timing in zip(part, timings, strict=True):
            log.add(job.key, timing, anchored.latency_ms)


def write_profile_kit(plan: Plan, kit: Kit, path: Path) -> int:
    """Write a kit that times all of a plan where nothing here reaches; gives back how many models it holds."""

    def models() -> Iterator[tuple[Model, Mapping[str, Any]]]:
        anchor = plan.anchor.model()
        for number, part in enumerate(plan.groups()):
            yield from ((job.model(), {"key": job.key, "group": number}) for job in part)
            yield anchor, {"key": ANCHOR, "group": number}

    return len(write_kit(path, models(), kit, about={**plan.about, "blocks": plan.blocks})["models"])


def imported(space: Space, kit: Path, results: Path) -> LatencyModel:
    """The model of what a kit of `write_profile_kit` found. Raises `InputError` where kit or results are of something else."""
    job = job_of(kit)
    found, about = read_results(results, job), job.get("about") or {}
    if about.get("space") != space.key:
        raise InputError(f"{kit} times another space ({about.get('space')}) than {space.name} ({space.key}): name that one")
    plan = Plan(space, about["children"], about["held_out"], about["seed"], about["blocks"], job["precision"])
    log, listed = Log(found.fingerprint), job["models"]
    anchors = {each["group"]: found.timings[at].latency_ms for at, each in enumerate(listed) if each["key"] == ANCHOR}
    for at, each in enumerate(listed):
        if each["key"] != ANCHOR:
            log.add(each["key"], found.timings[at], anchors[each["group"]])
    if missing := [wanted.key for wanted in plan.jobs() if wanted.key not in log.known]:
        raise InputError(
            f"{kit} lacks {len(missing)} blocks or children of {space.name}: it is of another version; write it anew"
        )
    return fitted(plan, log, minutes=0.0)


def _times(timing: Timing, factor: float) -> Timing:
    scaled = {each.name: factor * getattr(timing, each.name) for each in fields(timing) if each.name.endswith("_ms")}
    return replace(timing, **scaled)


def fitted(plan: Plan, log: Log, *, minutes: float) -> LatencyModel:
    """The model of what was timed: fitted to the first children of the plan, proven on the others (on all, where there are few)."""
    known, many = log.scaled(), plan.children
    times = [known[arch.key] for arch in plan.whole]
    block_ms = {key: known[key].latency_ms for key in plan.table}
    columns = columns_of(plan.space, plan.whole, block_ms)
    coefficients = fit({name: column[:many] for name, column in columns.items()}, latencies(times[:many]))
    rows = [
        Whole(arch.as_dict(), arch.key, max(1e-6, float(guess)), time_.latency_ms, time_.low_ms, time_.high_ms, time_.stable)
        for arch, guess, time_ in zip(plan.whole, predicted(coefficients, columns), times, strict=True)
    ]
    return LatencyModel(
        plan.space.key, dict(log.fingerprint), datetime.now(UTC).date().isoformat(), coefficients, block_ms, tuple(rows[:many]),
        tuple(rows[many:] or rows), log.drift, minutes,
    )  # fmt: skip


def columns_of(space: Space, archs: Sequence[Arch], block_ms: Mapping[str, float]) -> dict[str, Floats]:
    """What children have of everything that a model may use, each of shape (archs,)."""
    names = [*(BASE if block_ms else BASE[:1]), "macs", *Costs(space).feature_names]
    columns = {name: np.zeros(len(archs)) for name in names}
    columns["constant"] += 1
    for row, arch in enumerate(archs):
        for spec in space.plan(arch).values():
            given = ingredients(spec)
            if block_ms:
                given["block_ms"] = block_ms[signature(spec)]
            for name, value in given.items():
                if name in columns:
                    columns[name][row] += value
    return columns


def latencies(timings: Sequence[Timing]) -> Floats:
    """Latencies in ms, shape (timings,)."""
    return np.array([timing.latency_ms for timing in timings])
