"""int8 models: static quantisation by ONNX Runtime, as much of the network as an accuracy gate lets pass.

Ranges come from training images. What is tried, in this order, until the gate holds: all operators, then weighted layers alone, each
with the ranges' ends and with percentiles of what was seen; then weighted layers without the 1, 2, 4, ... most sensitive ones, which
stay in fp32 (sensitivities are measured: `deploy/simulate.py`).
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploy.graph import forget_shapes, quiet
from deploy.layers import OPERATORS
from supernet.data.dataset import SplitImages
from supernet.errors import InputError
from supernet.task import Comparison

RECIPES: dict[str, tuple[str, bool]] = {"u8s8": ("QUInt8", False), "u8s7": ("QUInt8", True), "s8s8": ("QInt8", False)}
"""By name: type of activations, and whether weights have 7 bits (their products overflow on processors without VNNI)."""
CALIBRATIONS = ("minmax", "percentile")
PERCENTILE = 99.99
CALIBRATION_IMAGES, BATCH = 256, 32


def recipe_for(machine: str, flags: str = "") -> str:
    """The recipe for a processor: `machine` as `platform.machine` says it, `flags` as Linux lists its instructions (x86).

    Where they are not known, 7 bits: right on every x86, if a little coarser.
    """
    if machine.lower() in ("x86_64", "amd64", "x86", "i386", "i686"):
        return "u8s8" if "vnni" in flags else "u8s7"
    return "s8s8"


def flags_here() -> str:
    """What Linux says that this processor knows; nothing where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.startswith("flags")), "")


def recipe_here() -> str:
    """The recipe for this machine."""
    return recipe_for(platform.machine(), flags_here())


def calibration_batches(train: SplitImages, resolution: int) -> list[NDArray[np.float32]]:
    """Training images as a child of that resolution reads them, each batch of shape (n, C, H, W)."""
    pixels, prepared = train.pixels(resolution, CALIBRATION_IMAGES), train.preprocessing(resolution)
    return [prepared.normalise(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]


@dataclass(frozen=True, slots=True)
class Attempt:
    """How much is quantised, and by which ranges."""

    operators: str = "all"
    """all, or weighted: convolutions and products with weights."""
    calibration: str = "minmax"
    kept: tuple[str, ...] = ()
    """Names of operators that stay in fp32."""


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt, and the change of the score that it made (negative: worse); on the confirm images, if it came so far."""

    attempt: Attempt
    change: Comparison
    confirmed: Comparison | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        change = self.change
        return {"operators": self.attempt.operators, "calibration": self.attempt.calibration, "fp32_layers": len(self.attempt.kept),
                "change": change.difference, "low": change.low, "high": change.high,
                **({"confirm_change": self.confirmed.difference} if self.confirmed else {})}  # fmt: skip


class Quantiser:
    """Makes int8 copies of one exported fp32 model. `batches` are inputs of training images, each of shape (N, C, H, W)."""

    def __init__(self, model: onnx.ModelProto, batches: Sequence[NDArray[np.float32]], recipe: str) -> None:
        if recipe not in RECIPES:
            raise InputError(f"an int8 recipe is {', '.join(RECIPES)}, but got {recipe!r}")
        if not batches:
            raise InputError("int8 needs ranges from at least one training image, but there is none: give more images")
        self.model, self.batches, self.recipe = model, batches, recipe
        self._known: dict[str, Any] = {}

    def __call__(self, attempt: Attempt) -> onnx.ModelProto:
        """QDQ, weights per channel."""
        with quiet():
            from onnxruntime.quantization import QuantType
            from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
            from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

            activations, reduce_range = RECIPES[self.recipe]
            every = attempt.operators == "all"
            quantizer = QDQQuantizer(
                onnx.shape_inference.infer_shapes(self.model), per_channel=True, reduce_range=reduce_range,
                weight_qType=QuantType.QInt8, activation_qType=QuantType[activations],
                tensors_range=self._ranges(attempt.calibration), nodes_to_quantize=[], nodes_to_exclude=list(attempt.kept),
                op_types_to_quantize=[*{*QLinearOpsRegistry, *QDQRegistry}] if every else list(OPERATORS),
                extra_options={} if every else {"MatMulConstBOnly": True},
            )  # fmt: skip
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            found: onnx.ModelProto = quantizer.model.model
        forget_shapes(found)
        found.producer_name = "nestling"
        onnx.checker.check_model(found)
        return found

    def _ranges(self, calibration: str) -> Any:
        if calibration not in self._known:
            from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

            method = CalibrationMethod.Percentile if calibration == "percentile" else CalibrationMethod.MinMax
            options = {"percentile": PERCENTILE, "symmetric": False} if calibration == "percentile" else {}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "fp32.onnx"
                onnx.save(self.model, path)
                calibrator = create_calibrator(
                    path,
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=method,
                    extra_options=options,
                )
                for batch in self.batches:  # one by one: it would hold all their activations
                    calibrator.collect_data(_Reader(self._input, batch))
                self._known[calibration] = calibrator.compute_data()
        return self._known[calibration]

    @cached_property
    def _input(self) -> str:
        return str(self.model.graph.input[0].name)


class _Reader:
    """One batch, as ONNX Runtime's calibration reads it."""

    def __init__(self, name: str, batch: NDArray[np.float32]) -> None:
        self._left = [{name: batch}]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return self._left.pop() if self._left else None

    def __iter__(self) -> Iterator[dict[str, NDArray[np.float32]]]:
        return iter(self._left)


@dataclass(frozen=True, slots=True)
class Choice:
    """The first attempt that the gate let pass, with its model; None of both where none did. All that was tried."""

    model: onnx.ModelProto | None
    attempt: Attempt | None
    tried: tuple[Tried, ...]


def choose(
    make: Callable[[Attempt], onnx.ModelProto], change: Callable[[onnx.ModelProto], Comparison],
    confirm: Callable[[onnx.ModelProto], Comparison], most_loss: float, sensitive: Callable[[], Sequence[str]],
) -> Choice:  # fmt: skip
    """The first attempt whose mean score is at most `most_loss` below that of fp32, on the same images.

    `change` is int8 less fp32 on images to choose by; what passes there must pass by `confirm` too. `sensitive` names operators, the
    most sensitive first; at most half of them stay in fp32.
    """
    tried: list[Tried] = []
    for attempt in _attempts(tried, sensitive):
        model = make(attempt)
        tried.append(Tried(attempt, change(model)))
        if tried[-1].change.difference < -most_loss:
            continue
        tried[-1] = replace(tried[-1], confirmed=(confirmed := confirm(model)))
        if confirmed.difference >= -most_loss:
            return Choice(model, attempt, tuple(tried))
    return Choice(None, None, tuple(tried))


def _attempts(tried: Sequence[Tried], sensitive: Callable[[], Sequence[str]]) -> Iterator[Attempt]:
    """What to try next, after what was tried."""
    for operators in ("all", "weighted"):
        yield from (Attempt(operators, calibration) for calibration in CALIBRATIONS)
    best = max((each for each in tried if each.attempt.operators == "weighted"), key=lambda each: each.change.difference)
    names, count = sensitive(), 1
    while count <= len(names) // 2:
        yield Attempt("weighted", best.attempt.calibration, tuple(names[:count]))
        count *= 2
