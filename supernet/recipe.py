"""Training recipes: everything that a run's YAML can say, checked, and whether it may change when a run is taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
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


def _alpha(value: float) -> float:
    if 0 < value < 0.05:
        raise ValueError("must be 0, or at least 0.05 (a Beta distribution of less cannot be drawn from exactly)")
    return value


Alpha = Annotated[Number, Field(ge=0, le=10), AfterValidator(_alpha)]


class OnResume(Enum):
    """What may become of a key when a run is taken up again (`supernet/resume.py`)."""

    MUTABLE = "may be changed"
    EXTENDABLE = "may only grow"
    FROZEN = "stays as it was when the run began"


MUTABLE, EXTENDABLE, FROZEN = OnResume


class AugmentConfig(Config):
    """What happens to a training image (`supernet.data.augment.Augment`)."""

    min_area: Annotated[Number, Field(ge=0.01, le=1)] = 1.0
    """Smallest fraction of the area that a random crop keeps."""
    flip: Fraction = 0.0
    """Probability of mirroring left and right."""
    shift: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    """Random shift, as a fraction of the side."""
    rotate_degrees: Annotated[Number, Field(ge=0, le=180)] = 0.0
    policy: Literal["none", "auto", "auto-cifar", "rand", "trivial"] = "none"
    """AutoAugment (ImageNet's policy or CIFAR's), RandAugment or TrivialAugment."""
    magnitude: Annotated[StrictInt, Field(ge=0, le=30)] = 9
    """Strength of RandAugment."""
    operations: Annotated[StrictInt, Field(ge=1, le=10)] = 2
    """Operations that RandAugment draws for an image."""
    erase: Fraction = 0.0
    """Probability of random erasing."""
    jitter: Fraction = 0.0
    """Strength of the change of brightness, contrast and saturation."""


class MixConfig(Config):
    """Mixing images of a batch, and their labels with them (`supernet.data.mix.Mix`); in groups of `bn_group`, if that is a number."""

    mixup: Alpha = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0: none."""
    cutmix: Alpha = 0.0
    """Alpha of cutmix (Yun et al. 2019); 0: none."""
    probability: Fraction = 1.0
    """Of a group of images being mixed at all."""


class DistillationConfig(Config):
    """When the students move from labels to the teacher's soft targets, as fractions of the run, and how they learn from these.

    start and end 0: the paper's rule.
    """

    start: Fraction = 0.0
    end: Fraction = 0.0
    most: Fraction = 1.0
    """Weight of the soft targets at the end; the rest stays with the labels."""
    kind: Literal["soft", "alpha"] = "soft"
    """Cross entropy to the soft targets, or AlphaNet's adaptive alpha-divergence."""
    temperature: Annotated[Number, Field(ge=0.1, le=100)] = 1.0
    alpha_low: Annotated[Number, Field(ge=-10, le=1)] = -1.0
    alpha_high: Annotated[Number, Field(ge=-10, le=1)] = 1.0
    clip: Annotated[Number, Field(gt=0, le=1e6)] = 5.0
    """Largest importance weight of the alpha-divergence."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start ({self.start:g}) must not lie after end ({self.end:g}): exchange them")
        if self.alpha_low > self.alpha_high:
            raise ValueError(
                f"alpha_low ({self.alpha_low:g}) must not be above alpha_high ({self.alpha_high:g}): exchange them"
            )
        if self.clip < 1 - self.alpha_low:
            raise ValueError(f"clip ({self.clip:g}) must be at least 1 - alpha_low = {1 - self.alpha_low:g}: raise it")
        return self


class SamplingConfig(Config):
    """How the random children are drawn (`supernet.sandwich.Sampling`)."""

    rule: Literal["uniform", "best_up", "worst_up"] = "uniform"
    """Uniform, or, of some candidates of about equal macs, the one with the lowest or the highest loss (AttentiveNAS)."""
    candidates: Annotated[StrictInt, Field(ge=1, le=64)] = 3
    bins: Annotated[StrictInt, Field(ge=1, le=1000)] = 64
    """Bins of macs that candidates are drawn within."""


class GuardConfig(Config):
    """When a run that goes wrong goes back to its last good checkpoint (`supernet/guard.py`)."""

    skips: Annotated[StrictInt, Field(ge=1, le=10_000)] = 10
    """Steps in a row whose loss or gradient is not finite; each of them is skipped."""
    rollbacks: Annotated[StrictInt, Field(ge=0, le=100)] = 3
    """How often a run may go back, each time with its learning rate halved."""


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
    """A recipe. Every key says whether it may change when a run is taken up again (`OnResume`), a nested one for all that it holds."""

    format: Annotated[Literal[1], FROZEN] = 1
    name: Annotated[str, FROZEN] = "custom"
    source: Annotated[str, FROZEN] = ""
    epochs: Annotated[Count, EXTENDABLE]
    """The schedule is stretched when there become more of them."""
    batch_size: Annotated[StrictInt, Field(ge=2, le=1_000_000), FROZEN] = 128
    """Images of a step, over all processes."""
    children: Annotated[StrictInt, Field(ge=1, le=64), FROZEN] = 4
    """Largest, smallest and random ones."""
    sandwich: Annotated[StrictBool, FROZEN] = True
    """False: all children are random, and the first of them teaches (for comparison; the method needs both ends)."""
    reduction: Annotated[Literal["sum", "mean"], FROZEN] = "sum"
    """The gradient of a step is the sum of its children's (BigNAS, all published rates), or their mean: "mean" at a rate r is "sum" at
    r / children for SGD without weight decay."""
    sampling: Annotated[SamplingConfig, FROZEN] = SamplingConfig()
    optimizer: Annotated[str, AfterValidator(_optimizer), FROZEN] = "sgd"
    learning_rate: Annotated[Number, Field(gt=0, le=1e30), MUTABLE]
    """Peak, for this batch size; nothing is rescaled."""
    momentum: Annotated[Rate, FROZEN] = 0.9
    weight_decay: Annotated[Size, MUTABLE] = 1e-4
    decay_all: Annotated[StrictBool, FROZEN] = False
    """Weight decay also for biases and norms."""
    warmup_epochs: Annotated[Size, FROZEN] = 1.0
    schedule: Annotated[Schedule, FROZEN] = "cosine"
    floor: Annotated[Fraction, MUTABLE] = 0.0
    """Lowest learning rate, as a fraction of the peak."""
    clip_norm: Annotated[Annotated[Number, Field(gt=0, le=1e6)] | None, MUTABLE] = None
    """Largest norm of the step's gradient."""
    clip_value: Annotated[Annotated[Number, Field(gt=0, le=1e6)] | None, MUTABLE] = None
    """Largest absolute value of a number in the step's gradient (AttentiveNAS: 1)."""
    ema: Annotated[Annotated[Number, Field(gt=0, lt=1)] | None, FROZEN] = None
    """Decay of the moving average of the weights; children are then taken from the average. It is warmed up (timm's ModelEmaV3)."""
    label_smoothing: Annotated[Rate, FROZEN] = 0.1
    dropout: Annotated[Rate, FROZEN] = 0.0
    drop_path: Annotated[Rate, FROZEN] = 0.0
    regularise: Annotated[Literal["largest", "all"], FROZEN] = "largest"
    """Which children dropout and drop_path hold for (BigNAS: the largest)."""
    distillation: Annotated[DistillationConfig, FROZEN] = DistillationConfig()
    augment: Annotated[AugmentConfig, FROZEN] = AugmentConfig()
    mix: Annotated[MixConfig, FROZEN] = MixConfig()
    repeats: Annotated[StrictInt, Field(ge=1, le=64), FROZEN] = 1
    """Differently augmented copies of an image in a batch (repeated augmentation, Hoffer et al. 2020)."""
    balance: Annotated[Literal["none", "class", "sqrt"], FROZEN] = "none"
    """Draw images so that classes come equally often, or as the square roots of their sizes."""
    skip_unreadable: Annotated[Annotated[Number, Field(ge=0, lt=1)], MUTABLE] = 0.0
    """Fraction of the images that may be unreadable; they are left out and told."""
    bn_group: Annotated[Annotated[StrictInt, Field(ge=2, le=1_000_000)] | Literal["sync"] | None, FROZEN] = None
    """What batch norm takes its statistics over: so many images in a row, those of all processes ("sync"), or all at once."""
    micro_batch: Annotated[Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None, MUTABLE] = None
    """Images that go through a child at once in a process; the step's gradient is gathered over them. None: all."""
    precision: Annotated[Literal["fp32", "bf16"], MUTABLE] = "fp32"
    channels_last: Annotated[StrictBool, MUTABLE] = True
    compile: Annotated[StrictBool, MUTABLE] = False
    """Compile the largest and the smallest child (torch.compile)."""
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63), FROZEN] = 0
    calibration_images: Annotated[StrictInt, Field(ge=2), FROZEN] = 2048
    """Training images from which each child's batch-norm statistics are measured."""
    crop: Annotated[Number, Field(gt=0, le=1), FROZEN] = 1.0
    """Fraction of the short side that the central crop keeps when a child is evaluated and deployed."""
    validate_epochs: Annotated[Annotated[StrictInt, Field(ge=0, le=1_000_000)] | None, MUTABLE] = None
    """Epochs between looks at the largest and smallest child on search-val images. 0: never; None: about twenty looks a run."""
    keep: Annotated[Annotated[StrictInt, Field(ge=1, le=10_000)], MUTABLE] = 2
    """Newest checkpoints that are kept, besides the best."""
    use: Annotated[Literal["last", "best"], MUTABLE] = "last"
    """Which checkpoint the children are taken from: the newest, or the best that was saved (by the looks)."""
    guard: Annotated[GuardConfig, MUTABLE] = GuardConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.bn_group, int):
            for name in ("batch_size", "micro_batch"):
                images = getattr(self, name)
                if images is not None and images % self.bn_group:
                    raise ValueError(f"{name} ({images}) must be a multiple of bn_group ({self.bn_group}): change one of them")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch ({self.micro_batch}): change one"
            )
        if self.compile and not self.sandwich:
            raise ValueError(
                "compile is for the largest and the smallest child, which sandwich: false leaves out: leave out one of them"
            )
        if self.batch_size % self.repeats:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of repeats ({self.repeats}): change one")
        return self


def on_resume(key: str) -> OnResume:
    """The rule of a dotted key: that of its first part."""
    metadata = TrainConfig.model_fields[key.partition(".")[0]].metadata
    return next(rule for rule in metadata if isinstance(rule, OnResume))


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A shipped recipe by name, or a YAML file, with `overrides` (dotted key -> value) applied.

    Raises `InputError` naming file, key and remedy.
    """
    path = config.find("train", name)
    return with_overrides(config.read(path), overrides or {}, str(path) if path.stem != name else f"recipe {name}")


def with_overrides(value: dict[str, Any], overrides: Mapping[str, Any], what: str) -> TrainConfig:
    """The recipe that `value` describes, `overrides` applied. Raises `InputError` that begins with `what`."""
    return config.parse(TrainConfig, overridden(value, overrides), what)


def overridden(value: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, changed in place: `overrides` go by dotted keys. Raises `InputError` where a key leads through what holds no keys."""
    for key, new in overrides.items():
        _set(value, key, new)
    return value


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
