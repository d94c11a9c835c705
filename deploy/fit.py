"""Coefficients of a latency model: from what blocks take alone, or from operators alone, to what few whole children take.

All errors are relative. What the table of blocks says is the starting point and few children can only correct it: coefficients are
drawn towards "the sum of the blocks and nothing else" (ridge regression), as hard as leaving children out shows to be best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""How hard coefficients are drawn to their starting point, in parts of the columns' own sums of squares."""
SIMPLER = 0.9
"""More columns are taken only where they make the error on left-out children this much smaller."""
BASE = ("constant", "block_ms", "nodes", "blocks")
"""A block timed alone also takes a call of the runtime, which a child takes once: hence their number."""
START = {"block_ms": 1.0}


def fit(columns: Mapping[str, Floats], times: Floats) -> dict[str, float]:
    """Coefficients by column name, from what whole children have of each column and take in ms, all of shape (children,).

    Of several sets of columns, from the simplest on, the one that does well on children left out: with a column "block_ms" sums of
    the table, then macs alone, then all operators (these two with no coefficient below 0).
    """
    operators = [name for name in columns if name not in (*BASE[1:], "macs")]
    sums = [BASE[:2], BASE, (*BASE, *operators[1:])] if "block_ms" in columns else []
    found, least = {"constant": 0.0}, np.inf
    for names, how in [*((names, _drawn) for names in sums), (("constant", "macs"), _not_negative), (operators, _not_negative)]:
        coefficients, error = how(names, columns, times)
        if error < SIMPLER * least:
            found, least = coefficients, error
    return found


def predicted(coefficients: Mapping[str, float], columns: Mapping[str, Floats]) -> Floats:
    """What coefficients foretell for children with these columns, shape (children,)."""
    return np.asarray(sum((value * columns[name] for name, value in coefficients.items()), np.zeros(len(columns["constant"]))))


def _drawn(names: Sequence[str], columns: Mapping[str, Floats], times: Floats) -> tuple[dict[str, float], float]:
    """Ridge regression towards `START`, and the mean relative error on children left out one at a time."""
    design = np.stack([columns[name] / times for name in names], axis=1)
    start = np.array([START.get(name, 0.0) for name in names])
    scale = np.sqrt(np.maximum((design**2).sum(axis=0), 1e-30))
    scaled, missing = design / scale, 1 - design @ start
    best, least = start, np.inf
    for ridge in RIDGES:
        inverse = np.linalg.inv(scaled.T @ scaled + ridge * np.eye(len(names)))
        moved = inverse @ scaled.T @ missing
        leverage = np.minimum(np.einsum("ij,jk,ik->i", scaled, inverse, scaled), 0.999)
        error = float(np.abs((missing - scaled @ moved) / (1 - leverage)).mean())
        if error < least:
            best, least = start + moved / scale, error
    return dict(zip(names, map(float, best), strict=True)), least


def _not_negative(names: Sequence[str], columns: Mapping[str, Floats], times: Floats) -> tuple[dict[str, float], float]:
    """Coefficients >= 0 that minimise the sum of squared relative errors, and the error as that of `_drawn`."""
    design = np.stack([columns[name] / times for name in names], axis=1)
    scale = np.maximum(design.max(axis=0), 1e-30)
    errors = []
    for out in range(len(times) if len(times) > 1 else 0):
        keep = np.arange(len(times)) != out
        errors.append(abs(design[out] / scale @ nnls(design[keep] / scale, np.ones(keep.sum()))[0] - 1))
    found = nnls(design / scale, np.ones(len(times)))[0] / scale
    return dict(zip(names, map(float, found), strict=True)), float(np.mean(errors)) if errors else 0.0
