"""Measuring a bundle on a target: latency, memory, time to load, throughput. What was found goes into a card (`deploy/measurement.py`).

A machine may be slower by half for seconds (another program on the core's other thread, heat), which an interval taken within a second
does not show. So the latency is taken in several sittings, apart in time, with the model loaded anew; it is the least of them.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from deploy.bundle import Bundle
from deploy.measurement import LONGEST_SECONDS, Measured, Measurement
from deploy.places import parse_target
from deploy.targets import MOST_SECONDS, Model, Target, Weight
from deploy.timing import WIDTH, Timing
from supernet import durable
from supernet.errors import InputError

MOST_BATCH = 4096
ENDINGS = {"executorch": ".pte"}
"""Runtime -> what the names of its files end in, where that is not .onnx."""
SITTINGS, PAUSE_SECONDS = 6, 1.0
"""In a second one the machine may have been quiet, too: then the latency is known."""


@runtime_checkable
class Open(Target, Protocol):
    """A target that can be asked for more than latencies."""

    def weigh(self, models: Any, *, batch: int = 8, seconds: float = 1.0) -> list[Weight]:
        """Memory, time to load, first inference and throughput of each model; the latter is measured for `seconds`."""
        ...

    def conditions(self) -> dict[str, Any]:
        """Governor, frequency, temperature and load at this moment; None where unknown."""
        ...


def measure(
    bundle: Bundle, text: str, *, batch: int = 8, width: float = WIDTH, most_seconds: float = MOST_SECONDS, weigh: bool = True
) -> Measurement:  # fmt: skip
    """Measure the models of a bundle on the target that `text` names; with `weigh`, more than their latency where it can.

    `batch` is that of the throughput; latency is at batch 1. Raises `InputError` where the target cannot be reached, or cannot run
    the models.
    """
    if not 1 <= batch <= MOST_BATCH:
        raise InputError(f"the batch of the throughput is 1 to {MOST_BATCH} images, but got {batch}")
    if not 0 < most_seconds <= LONGEST_SECONDS:
        raise InputError(f"a model is timed for more than 0 and at most {LONGEST_SECONDS:g} seconds, but got {most_seconds:g}")
    precision = str(bundle.fact("precision"))
    target = parse_target(text, precision=precision)
    device = target.fingerprint()
    files = models_of(bundle, str(device["runtime"]).partition(" ")[0])
    given = [model for _, model in files]
    asked = target if isinstance(target, Open) else None
    before = asked.conditions() if asked else None
    sittings = _sittings(target, given, SITTINGS if asked else 1, width, most_seconds)
    after = asked.conditions() if asked else None
    weights: list[Weight | None] = [*asked.weigh(given, batch=batch)] if asked and weigh else [None] * len(given)
    models = tuple(
        Measured(
            name, hashlib.sha256(model.data).hexdigest(), len(model.data), tuple(model.input_shape), pooled(taken, width), weight,
            tuple(timing.latency_ms for timing in taken),
        )
        for (name, model), taken, weight in zip(files, sittings, weights, strict=True)
    )  # fmt: skip
    return Measurement(
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), bundle.name, str(bundle.fact("key")),
        precision, int(bundle.fact("model_size_bytes")), text, target.name, device, before, after, batch, width, most_seconds, models,
    )  # fmt: skip


def _sittings(
    target: Target, models: Sequence[Model], count: int, width: float, most_seconds: float
) -> list[list[Timing]]:  # fmt: skip
    """The timings of each model, one a sitting."""
    taken = []
    for number in range(count):
        time.sleep(PAUSE_SECONDS if number else 0)
        taken.append(target.measure(models, width=width, most_seconds=most_seconds / count))
    return [list(timings) for timings in zip(*taken, strict=True)]


def pooled(taken: Sequence[Timing], width: float) -> Timing:
    """One timing of several sittings; of a single one, that itself.

    The latency is the least, and the interval ends where a second sitting came to, and where any was quiet. Medians and `p95_ms` are
    medians of the sittings', means are means of all samples.
    """
    if len(taken) == 1:
        return taken[0]
    latencies, clock = sorted(timing.latency_ms for timing in taken), taken[0].clock
    latency, high = latencies[0], max(latencies[1], min(timing.high_ms for timing in taken))
    stable, why = high - latency <= width * latency, ""
    if not stable:
        why = f"the sittings gave {latencies[0]:.4g} to {latencies[-1]:.4g} ms, and the interval is "
        why += f"{100 * (high - latency) / latency:.1f} % of the latency where {100 * width:.3g} % is asked for"
        why = ": ".join(
            [why, *[timing.why.partition(": ")[2] for timing in taken if timing.why][-1:]]
        )  # the reason, without its figures
    samples = sum(timing.samples for timing in taken)

    def least(name: str) -> float:
        return min(float(getattr(timing, name)) for timing in taken)

    def middle(name: str) -> float:
        return float(np.median([getattr(timing, name) for timing in taken]))

    def mean(name: str) -> float:
        return sum(float(getattr(timing, name)) * timing.samples for timing in taken) / samples

    return Timing(
        latency, latency, high, least("min_ms"), middle("median_ms"), mean("mean_ms"), middle("p95_ms"), least("wall_min_ms"),
        middle("wall_median_ms"), mean("wall_mean_ms"), samples, stable, any(timing.throttled for timing in taken), why, clock,
        taken[-1].load, mean("steal"),
    )  # fmt: skip


def measured(bundle: Bundle, text: str, batch: int, most_seconds: float | None, out: Path | None) -> tuple[Measurement, Path]:
    """Measure a bundle and write the card, into the bundle or to `out`; returns both card and place.

    A bundle in a .zip has no room for it. Raises `InputError`; for a place that will not do, before anything is measured.
    """
    if out is None and bundle.origin is not None:
        raise InputError("the card of a .zip needs a place of its own: give --out CARD.json")
    if out is None:
        durable.refuse_unwritable(bundle.path)
    else:
        refuse_place(bundle, out)
    card = measure(bundle, text, batch=batch, most_seconds=MOST_SECONDS if most_seconds is None else most_seconds)
    path = place_of(bundle, card) if out is None else out
    card.write(path)
    return card, path


def models_of(bundle: Bundle, runtime: str = "onnxruntime") -> list[tuple[str, Model]]:
    """Name and content of every model for `runtime` that a bundle's manifest lists.

    Raises `InputError` where there is none, or one is not the one listed.
    """
    ending = ENDINGS.get(runtime, ".onnx")
    listed, shape = bundle.fact("files"), bundle.fact("input", "shape")
    sizes = shape[1:] if isinstance(shape, list) else []
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"{bundle.path}: the manifest gives the input as {shape!r}: export the child again")
    models = bundle.manifest.get("models")
    special = [each for each in models if isinstance(each, dict)] if isinstance(models, list) else []
    left_out = {
        each.get("file") for each in special if "input" in each or "batch" in each
    }  # a runner makes up images, many of them
    found = []
    for name in sorted(name for name in listed if name.endswith(ending) and name not in left_out):
        data = (bundle.path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != listed[name]:  # it was changed since the bundle was opened
            raise InputError(f"{bundle.path}: {name!r} was changed since it was exported: export the child again")
        found.append((name, Model(data, sizes[0], sizes[-1], (1, *sizes))))
    if not found:
        raise InputError(f"{bundle.path} holds no {ending} file, which {runtime} runs: choose another runtime for the target")
    return found


def refuse_place(bundle: Bundle, out: Path) -> None:
    """Raise `InputError` where a card at `out` would take the place of anything but a card, or cannot be written."""
    if out.suffix != ".json":
        raise InputError(
            f"a card is a file with the ending .json, with a readable one ending in .md beside it, but got --out {out}"
        )
    durable.refuse_unwritable(out.parent)
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: make it, or choose another --out")
    ours = {"manifest.json", *bundle.fact("files")}
    for path in (out, out.with_suffix(".md")):
        if path.parent.resolve() == bundle.path.resolve() and path.name in ours:
            raise InputError(f"{path} is a file of the bundle, which a card must not replace: choose another --out")
    if out.exists():
        try:
            Measurement.open(out)
        except InputError as error:
            raise InputError(f"{out} exists and is no card, so that it would be lost: choose another --out") from error
    elif out.with_suffix(".md").exists():
        raise InputError(f"{out.with_suffix('.md')} exists and belongs to no card: choose another --out")


def place_of(bundle: Bundle, card: Measurement) -> Path:
    """Where a card lies if nothing else is said: in the bundle, under a name that no export writes."""
    return bundle.path / f"measurement-{card.hash}.json"
