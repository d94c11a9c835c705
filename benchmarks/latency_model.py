"""How well latencies are foretold: the table of blocks against three rivals, on whole children that none of them saw.

    python benchmarks/latency_model.py [--spaces attentivenas ofa-resnet50] [--target local] [--precision fp32] [--quick]

For every space: all distinct blocks and 20 whole children are timed on the target, in mixed order, then 40 other children are foretold.
Rivals, fitted to the same 20 children: macs alone (a line), operators' numbers, macs and elements moved (coefficients not negative),
and a line through the smallest and the largest child (what `nvidia-modelopt` does). `--repeat` measures everything twice, some time
apart, and tells how far the two models' predictions, and two measurements of one child, are from one another. Minutes are those of the
measurement. Intervals: bootstrap over held-out children. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from deploy.fit import fit, predicted
from deploy.latency import LatencyModel
from deploy.places import parse_target
from deploy.profiling import columns_of, profile
from deploy.targets import Target
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.run import environment
from supernet.space import Space, load_space

SPACES = ("attentivenas", "ofa-resnet50")
HELD_OUT = 40


def errors(foretold: NDArray[Any], measured: NDArray[Any]) -> dict[str, float]:
    """Mean and worst relative error with the mean's interval, and the rank correlation."""
    off = np.abs(foretold / measured - 1)
    drawn = np.random.default_rng(0).choice(off, (2_000, len(off))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mape": float(off.mean()), "mape_low": float(low), "mape_high": float(high), "worst": float(off.max()),
            "spearman": float(spearmanr(foretold, measured).statistic)}  # fmt: skip


def rivals(space: Space, model: LatencyModel) -> dict[str, NDArray[np.float64]]:
    """What each rival foretells of the held-out children, in ms."""
    known, others = archs_of(space, model, "fitted"), archs_of(space, model, "held_out")
    times, costs = np.array([child.latency_ms for child in model.fitted]), Costs(space)
    macs, wanted = (costs.macs(space.encode(archs)).astype(float) for archs in (known, others))
    slope, offset = np.polyfit(macs, times, 1, w=1 / times)
    steep = (times[1] - times[0]) / (macs[1] - macs[0])  # the first two are the smallest and the largest
    operators = fit(columns_of(space, known, {}), times)
    return {
        "macs only": slope * wanted + offset,
        "operators": predicted(operators, columns_of(space, others, {})),
        "interpolation": times[0] + steep * (wanted - macs[0]),
    }


def archs_of(space: Space, model: LatencyModel, part: str) -> list[Arch]:
    return [space.arch(dict(child.choices), part) for child in getattr(model, part)]


def measured(
    space: Space, target: Target, held_out: int, children: int, log: Path | None = None
) -> tuple[LatencyModel, dict[str, dict[str, float]]]:
    """The model, and the errors of all four."""
    model = profile(space, target, children=children, held_out=held_out, progress=lambda text: None, log=log)
    truth = np.array([child.latency_ms for child in model.held_out])
    own = np.array([child.predicted_ms for child in model.held_out])
    rows = {"blocks": errors(own, truth), **{name: errors(each, truth) for name, each in rivals(space, model).items()}}
    return model, rows


def repeated(space: Space, target: Target, model: LatencyModel, held_out: int, children: int) -> dict[str, float]:
    """How far a second measurement is from the first: of predictions for 1,000 archs, and of the same whole children."""
    other, _ = measured(space, target, held_out, children)
    codes, costs = space.sample_codes(1_000, np.random.default_rng(1)), Costs(space)
    ratio = other.on(costs)(codes) / model.on(costs)(codes)
    whole = np.array([b.latency_ms / a.latency_ms for a, b in zip(model.held_out, other.held_out, strict=True)])
    pairs = {"predictions": ratio, "predictions_scaled": ratio / np.median(ratio), "children": whole,
             "children_scaled": whole / np.median(whole)}  # fmt: skip
    return {name: float(np.abs(each - 1).mean()) for name, each in pairs.items()}


def show(name: str, model: LatencyModel, rows: Mapping[str, Mapping[str, float]]) -> None:
    times = [child.latency_ms for child in model.held_out]
    print(f"\n{name}: {len(model.blocks)} blocks and {len(model.fitted)} children in {model.minutes:.1f} minutes; the speed "
          f"changed by a factor of {model.drift:.2f}; intervals of {model.spread:.1%}; {len(model.held_out)} held-out children of "
          f"{min(times):.3g} to {max(times):.3g} ms")  # fmt: skip
    used = {key: round(value, 9) for key, value in model.coefficients.items() if value}
    print(
        f"coefficients (ms): {used}; the predicted interval is -{1 - model.lower_factor:.1%} to +{model.upper_factor - 1:.1%}"
    )
    for rival, row in rows.items():
        print(f"  {rival:<14} MAPE {row['mape']:.2%} ({row['mape_low']:.2%} to {row['mape_high']:.2%}), "
              f"worst {row['worst']:.1%}, Spearman {row['spearman']:.4f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES))
    parser.add_argument("--target", default="local")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--repeat", action="store_true", help="measure twice")
    parser.add_argument("--logs", type=Path, help="a folder for what was timed, to go on from")
    parser.add_argument("--quick", action="store_true", help="one small space, 10 children held out")
    given = parser.parse_args()
    spaces, children, held_out = (["cifar-resnet"], 10, 10) if given.quick else (given.spaces, 20, HELD_OUT)
    target = parse_target(given.target, precision=given.precision)
    print(f"{target.fingerprint()}; torch {environment()['versions']['torch']}; seed 0")
    found: dict[str, Any] = {}
    for name in spaces:
        space = load_space(name)
        if given.logs:
            given.logs.mkdir(parents=True, exist_ok=True)
        log = given.logs / f"{name}-{target.name}.log" if given.logs else None
        model, rows = measured(space, target, held_out, children, log)
        show(name, model, rows)
        found[name] = {**rows.pop("blocks"), "held_out": len(model.held_out), "minutes": model.minutes, "drift": model.drift,
                       "blocks": len(model.blocks), "rivals": rows}  # fmt: skip
        if given.repeat:
            found[name]["repeat"] = repeated(space, target, model, held_out, children)
            print("  a second measurement differs by", {key: f"{value:.2%}" for key, value in found[name]["repeat"].items()})
    print(json.dumps({"benchmark": "latency_model", "target": target.name, **found}))


if __name__ == "__main__":
    main()
