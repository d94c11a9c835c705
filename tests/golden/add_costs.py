"""Add new spaces and new metrics to costs.json: `python -m tests.golden.add_costs`. Numbers that are there are never changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from supernet import config
from supernet.costs import arch_costs
from supernet.recount import recount
from supernet.space import load_space

PATH = Path(__file__).parent / "costs.json"


def complete(name: str, golden: dict[str, Any]) -> None:
    """Add the metrics that the rows of a space do not have yet."""
    space = load_space(name)
    for row in golden["archs"]:
        arch = space.arch(dict(zip(golden["dimensions"], row["choices"], strict=True)))
        row |= {metric: value for metric, value in arch_costs(space, arch).items() if metric not in row}


def main() -> None:
    table = json.loads(PATH.read_text())
    for name in config.names("spaces"):
        if name in table:
            complete(name, table[name])
            continue
        space, rng = load_space(name), np.random.default_rng([2003, 11142])
        archs = {"smallest": space.smallest, "largest": space.largest}
        archs |= {f"random {number}": space.sample(rng) for number in range(3)} if space.size > 1 else {}
        rows = []
        for label, arch in archs.items():
            costs = arch_costs(space, arch)
            assert recount(space, arch) == {metric: costs[metric] for metric in ("macs", "params")}, (
                name,
                label,
            )  # fvcore agrees
            rows.append({"name": label, "choices": [choice for _, choice in arch], **costs})
        table[name] = {"dimensions": [dimension.name for dimension in space.dimensions], "archs": rows}
        print(name, rows[0]["macs"], rows[1]["macs"])
    PATH.write_text(
        json.dumps(dict(sorted(table.items())), indent=None).replace("}, {", "},\n{").replace('"archs": [', '"archs": [\n')
        + "\n"
    )


if __name__ == "__main__":
    main()
