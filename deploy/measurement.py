"""A measurement card: what a bundle's models took on a device, how that was measured, and what the number leaves out. The format alone.

It lies beside the files that it speaks of and names them by their hashes; a bundle is whole with it and without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.card import plain
from deploy.targets import CLOCKS, Weight
from deploy.timing import LEAST_SAMPLE_MS, LOOSE_ROUNDS, MOST_ROUNDS, QUIET, WARM_UPS, Timing
from supernet import durable
from supernet.errors import InputError

FORMAT = 1
KIND = "measurement"
MOST_BYTES = 1 << 20
LONGEST_SECONDS = 3600.0
"""No model is timed for longer, whatever a card says."""
APART = 0.1
"""How far the median of the wall clock may lie from the latency before the card says so."""
STATISTIC = {"cpu": "least CPU time of the thread that computes", "wall": "least wall time"}
SITTING = f"until at least {QUIET:.0%} of all calls, at 95 % (binomial), lie as near to the least as asked, or the time is over"
"""When a sitting ends."""
INTERVAL = "from the least of all sittings to what a second one came to, and where any was quiet"
INSIDE = (
    "one inference of one image (batch 1), from numbers in memory to numbers in memory, on random inputs",
    "a warm model: the same call was made just before, and nothing was done in between",
)
OUTSIDE = (
    "reading, decoding, resizing and normalising the image, and what is made of the output",
    "loading the model and its first inference; they are given beside it",
    "a pause between two inferences, after which caches are cold and the clock of the processor may be low",
    "other threads of the application, and copies from and to another device",
)
WAITING = {
    "cpu": "waiting for the processor while others have it, and what others on the same core cost: the wall median has both",
    "wall": "waiting for the processor while others have it: the least wall time is without it, the median is with it",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What one file of a bundle took and weighed; `weight` is None where the target cannot weigh."""

    file: str
    sha256: str
    file_bytes: int
    input_shape: tuple[int, ...]
    timing: Timing
    """Of all sittings."""
    weight: Weight | None
    sittings_ms: tuple[float, ...]
    """The latency in each sitting, in their order."""

    @property
    def apart(self) -> float:
        """How much longer than the latency the median call was by the wall clock, as a part of the latency."""
        return self.timing.wall_median_ms / self.timing.latency_ms - 1

    def remarks(self) -> list[str]:
        """What a reader has to know before the number is believed."""
        timing, found = self.timing, []
        if not timing.stable:
            found.append(f"not known as well as was asked for: {timing.why}")
        if abs(self.apart) > APART:
            than = "the least CPU time" if timing.clock == "cpu" else "the least"
            found.append(
                f"the median by the wall clock is {timing.wall_median_ms:.4g} ms, {signed(self.apart)} against {than} of "
                f"{timing.latency_ms:.4g} ms: an application sees more than the latency while this machine is as it was "
                f"(load {timing.load:.1f}, {timing.steal:.0%} of its time stolen)"
            )
        if timing.throttled:
            found.append(
                f"throttled: the mean by the wall clock is {timing.wall_mean_ms:.4g} ms, far above the median: a quota, heat or other "
                "programs stopped it now and then"
            )
        return found

    def sentences(self) -> list[str]:
        """What was found, a line each."""
        timing, weight = self.timing, self.weight
        lines = [f"{self.file}: {timing.latency_ms:.4g} ms (up to {timing.high_ms:.4g}), "
                 f"{STATISTIC[timing.clock]}, {timing.samples} samples in "
                 f"{len(self.sittings_ms)} sittings",
                 f"by the wall clock: median {timing.wall_median_ms:.4g} ms ({signed(self.apart)}), mean {timing.wall_mean_ms:.4g}, "
                 f"least {timing.wall_min_ms:.4g}"]  # fmt: skip
        if weight:
            lines += [f"loading {weight.load_ms:.4g} ms, first inference {weight.first_ms:.4g} ms, {_rate(weight)} images/s "
                      f"at batch {weight.batch}",
                      f"memory {weight.resident_bytes / 1e6:.1f} MB at most, {weight.added_bytes / 1e6:.1f} MB of it with the model; "
                      f"file {self.file_bytes:,} bytes"]  # fmt: skip
        return lines + self.remarks()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"file": self.file, "sha256": self.sha256, "file_bytes": self.file_bytes, "input_shape": list(self.input_shape),
                "timing": self.timing.as_dict(), "sittings_ms": list(self.sittings_ms),
                "weight": self.weight.as_dict() if self.weight else None,
                "wall_median_over_latency": self.apart + 1, "remarks": self.remarks()}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measurement:
    """A card. `before` and `after` are the device's conditions (`deploy.runner.conditions`), None where it cannot tell them."""

    date: str
    bundle: str
    """Name of the bundle's folder."""
    key: str
    precision: str
    model_size_bytes: int
    """Of the weights, as the manifest says."""
    target: str
    """As it was given."""
    name: str
    """What the target calls itself."""
    device: Mapping[str, Any]
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    batch: int
    """Of the throughput."""
    width: float
    most_seconds: float
    models: tuple[Measured, ...]

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of what was measured and where, so that a repetition takes the place of what it repeats."""
        content = [self.device["hash"], self.target, *(model.sha256 for model in self.models)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @property
    def command(self) -> str:
        """What repeats it, given where the bundle lies."""
        words = ["nestling", "measure", self.bundle, "--target", self.target, "--batch", str(self.batch)]
        return shlex.join([*words, "--most-seconds", f"{self.most_seconds:g}"])

    @property
    def protocol(self) -> dict[str, Any]:
        """How a number came to be, in words and numbers."""
        clock = self.models[0].timing.clock
        return {
            "clock": CLOCKS[clock],
            "statistic": STATISTIC[clock],
            "sittings": len(self.models[0].sittings_ms),
            "interval": INTERVAL if len(self.models[0].sittings_ms) > 1 else "that of the one sitting",
            "width_asked": self.width,
            "most_seconds": self.most_seconds,
            "batch": 1,
            "warm_ups": WARM_UPS,
            "rounds": f"{LOOSE_ROUNDS} to {MOST_ROUNDS} a sitting, {SITTING}",
            "sample": f"mean of as many calls as take {LEAST_SAMPLE_MS:g} ms, at least one"
            + ("; the quickest of three such" if clock == "wall" else ""),
            "throughput": f"batch {self.batch}, wall clock, the best run",
            "memory": "largest resident set of a process that loads the model, runs it at batch 1 and does nothing else",
            "inside": list(INSIDE),
            "outside": [*OUTSIDE, WAITING[clock]],
        }

    def sentences(self) -> list[str]:
        """What was found and where, a line each."""
        return [f"{self.bundle} on {self.name}: {self.device['processor']}, {self.device['runtime']}",
                *(line for model in self.models for line in model.sentences())]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {
            "format": FORMAT, "kind": KIND, "date": self.date,
            "bundle": {"name": self.bundle, "key": self.key, "precision": self.precision, "model_size_bytes": self.model_size_bytes},
            "target": {"text": self.target, "name": self.name},
            "device": dict(self.device),
            "conditions": {"before": self.before, "after": self.after},
            "models": [model.as_dict() for model in self.models],
            "throttled": any(model.timing.throttled for model in self.models),
            "protocol": self.protocol,
            "throughput_batch": self.batch,
            "command": self.command,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: Any) -> Measurement:
        """Read what `as_dict` gave. Raises `ValueError`."""
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise ValueError("a card is of the kind measurement")
        if value.get("format") != FORMAT:
            raise ValueError(f"it has format {value.get('format')!r}, this version reads {FORMAT}")
        bundle, target, protocol = (_dict(value, name) for name in ("bundle", "target", "protocol"))
        models, conditions = value.get("models"), _dict(value, "conditions")
        if not isinstance(models, list) or not models:
            raise ValueError("it measures no model")
        device = _dict(value, "device")
        for name in ("processor", "runtime", "hash"):
            _text(device, name)
        return cls(
            _text(value, "date"), _text(bundle, "name"), _text(bundle, "key"), _text(bundle, "precision"),
            int(_number(bundle, "model_size_bytes")), _text(target, "text"), _text(target, "name"), device,
            _conditions(conditions.get("before")), _conditions(conditions.get("after")), int(_number(value, "throughput_batch", 1)),
            _number(protocol, "width_asked", 1e-4, 1.0), _number(protocol, "most_seconds", 1e-3, LONGEST_SECONDS),
            tuple(_measured(model) for model in models),
        )  # fmt: skip

    @classmethod
    def open(cls, path: Path) -> Measurement:
        """Read a card. Raises `InputError` that names the file."""
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError(f"it is larger than {MOST_BYTES} bytes")
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): give a card that `nestling measure` wrote") from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is no measurement card ({str(error)[:300]}): give a card that `nestling measure` wrote"
            ) from error

    def write(self, path: Path) -> None:
        """Write the card to `path` and, for people, beside it with the ending .md. Raises `supernet.durable.WriteError`."""
        durable.write_text(path.with_suffix(".md"), markdown(self))
        durable.write_json(path, self.as_dict())


def signed(part: float) -> str:
    """A part in per cent, with its sign."""
    return f"{round(100 * part, 0 if abs(part) >= 0.1 else 1) + 0.0:+.4g} %"


def _rate(weight: Weight) -> str:
    return f"{weight.images_per_s:,.0f}" if weight.images_per_s >= 100 else f"{weight.images_per_s:.3g}"


def markdown(card: Measurement) -> str:
    """The card for people."""
    device, protocol = card.device, card.protocol
    settings = ", ".join(
        f"{name} {plain(device[name])}" for name in ("machine", "cores", "threads", "precision") if name in device
    )
    lines = [f"# Measurement of {plain(card.bundle)}", "",
             f"Child {plain(card.key)}, measured on {plain(card.date)} on `{plain(card.target)}`: {plain(device['processor'])}, "
             f"{settings}, {plain(device['runtime'])}."]  # fmt: skip
    for model in card.models:
        lines += ["", f"## {plain(model.file)}", "", *_rows(model), "", *(f"* {plain(remark)}" for remark in model.remarks())]
    lines += ["", "## What is in the latency", "", *(f"* {text}" for text in protocol["inside"]),
              "", "## What is not", "", *(f"* {text}" for text in protocol["outside"]),
              "", "## How it was measured", ""]  # fmt: skip
    lines += [f"* {name.replace('_', ' ')}: {value}" for name, value in protocol.items() if name not in ("inside", "outside")]
    lines += ["", "## The device", "", "| | before | after |", "|---|---|---|"]
    for name in ("governor", "frequency_mhz", "temperature_c", "load"):
        lines.append(f"| {name} | {_shown(card.before, name)} | {_shown(card.after, name)} |")
    lines += [
        "",
        "## Again",
        "",
        f"    {card.command}",
        "    nestling measure --verify CARD.json BUNDLE    # says whether it is as fast there",
        "",
    ]
    return "\n".join(lines)


def _rows(model: Measured) -> list[str]:
    """A table of all figures of a model."""
    timing, weight = model.timing, model.weight
    rows = [
        ("latency", f"**{timing.latency_ms:.4g} ms** (up to {timing.high_ms:.4g}), {STATISTIC[timing.clock]}"),
        (
            "by that clock",
            f"least {timing.min_ms:.4g}, median {timing.median_ms:.4g}, mean {timing.mean_ms:.4g}, p95 {timing.p95_ms:.4g} ms",
        ),
        ("by the wall clock", f"least {timing.wall_min_ms:.4g}, median {timing.wall_median_ms:.4g}, mean {timing.wall_mean_ms:.4g} ms"),
        ("median by the wall clock, against the latency", signed(model.apart)),
        ("latency in each sitting", ", ".join(f"{latency:.4g}" for latency in model.sittings_ms) + " ms"),
        ("samples", f"{timing.samples}; the interval is {'as' if timing.stable else 'not as'} narrow as asked"),
        ("throttled", "yes" if timing.throttled else "no"),
        ("others on the machine", f"load {timing.load:.1f}, {timing.steal:.1%} of the time stolen by the host"),
        ("file", f"{model.file_bytes:,} bytes, SHA-256 `{model.sha256}`"),
        ("input", f"{list(model.input_shape)}, float32"),
    ]  # fmt: skip
    if weight is None:
        rows.append(("memory, loading, throughput", "not measured on this target"))
    else:
        rows += [
            ("loading", f"{weight.load_ms:.4g} ms"),
            ("first inference", f"{weight.first_ms:.4g} ms"),
            ("throughput", f"{_rate(weight)} images/s at batch {weight.batch}"),
            ("memory", f"{weight.resident_bytes:,} bytes at most, {weight.added_bytes:,} of them came with the model"),
        ]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _shown(conditions: Mapping[str, Any] | None, name: str) -> str:
    value = (conditions or {}).get(name)
    return "not readable" if value is None else plain(f"{value:.4g}" if isinstance(value, float) else value)


def _measured(value: Any) -> Measured:
    if not isinstance(value, dict):
        raise ValueError("a model in it is no mapping")
    shape, sha256 = value.get("input_shape"), _text(value, "sha256")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"an input_shape is a list of whole numbers, not {shape!r}")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"a sha256 has 64 hexadecimal digits, not {sha256[:80]!r}")
    weight = None if value.get("weight") is None else _weight(_dict(value, "weight"))
    timing = Timing.from_dict(value.get("timing"))
    sittings = value.get("sittings_ms")
    if (
        not isinstance(sittings, list)
        or not sittings
        or not all(type(one) in (int, float) and 0 < one < math.inf for one in sittings)
    ):
        raise ValueError("sittings_ms is a list of times")
    return Measured(
        _text(value, "file"), sha256, int(_number(value, "file_bytes")), tuple(shape), timing, weight, tuple(sittings)
    )


def _weight(value: Mapping[str, Any]) -> Weight:
    resident, added, batch = (int(_number(value, name)) for name in ("resident_bytes", "added_bytes", "batch"))
    load_ms, first_ms, images_per_s = (_number(value, name) for name in ("load_ms", "first_ms", "images_per_s"))
    return Weight(resident, added, load_ms, first_ms, images_per_s, batch)


def _conditions(value: Any) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(item is None or type(item) in (str, int, float) for item in value.values()):
        raise ValueError("the conditions are no mapping of texts and numbers")
    return value


def _dict(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{name} is missing")
    return found


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or len(found) > 1000:
        raise ValueError(f"{name} is a text, not {str(found)[:80]!r}")
    return found


def _number(value: Mapping[str, Any], name: str, least: float = 0.0, most: float = math.inf) -> float:
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float) or not least <= found < math.inf or found > most:
        raise ValueError(f"{name} is a number from {least:g} to {most:g}, not {str(found)[:80]!r}")
    return float(found)
