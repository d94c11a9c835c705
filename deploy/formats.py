"""The other files of a bundle, made of its fp32 model and checked against it on the confirm images of the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from deploy import int8, mobile
from deploy.gate import MOST_LOSS, Images, Outcome, Outputs, agreement, written
from deploy.graph import PIXELS, fixed, from_pixels, halved
from deploy.layers import node_of_layer
from deploy.runtimes.onnxruntime import OnnxRuntime
from deploy.simulate import sensitivities
from deploy.targets import Local, Target
from deploy.verify import TOLERANCE, VerificationError
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.preprocess import Preprocessing

FORMATS = {
    "onnx": "model.onnx, fp32, any batch: always there",
    "fixed": "model.fixed.onnx, one image, all shapes known: what NNAPI and CoreML need",
    "pixels": "model.pixels.onnx, uint8 pixels in, probabilities out: preprocessing is inside",
    "fp16": "model.fp16.onnx, half the size",
    "int8": "model.int8.onnx, quantised, as far as the accuracy gate lets it pass",
    "ort": "model.ort, ONNX Runtime's own format for phones, of model.fixed.onnx (and model.int8.ort)",
}
SENSITIVITY_IMAGES = 32
GATE_IMAGES = 2_048
"""Of the split search_val, that attempts at int8 are judged by; the last word has the confirm split."""


@dataclass(frozen=True)
class Wanted:
    """Which formats, for which device."""

    formats: tuple[str, ...] = ()
    recipe: str = "u8s8"
    """Of int8 (`deploy.int8.RECIPES`)."""
    platform: str = "arm"
    """Of .ort files (`deploy.mobile.PLATFORMS`)."""
    most_loss: float | None = None
    """What the mean score may lose, in its own unit (0.005: half a point); the task's default if left out."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise InputError(f"a format is {', '.join(FORMATS)}, but got {unknown[0][:60]!r}")
        if self.most_loss is not None and not 0 <= self.most_loss < float("inf"):
            raise InputError(f"the most that a score may lose is 0 or more, but got {self.most_loss}")


def wanted(text: str, target: Target | None, most_loss: float | None) -> Wanted:
    """What `text` names, such as "fixed,int8", for a target: int8 as its processor runs it, .ort as its platform needs it.

    Without a target, int8 is for this machine and .ort for phones. Whether another machine has VNNI is not known, so int8 for x86 has
    weights of 7 bits then. Raises `InputError`.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if target is None or not {"int8", "ort"} & set(names):
        return Wanted(names, int8.recipe_here(), most_loss=most_loss)
    machine = str(target.fingerprint()["machine"])
    flags = int8.flags_here() if isinstance(target, Local) else ""
    return Wanted(names, int8.recipe_for(machine, flags), mobile.platform_of(machine), most_loss)


@dataclass(frozen=True)
class Converted:
    """A further file of a bundle: its name, content, and what the manifest says of it."""

    name: str
    data: bytes
    facts: dict[str, Any]


@dataclass
class Converter:
    """Makes other files of a child's fp32 model. `network` is the folded network in evaluation mode, on the CPU."""

    network: nn.Module
    model: onnx.ModelProto
    preprocessing: Preprocessing
    evaluator: Evaluator
    confirm: Images
    judged: Images
    """Of the split search_val: what attempts are judged by."""
    wanted: Wanted
    refused: dict[str, str] = field(default_factory=dict)
    """Formats that were asked for and not made, and why."""
    mobile: dict[str, Any] = field(default_factory=dict)
    """What the checker says of the model of fixed shapes, where it was made."""

    def files(self) -> Iterator[Converted]:
        """All files that were asked for, but those that are refused. Raises `VerificationError` where one is not the child."""
        small: onnx.ModelProto | None = None
        if "fixed" in self.wanted.formats:
            yield self._exact("model.fixed.onnx", self._fixed.SerializeToString(), {"batch": 1})
        if "pixels" in self.wanted.formats:
            yield self._from_pixels()
        if "fp16" in self.wanted.formats:
            yield from self._rounded("model.fp16.onnx", halved(self.model).SerializeToString(), {"precision": "fp16"})
        if "int8" in self.wanted.formats:
            small, how = self._int8()
            if small is not None:
                yield from self._rounded("model.int8.onnx", small.SerializeToString(), how)
        if "ort" in self.wanted.formats:
            facts = {"batch": 1, "platform": self.wanted.platform}
            yield self._exact("model.ort", mobile.to_ort(self._fixed, self.wanted.platform), facts)
            if small is not None and "model.int8.onnx" not in self.refused:
                data = mobile.to_ort(fixed(small), self.wanted.platform)
                yield from self._rounded("model.int8.ort", data, {"precision": "int8", **facts})

    @cached_property
    def plain(self) -> Outcome:
        """What the fp32 model makes of the confirm images."""
        return self.confirm.outcome(session(self.model.SerializeToString()))

    @cached_property
    def _judged(self) -> Outcome:
        return self.judged.outcome(session(self.model.SerializeToString()))

    @cached_property
    def _fixed(self) -> onnx.ModelProto:
        found = fixed(self.model)
        self.mobile = mobile.usability(found)
        return found

    @property
    def most_loss(self) -> float:
        """What the mean score may lose."""
        return MOST_LOSS[self.confirm.task.name] if self.wanted.most_loss is None else self.wanted.most_loss

    # --- files that compute what the fp32 model does ---

    def _exact(self, name: str, data: bytes, facts: dict[str, Any]) -> Converted:
        return self._held(name, data, facts, self.plain, self.confirm.outcome(one_by_one(session(data))))

    def _from_pixels(self) -> Converted:
        classifies, plain = self.plain.outputs.ndim == 2, self.plain.outputs
        model = from_pixels(self.model, self.preprocessing, probabilities=classifies)
        data = model.SerializeToString()
        run = session(data)
        if classifies:
            expected, found = softmax(plain), self.confirm.outcome_of_pixels(run)
        else:
            mean, std = (np.array(each, np.float32) for each in (self.preprocessing.mean, self.preprocessing.std))
            expected = np.clip(
                plain, *((end - each.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1) for end, each in ((0, mean), (1, mean)))
            )
            found = self.confirm.outcome_of_pixels(lambda pixels: ((run(pixels) - mean) / std).transpose(0, 3, 1, 2))
        facts = {"input": {"name": PIXELS, "type": "uint8", "layout": "NHWC"}, "output": model.graph.output[0].name}
        return self._held("model.pixels.onnx", data, facts, Outcome(expected, self.plain.scores), found)

    def _held(self, name: str, data: bytes, facts: dict[str, Any], expected: Outcome, found: Outcome) -> Converted:
        """A file that must compute what the fp32 model does."""
        agreed, scale = agreement(self.confirm, expected, found), float(np.abs(expected.outputs).max())
        if not agreed.difference <= TOLERANCE * max(1.0, scale):
            raise VerificationError(
                f"{name} differs from model.onnx by {agreed.difference:.3g} in an output, where outputs reach {scale:.3g}"
            )
        return Converted(name, data, {"precision": "fp32", **facts, "parity": agreed.as_dict()})

    # --- files that are rounded ---

    def _rounded(self, name: str, data: bytes, facts: dict[str, Any]) -> Iterator[Converted]:
        """A file that may lose a little on the confirm images; where it loses more, none, and the reason in `refused`."""
        run = session(data)
        found = agreement(self.confirm, self.plain, self.confirm.outcome(one_by_one(run) if "batch" in facts else run))
        change, show = found.change, self.confirm.task.show
        if np.isfinite(found.difference) and change.difference >= -self.most_loss:
            yield Converted(name, data, {**facts, "parity": found.as_dict()})
            return
        task = self.confirm.task
        low, mean, high, may = (written(each, task) for each in (change.low, change.difference, change.high, -self.most_loss))
        self.refused[name] = (
            f"on {found.images} confirm images its score is {show(found.score)}, {mean} against fp32 ({low} to {high}), and may "
            f"change by {may}"
        )

    def _int8(self) -> tuple[onnx.ModelProto | None, dict[str, Any]]:
        """The int8 model and how it was made; None with the reason in `refused`."""
        quantiser = int8.Quantiser(self.model, self._calibration, self.wanted.recipe)

        def change(model: onnx.ModelProto) -> Any:
            found = self.judged.outcome(session(model.SerializeToString()))
            return self.judged.task.compare(found.scores, self._judged.scores)

        def confirm(model: onnx.ModelProto) -> Any:
            found = self.confirm.outcome(session(model.SerializeToString()))
            return self.confirm.task.compare(found.scores, self.plain.scores)

        chosen = int8.choose(quantiser, change, confirm, self.most_loss, self._sensitive)
        tried = [each.as_dict() for each in chosen.tried]
        if chosen.model is None or chosen.attempt is None:
            best = max(chosen.tried, key=lambda each: each.change.difference)
            task, confirmed, most = self.confirm.task, best.confirmed, written(self.most_loss, self.confirm.task)[1:]
            self.refused["model.int8.onnx"] = (
                f"none of {len(tried)} ways to quantise it loses at most {most}: the best changes the score by "
                f"{written(best.change.difference, task)} on {len(self._judged.scores)} search_val images"
                + (
                    f", and by {written(confirmed.difference, task)} on {len(self.plain.scores)} confirm images"
                    if confirmed
                    else ""
                )
            )
            return None, {}
        layers = {node: layer for layer, node in self._nodes.items()} if chosen.attempt.kept else {}
        return chosen.model, {
            "precision": "int8", "recipe": self.wanted.recipe, "operators": chosen.attempt.operators,
            "calibration": chosen.attempt.calibration, "calibration_images": sum(map(len, self._calibration)),
            "fp32_layers": [layers[name] for name in chosen.attempt.kept], "tried": tried,
        }  # fmt: skip

    @cached_property
    def _calibration(self) -> list[NDArray[np.float32]]:
        return int8.calibration_batches(self.evaluator.train, self.preprocessing.resolution)

    @cached_property
    def _nodes(self) -> dict[str, str]:
        return node_of_layer(self.network, self.model, self.few)

    @property
    def few(self) -> torch.Tensor:
        """Some training images as the network reads them, (N, C, H, W)."""
        return torch.from_numpy(np.concatenate(self._calibration)[:SENSITIVITY_IMAGES])

    def _sensitive(self) -> Sequence[str]:
        return [self._nodes[layer] for layer, _ in sensitivities(copy.deepcopy(self.network), self.few)]


def session(data: bytes) -> Callable[[Any], Outputs]:
    """ONNX Runtime, on one thread."""
    return OnnxRuntime().load(data)


def one_by_one(run: Callable[[Outputs], Outputs]) -> Callable[[Outputs], Outputs]:
    """A run that takes one image, of many."""
    return lambda images: np.concatenate([run(images[at : at + 1]) for at in range(len(images))])


def softmax(logits: Outputs) -> Outputs:
    """Probabilities, (N, K), of logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Outputs = powers / powers.sum(axis=1, keepdims=True)
    return found
