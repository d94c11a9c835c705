"""How a run begins: data opened, space and recipe chosen where they are not given, the directory written; or taken up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supernet import checkpoint, defaults, durable
from supernet.data.order import batch_size_of
from supernet.data.sources import Source, open_source
from supernet.data.splits import divide
from supernet.distributed import World, processes
from supernet.donor import named, read_donor
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.recipe import FROZEN, TrainConfig, load_recipe, on_resume, with_overrides
from supernet.resume import change
from supernet.run import Run
from supernet.space import Space, load_space
from supernet.warm import fill


@dataclass(frozen=True)
class Start:
    """A run, and what was chosen for it and why, to be printed."""

    run: Run
    reasons: tuple[str, ...]


def start(
    data: str, out: Path, *, space: str | None = None, recipe: str | None = None, epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None, root: Path | None = None, download: bool = False, device: str = "cpu",
    init: str | None = None, check: Callable[[Space], None] = lambda _: None,
) -> Start:  # fmt: skip
    """Begin a run. `space` and `recipe` are names or YAML files; what is None is chosen from the data and the device.

    `init` names the weights to begin with (`supernet.warm.read_donor`). `check` may refuse the space. Raises `InputError` for data,
    space, recipe or weights that cannot be used, before anything is written.
    """
    if (out / "config.json").exists():
        raise InputError(
            f"{out} holds a run already: continue it with `nestling train --resume --out {out}`, or choose another --out"
        )
    durable.refuse_unwritable(out)
    source = open_source(data, root=root, download=download)
    name, why = (space, "as asked") if space else defaults.space_for(source.image_size, len(source), device)
    made = load_space(name, classes=len(source.classes), in_channels=source.channels)
    given = dict(overrides or {}) | ({"epochs": epochs} if epochs is not None else {})
    config = _at_home_on(device, load_recipe(recipe or defaults.recipe_for(made.name), given), "precision" in given)
    if recipe is None and "epochs" not in given:
        config = config.model_copy(update={"epochs": defaults.epochs_for(made, _to_train(source), device, config.children)})
    check(made)
    _refuse_uneven(source, config)
    donor = read_donor(made, init) if init else None
    taken = fill(Supernet(made), donor).told() if donor else []  # what does not fit is an error before anything is written
    run = Run.create(out, made, config, source, root=root, donor=donor)
    return Start(run, (*_told(run, why), *taken))


def resume(out: Path, changes: Mapping[str, Any] | None = None) -> Start:
    """Take up a run, with `changes` (dotted key -> value) to what its recipe allows to change.

    Raises `InputError` where there is no run, its data changed, or a key may not change so.
    """
    run = Run.open(out)
    _ = run.dataset  # notices data that changed, before anything is computed
    run, told = change(run, changes or {})
    return Start(
        run,
        (
            f"resuming {out}",
            *_damaged(run),
            f"space {run.space.name}, recipe {run.recipe.name}, {run.recipe.epochs} epochs",
            *told,
        ),
    )


def _damaged(run: Run) -> list[str]:
    """What is wrong with the checkpoints that are newer than the one that is taken up; half-written ones are no news."""
    whole = checkpoint.latest(run.checkpoints)
    newer = [path for path in checkpoint.all_of(run.checkpoints) if whole is not None and path > whole]
    return [
        f"{path.name} is damaged ({checkpoint.verify(path)}): going back to {whole.name}"
        for path in newer
        if whole is not None and (path / "manifest.json").exists()
    ]


def together(world: World, out: Path, begin: Callable[[], Start]) -> Start:
    """Begin or take up the run `out` in one process of a job, and open it in the others.

    Where it cannot be begun, the main process raises `InputError` or `OSError`, which says why, and the others end without a word
    (`SystemExit`, code 2). `out` lies where every process can read it.
    """
    begun, error = None, None
    if world.main:
        try:
            begun = begin()
        except (InputError, OSError) as raised:
            error = raised
    begins = world.broadcast(error is None)
    if error:
        raise error
    if not begins:
        raise SystemExit(2)
    return begun or Start(Run.open(out), ())


def refuse_other(
    run: Run, data: str, *, space: str | None = None, recipe: str | None = None, init: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Raise `InputError` where a run that is taken up was begun with other data, space, recipe or weights than are asked for now."""
    same_data = run.data["name"] in {data, str(Path(data).expanduser().resolve())}
    same_space = (
        space is None or load_space(space, classes=len(run.classes), in_channels=run.data["channels"]).key == run.space.key
    )
    same_recipe = recipe is None or _frozen(load_recipe(recipe, overrides)) == _frozen(run.recipe)
    same_init = init is None or (run.init or {}).get("source") == named(init)
    if not (same_data and same_space and same_recipe and same_init):
        raise InputError(f"{run.path} holds a run of other data, space, recipe or initial weights: choose another --out, or leave "
                         "these options out")  # fmt: skip


def refuse_changes(run: Run, changes: Mapping[str, Any]) -> None:
    """Raise `InputError` where the recipe of a run differs from what is asked for now (dotted key -> value)."""
    asked = with_overrides(run.recipe.model_dump(mode="json"), changes, f"recipe of {run.path}")
    for key in changes:
        if _value(asked, key) != _value(run.recipe, key):
            raise InputError(
                f"{run.path} is continued as it was configured ({key} is {_value(run.recipe, key)!r}): leave this out"
            )


def _frozen(recipe: TrainConfig) -> dict[str, Any]:
    """What of a recipe stays as it was when a run is taken up."""
    return {key: value for key, value in recipe.model_dump().items() if on_resume(key) is FROZEN}


def _value(recipe: TrainConfig, key: str) -> Any:
    """The value of a recipe under a dotted key; None where there is none."""
    value: Any = recipe.model_dump()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _to_train(source: Source) -> int:
    """How many images the train split will have (whatever the seed)."""
    return len(divide(source, seed=0).train)


def _refuse_uneven(source: Source, recipe: TrainConfig) -> None:
    """Batches of a small data set are smaller than the recipe's: refuse pieces that do not divide them before a run is made."""
    batch = batch_size_of(_to_train(source), batch_size=recipe.batch_size, repeats=recipe.repeats, ranks=processes())
    for name, size in (("bn_group", recipe.bn_group), ("micro_batch", recipe.micro_batch)):
        if isinstance(size, int) and batch // processes() % size:
            raise InputError(f"{name} ({size}) must divide the {batch // processes()} images of a step in each of {processes()} "
                             f"processes ({batch} in all, of {_to_train(source)} to train): set it or batch_size")  # fmt: skip


def _at_home_on(device: str, recipe: TrainConfig, asked: bool) -> TrainConfig:
    """bf16 is slower than fp32 on most CPUs: a recipe's default gives way there, a user's word does not."""
    if device == "cpu" and recipe.precision == "bf16" and not asked:
        return recipe.model_copy(update={"precision": "fp32"})
    return recipe


def _told(run: Run, why: str) -> list[str]:
    source, recipe, train = run.source, run.recipe, len(run.dataset.splits.train)
    classifies = run.task.name == "classification"
    batch = batch_size_of(train, batch_size=recipe.batch_size, repeats=recipe.repeats, ranks=processes())
    macs = defaults.training_macs(run.space, recipe.children) * (train // batch * batch) * recipe.epochs
    fewer = [f"a step has {batch} images, not the recipe's {recipe.batch_size}: there are {train} to train on; learning_rate "
             f"{recipe.learning_rate:g} is meant for {recipe.batch_size}"] if batch != recipe.batch_size else []  # fmt: skip
    left_out = run.dataset.splits.left_out
    unread = [f"{len(left_out)} images cannot be read and are left out (splits.json lists them), such as {left_out[0].identity}: "
              f"{left_out[0].reason}"] if left_out else []  # fmt: skip
    return [
        f"data: {len(source)} images ({train} to train), {len(source.classes)} classes, {source.channels} channels, "
        f"about {source.image_size} px",
        *unread,
        f"space {run.space.name}: {why}" + ("" if classifies else f"; it learns {run.task.name}, measured by {run.task.title}"),
        *fewer,
        f"recipe {recipe.name}: {recipe.epochs} epochs in batches of {batch}, {macs:.2g} multiply-accumulates in all",
        "(--space, --recipe, --epochs and --set change this)",
    ]
