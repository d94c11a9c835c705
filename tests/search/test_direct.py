"""Where a model is not trusted, candidates are measured before they are evaluated, and only once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.latency import LatencyModel
from deploy.profiling import profile
from search.budget import Budget
from search.direct import Direct
from search.store import Store
from supernet.space import load_space

SPACE = load_space("digits")


def off(model: LatencyModel) -> LatencyModel:
    """The same model, with held-out children that take half as long again."""
    return replace(model, held_out=tuple(replace(child, latency_ms=1.5 * child.predicted_ms) for child in model.held_out))


def test_candidates_that_miss_a_budget_when_measured_are_refused_and_measured_once(fake_target: Any, tmp_path: Path) -> None:
    target = fake_target()
    model = off(profile(SPACE, fake_target(), children=6, held_out=6, blocks=False))
    archs = [SPACE.smallest, SPACE.largest, *(SPACE.sample(np.random.default_rng(seed)) for seed in range(4))]
    budgets = (Budget("latency_ms", 0.02), Budget("params", 1e9))
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        direct = Direct(SPACE, store, budgets, {None: target}, {None: model})
        refused = direct.refused(archs)
        assert SPACE.smallest not in refused
        assert "misses latency_ms<=0.02" in refused[SPACE.largest]
        assert direct.refused(archs) == refused
        again = Direct(SPACE, store, budgets, {None: target}, {None: model})  # a search that is taken up again
        assert again.refused(archs) == refused
    assert target.measured == [len(archs)]


def test_a_trusted_model_needs_no_measuring(fake_target: Any, tmp_path: Path) -> None:
    target = fake_target()
    model = profile(SPACE, fake_target(), children=6, held_out=6, blocks=False)
    assert model.trusted
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        direct = Direct(SPACE, store, (Budget("latency_ms", 0.02),), {None: target}, {None: model})
        assert direct.bounds == [] and direct.refused([SPACE.largest]) == {}
    assert target.measured == []
