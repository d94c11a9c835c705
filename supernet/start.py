"""How a run begins: data opened, space and recipe chosen where they are not given, the directory written; or taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supernet.data.sources import Source, open_source, unreadable
from supernet.errors import InputError
from supernet.recipe import TrainConfig, load_recipe, suggest
from supernet.run import Run
from supernet.space import Space, load_space

MOST_CHECKED = 50_000
"""Image files decoded before a run begins, so that a damaged one is not found after an hour; larger sets are read as they come."""


@dataclass(frozen=True)
class Start:
    """A run, and what was chosen for it and why, to be printed."""

    run: Run
    reasons: tuple[str, ...]


def start(
    data: str, out: Path, *, space: str | None = None, recipe: str | None = None, epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None, root: Path | None = None, download: bool = False, device: str = "cpu",
) -> Start:  # fmt: skip
    """Begin a run. `space` and `recipe` are names or YAML files; what is None is chosen from the data and the device.

    Raises `InputError` for data, space or recipe that cannot be used, before anything is written.
    """
    if (out / "config.json").exists():
        raise InputError(f"{out} holds a run already: continue it with --resume, or choose another --out")
    source = open_source(data, root=root, download=download)
    _check_files(source)
    suggested_space, suggested_recipe, suggested_epochs, reasons = suggest(source.image_size, len(source), device)
    if space is not None:
        suggested_recipe = suggested_recipe if space == suggested_space else _recipe_of(space, suggested_recipe)
    chosen: dict[str, Any] = dict(overrides or {})
    if epochs is not None:
        chosen["epochs"] = epochs
    elif "epochs" not in chosen and recipe is None:
        chosen["epochs"] = suggested_epochs
    made = load_space(space or suggested_space, classes=len(source.classes), in_channels=source.channels)
    config = _at_home_on(device, load_recipe(recipe or suggested_recipe, chosen), "precision" in chosen)
    run = Run.create(out, made, config, source, root=root)
    return Start(run, tuple(_told(run.space, config, source, reasons if space is None and recipe is None else [])))


def resume(out: Path) -> Start:
    """Take up a run as it was configured. Raises `InputError` where there is none, or its data changed."""
    run = Run.open(out)
    _ = run.dataset  # notices data that changed, before anything is computed
    return Start(run, (f"resuming {out}", f"space {run.space.name}, recipe {run.recipe.name}, {run.recipe.epochs} epochs"))


def _recipe_of(space: str, otherwise: str) -> str:
    known = {"digits": "digits", "cifar-mbconv": "cifar", "photo-mbconv": "photo", "attentivenas": "attentivenas"}
    return known.get(space, otherwise)


def _at_home_on(device: str, recipe: TrainConfig, asked: bool) -> TrainConfig:
    """bf16 is slower than fp32 on most CPUs: a recipe's default gives way there, a user's word does not."""
    if device == "cpu" and recipe.precision == "bf16" and not asked:
        return recipe.model_copy(update={"precision": "fp32"})
    return recipe


def _told(space: Space, recipe: TrainConfig, source: Source, reasons: list[str]) -> list[str]:
    counts = f"{len(source)} images, {len(source.classes)} classes, {source.channels} channels, about {source.image_size} px"
    return [
        f"data: {counts}",
        *(reasons or [f"space {space.name}, recipe {recipe.name}"]),
        f"training {recipe.epochs} epochs in batches of {recipe.batch_size} (--epochs, --recipe, --space and --set change this)",
    ]


def _check_files(source: Source) -> None:
    if source.file(0) is None or len(source) > MOST_CHECKED:
        return
    bad = unreadable(source)
    if bad:
        shown = "; ".join(reason for _, reason in bad[:3])
        raise InputError(
            f"every image must be readable, but {len(bad)} of {len(source)} are not ({shown}): repair or remove them"
        )
