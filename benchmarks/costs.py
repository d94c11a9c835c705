"""Archs costed per second by the closed form, in one thread, against the floor: counting blocks arch by arch.

    python benchmarks/costs.py [--quick]

Best of repeated runs in CPU time of the measuring thread, both interleaved. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from supernet.costs import Costs, arch_costs
from supernet.run import environment
from supernet.space import load_space


def seconds(call: object) -> float:
    start = time.thread_time()
    call()  # type: ignore[operator]
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--space", default="attentivenas")
    given = parser.parse_args()
    archs, rounds = (200_000, 5) if given.quick else (1_000_000, 15)
    space = load_space(given.space)
    fill = seconds(lambda: Costs(space))
    costs = Costs(space)
    codes = space.sample_codes(archs, np.random.default_rng(0))
    few = space.decode(codes[:200])
    taken = {"macs": [], "all": [], "one_by_one": []}
    for _ in range(rounds):
        taken["macs"].append(seconds(lambda: costs.macs(codes)))
        taken["all"].append(seconds(lambda: costs.all(codes)))
        taken["one_by_one"].append(seconds(lambda: [arch_costs(space, arch) for arch in few]))
    rates = {name: (200 if name == "one_by_one" else archs) / np.array(times) for name, times in taken.items()}
    for name, rate in rates.items():
        print(
            f"{name:11} median {np.median(rate):>12,.0f} archs/s, {rate.min():,.0f} to {rate.max():,.0f} over {rounds} rounds"
        )
    here = environment()
    print(
        f"{archs:,} archs of {space.name}; tables filled in {fill:.2f} s CPU; {here['processor']}, numpy {here['versions']['numpy']}"
    )
    print(json.dumps({
        "benchmark": "costs", "space": space.name, "archs": archs, "seed": 0, "rounds": rounds,
        "archs_per_second": float(np.median(rates["macs"])), "archs_per_second_low": float(rates["macs"].min()),
        "archs_per_second_high": float(rates["macs"].max()), "archs_per_second_all_metrics": float(np.median(rates["all"])),
        "ratio_to_one_by_one": float(np.median(rates["macs"] / rates["one_by_one"])), "fill_seconds": fill,
        "processor": here["processor"], "versions": here["versions"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
