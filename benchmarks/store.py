"""Rows per second that the search's file takes and gives, by the size of a row's samples.

    python benchmarks/store.py [--quick] [--folder DIR]

Rows are written 100 a transaction into a new file in DIR (the temporary folder), then promoted, and read by another
connection. The last line is JSON; its rates are medians over repeats, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from search.records import Row
from search.store import Store
from supernet.run import environment
from supernet.space import load_space

BATCH = 100
SIZES = {"bitmap": 1_250, "samples": 10_000}
"""Bytes a child: a bit an image for 10,000 images; rank, class and loss of 2,000 to 5,000 images, compressed."""


def rows(count: int, size: int) -> list[Row]:
    space, noise = load_space("attentivenas"), np.random.default_rng(0)
    archs = [arch.to_json() for arch in space.decode(space.sample_codes(count, noise))]
    costs = {"macs": 2.4e8, "params": 6.1e6, "peak_memory_bytes": 3.2e6}
    return [
        Row(f"{i:012x}", arch, "fine", 0, noise.bytes(size), 8 * size, 0.75, costs, 1e12, 0.5) for i, arch in enumerate(archs)
    ]


def rate(count: int, call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return count / (time.perf_counter() - start)


def by_hundreds(store: Store, given: list[Row]) -> None:
    for start in range(0, len(given), BATCH):
        store.add(given[start : start + BATCH])


def once(path: Path, given: list[Row], promoted: list[Row]) -> dict[str, float]:
    count, found = len(given), {}
    with Store.open(path, identity={}) as store:
        found["written"] = rate(count, lambda: by_hundreds(store, given))
        found["promoted"] = rate(count, lambda: by_hundreds(store, promoted))
        with Store.existing(path) as reader:
            found["read"] = rate(count, reader.rows)
            found["read_without_samples"] = rate(count, lambda: reader.rows(samples=False))
            assert reader.rows() == promoted
    found["opened"] = rate(count, lambda: Store.existing(path).close())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    count, repeats = (2_000, 2) if options.quick else (10_000, 7)
    told: dict[str, object] = {"benchmark": "store", "rows": count, "batch": BATCH, "repeats": repeats, "seed": 0}
    for name, size in SIZES.items():
        given = rows(count, size)
        promoted = [replace(row, rung=1) for row in given]
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            taken = [once(Path(folder) / f"{repeat}.sqlite", given, promoted) for repeat in range(repeats)]
            megabytes = (Path(folder) / "0.sqlite").stat().st_size / 1e6
        print(f"{count:,} rows with {size:,} bytes of samples, {BATCH} a transaction: a file of {megabytes:.0f} MB")
        told[f"{name}_bytes"] = size
        for what in taken[0]:
            rates = np.array([each[what] for each in taken])
            print(f"  {what:21} median {np.median(rates):>10,.0f} rows/s, {rates.min():,.0f} to {rates.max():,.0f}")
            key = f"{name}_{what}_rows_per_second"
            told |= {key: round(np.median(rates)), f"{key}_low": round(rates.min()), f"{key}_high": round(rates.max())}
    here = environment()
    print(f"{here['processor']}, SQLite {sqlite3.sqlite_version}")
    print(json.dumps({**told, "processor": here["processor"], "sqlite": sqlite3.sqlite_version}))


if __name__ == "__main__":
    main()
