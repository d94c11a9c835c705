"""Taking up a run with changes: which keys of its recipe may change, and the record of those that did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from supernet import checkpoint, config, durable
from supernet.errors import InputError
from supernet.recipe import OnResume, TrainConfig, on_resume
from supernet.run import Run


def change(run: Run, changes: Mapping[str, Any]) -> tuple[Run, tuple[str, ...]]:
    """The run with `changes` (dotted key -> value) made to its recipe and recorded in its config, and a line on each of them.

    Values that are as they were change nothing. Raises `InputError` naming the key that may not change so, before anything is
    written, and where another process trains the run.
    """
    recipe = run.recipe.model_dump(mode="json")
    before = {key: _replace(recipe, key, new) for key, new in changes.items()}
    checked = config.parse(TrainConfig, recipe, f"recipe of {run.path}")
    after = checked.model_dump(mode="json")  # as the recipe reads it: "1e-3" is 0.001
    made = [(key, old, new) for key, old in before.items() if (new := _at(after, key)) != old]
    for key, old, new in made:
        _allow(run, key, old, new)
    if not made:
        return run, ()
    with durable.locked(run.path / "train.lock", f"the run {run.path}"):
        newest = checkpoint.latest(run.checkpoints)
        step = checkpoint.step_of(newest) if newest is not None else 0
        value = json.loads((run.path / "config.json").read_text())
        value["recipe"] = checked.model_dump(mode="json")
        value.setdefault("changes", []).extend({"step": step, "key": key, "from": old, "to": new} for key, old, new in made)
        durable.write_json(run.path / "config.json", value)
    return Run.open(run.path), tuple(f"{key}: {old} until now, {new} from step {step}" for key, old, new in made)


def _replace(recipe: dict[str, Any], key: str, new: Any) -> Any:
    """Set a dotted key; gives what it was."""
    *path, last = key.split(".")
    place: Any = recipe
    for part in path:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        known = sorted(place) if isinstance(place, dict) else sorted(recipe)
        raise InputError(f"{key}: unknown key{config.nearest(last, known) or f'; known are {known}'}")
    old, place[last] = place[last], new
    return old


def _at(recipe: Mapping[str, Any], key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[part]
    return value


def _allow(run: Run, key: str, old: Any, new: Any) -> None:
    rule = on_resume(key)
    if rule is OnResume.FROZEN:
        raise InputError(f"{key} {rule.value}: it is {old!r} in {run.path}; leave it out, or start a new run with {new!r}")
    if rule is OnResume.EXTENDABLE and new < old:
        raise InputError(f"{key} {rule.value} when a run is taken up: it is {old!r} in {run.path}, and {new!r} is less")
