"""Training recipes: everything that a run's YAML can say, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, StrictInt, model_validator

from supernet import config
from supernet.config import Config, Number
from supernet.errors import InputError
from supernet.schedule import Schedule

Fraction = Annotated[Number, Field(ge=0, le=1)]
Rate = Annotated[Number, Field(ge=0, lt=1)]
Size = Annotated[Number, Field(ge=0, le=1_000_000)]
Count = Annotated[StrictInt, Field(ge=1, le=1_000_000)]


class AugmentConfig(Config):
    """What happens to a training image before it is cropped to the largest resolution."""

    min_area: Annotated[Number, Field(ge=0.01, le=1)] = 1.0
    """Smallest fraction of the area that a random crop keeps."""
    flip: Fraction = 0.0
    """Probability of mirroring left and right."""
    shift: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    """Random shift, as a fraction of the side."""
    rotate_degrees: Annotated[Number, Field(ge=0, le=180)] = 0.0


class DistillationConfig(Config):
    """When the students move from labels to the teacher's soft targets, as fractions of the run. 0 and 0: the paper's rule."""

    start: Fraction = 0.0
    end: Fraction = 0.0
    most: Fraction = 1.0
    """Weight of the soft targets at the end; the rest stays with the labels."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start ({self.start:g}) must not lie after end ({self.end:g}): exchange them")
        return self


UNUSABLE = ("bnb", "fused", "adahessian", "adafactorbv", "cadafactorbv", "kron", "lamb", "clamb")
"""How names begin that timm lists but that do not train here: other packages, second derivatives, state no checkpoint holds."""


def _optimizer(name: str) -> str:
    from timm.optim import list_optimizers

    known = [str(each) for each in list_optimizers() if not str(each).startswith(UNUSABLE)]
    if name not in known:
        hint = config.nearest(name, known) or ", such as sgd or adamw"
        raise ValueError(f"must be the name of an optimizer of timm whose state can be saved{hint}")
    return name


class TrainConfig(Config):
    """A recipe."""

    format: Literal[1] = 1
    name: str = "custom"
    source: str = ""
    epochs: Count
    batch_size: Annotated[StrictInt, Field(ge=2, le=1_000_000)] = 128
    children: Annotated[StrictInt, Field(ge=1, le=64)] = 4
    """Largest, smallest and random ones; their gradients are summed."""
    optimizer: Annotated[str, AfterValidator(_optimizer)] = "sgd"
    learning_rate: Annotated[Number, Field(gt=0)]
    """Peak, for this batch size; nothing is rescaled."""
    momentum: Rate = 0.9
    weight_decay: Size = 1e-4
    """Not applied to biases and norms."""
    warmup_epochs: Size = 1.0
    schedule: Schedule = "cosine"
    floor: Fraction = 0.0
    """Lowest learning rate, as a fraction of the peak."""
    clip_norm: Annotated[Number, Field(gt=0)] | None = None
    """Largest norm of the summed gradient."""
    label_smoothing: Rate = 0.1
    dropout: Rate = 0.0
    drop_path: Rate = 0.0
    distillation: DistillationConfig = DistillationConfig()
    augment: AugmentConfig = AugmentConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: StrictBool = True
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    calibration_images: Annotated[StrictInt, Field(ge=2)] = 2048
    """Training images from which each child's batch-norm statistics are measured."""
    crop: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Fraction of the short side that the central crop keeps when a child is evaluated and deployed."""


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A shipped recipe by name, or a YAML file, with `overrides` (dotted key -> value) applied.

    Raises `InputError` naming file, key and remedy.
    """
    path = config.find("train", name)
    value = config.read(path)
    for key, new in (overrides or {}).items():
        _set(value, key, new)
    return config.parse(TrainConfig, value, str(path) if path.stem != name else f"recipe {name}")


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """`["epochs=3", "augment.flip=0.5"]` as a mapping; values are read as YAML scalars."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"an override is written key=value, such as epochs=10, but got {text!r}")
        try:
            read = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
            raise InputError(f"the value of {text!r} cannot be read: write a number, text or true/false") from error
        if isinstance(read, dict | list):
            raise InputError(f"the value of {text!r} must be a number, text or true/false: write nested keys with dots")
        found[key.strip()] = read
    return found


def _set(value: dict[str, Any], key: str, new: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        value = value.setdefault(part, {})
        if not isinstance(value, dict):
            raise InputError(f"{key}: {part!r} holds no further keys: leave out what follows it")
    value[last] = new
