"""Runs a kit (`deploy/kit.py`): times the models that it holds on the machine where it is run, and writes `results.json`.

This file travels in the kit: it needs Python 3.9, numpy and the runtime, nothing else of Nestling but `runner.py` and `timing.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from typing import Any

from deploy import runner


def kit(path: str) -> None:
    """Time what a kit holds (a zip, or the folder that it was unpacked to); `results.json` is written beside it, and kept up.

    What `results.json` holds of the same machine already is not timed again.
    """
    read = zipfile.ZipFile(path).read if zipfile.is_zipfile(path) else lambda name: _file(os.path.join(path, name))  # noqa: PTH118
    folder = os.path.dirname(os.path.abspath(path)) if zipfile.is_zipfile(path) else path  # noqa: PTH100, PTH120
    job = json.loads(read("job.json"))
    if job.get("format") != runner.FORMAT:
        raise runner.Refused("format", f"this kit has format {job.get('format')!r}, its runner reads {runner.FORMAT}")
    out = os.path.join(folder, "results.json")  # noqa: PTH118
    here = runner.fingerprint(job["runtime"])
    results = {
        "format": runner.FORMAT,
        "job": job["hash"],
        "fingerprint": here,
        "conditions_before": runner.conditions(),
        "timings": {},
    }
    known = _known_results(out, results)
    results["timings"] = known
    left = [at for at in range(len(job["models"])) if str(at) not in known]
    print(f"{len(job['models'])} models, {len(known)} timed already; {here['processor']}, {here['runtime']}")

    def model(at: int) -> bytes:
        data = read(job["models"][left[at]]["file"])
        if hashlib.sha256(data).hexdigest() != job["models"][left[at]]["sha256"]:
            raise runner.Refused("model", "{} is damaged: unpack the kit anew".format(job["models"][left[at]]["file"]))
        return bytes(data)

    part = dict(job, models=[job["models"][at] for at in left])
    for answer in runner.timed(part, model):
        known[str(left[answer["index"]])] = answer["timing"]
        results["conditions_after"] = runner.conditions()
        _replace(out, json.dumps(results, allow_nan=False).encode())
        print(f"\r{len(known)} of {len(job['models'])}", end="", flush=True)
    _replace(out, json.dumps(results, allow_nan=False).encode())
    print(f"\n{out}: bring this file back, then nestling profile ... --import {os.path.basename(out)}")  # noqa: PTH119


def _known_results(path: str, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            found = json.load(file)
        same = all(found.get(name) == wanted[name] for name in ("format", "job", "fingerprint"))
        return dict(found["timings"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _replace(path: str, data: bytes) -> None:
    with open(path + ".part", "wb") as file:  # noqa: PTH123
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)  # noqa: PTH105


def _file(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read()


def main(path: str) -> int:
    """Run the kit at `path`; what cannot be done ends in a line."""
    runner.quiet()
    try:
        kit(path)
    except (runner.Refused, OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: run it again, it goes on from here", file=sys.stderr)
        return 130
    return 0
