"""How much a search does; the YAML files lie in `configs/search/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from supernet import config
from supernet.config import Config
from supernet.recipe import overridden

Count = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[StrictInt, Field(ge=1)]


class SearchConfig(Config):
    """Settings of a search."""

    format: Literal[1] = 1
    name: str = "custom"
    strategy: str = "predicted"
    """What proposes children, by its name in `search.strategies.registry`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the strategy itself."""
    evaluations: Positive = 128
    """Children that the strategy may ask for."""
    random: Count = 8
    """Random children within the budgets, evaluated first: the baseline of the report."""
    polish: Count = 16
    """Children that a last local search around the best may ask for."""
    batch: Positive = 16
    """Children asked for at a time; they race against one another."""
    first_rung: Positive = 256
    """Images of the first rung of a race."""
    rung_factor: Annotated[StrictInt, Field(ge=2)] = 4
    """How many times as many images each further rung has."""
    race: bool = True
    """False: every child is scored on all images."""
    calibration_images: Annotated[StrictInt, Field(ge=1)] | None = None
    """Training images for the statistics of a child on the last rung; the recipe's number if left out."""
    objective: str | None = None
    """top1, top5, balanced_accuracy or macro_f1; the task's own metric if left out."""
    zones: Annotated[StrictInt, Field(ge=0, le=100)] = 4
    """Parts of the range of costs in which the best children are looked for, beside the budgets: so there is a whole front."""
    precision: Literal["fp32", "int8"] = "fp32"
    """int8: children are scored and timed as they are when quantised; finalists by ONNX Runtime, candidates by a simulation."""
    finalists: Positive = 5
    """Children exported, measured and confirmed at a time."""
    profile_children: Annotated[StrictInt, Field(ge=8)] = 40
    """Children timed for the latency model: half of them to fit it, the others to prove its error."""
    seed: Count = 0


def load_search_config(name: str, overrides: Mapping[str, Any] | None = None) -> SearchConfig:
    """A shipped configuration by name, or a YAML file, with overrides. Raises `InputError`."""
    path = config.find("search", name)
    what = str(path) if path.stem != name else f"search {name}"
    return config.parse(SearchConfig, overridden(config.read(path), overrides or {}), what)
