"""The device and what a process does with its memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FAULTS = """
import json, resource, sys
from supernet.device import keep_memory
kept = keep_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(32 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(json.dumps([kept, faults()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_given_back_and_cleared_again() -> None:
    def of(how: str) -> tuple[bool | None, int]:
        found = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        kept, faults = json.loads(found.stdout)
        return kept, faults

    kept, faults = of("keep")
    if not kept:
        pytest.skip("this C library has no mallopt")
    pages = 20 * 32 * 2**20 // 4096
    assert faults < pages / 100
    assert of("leave")[1] > 20 * faults  # with huge pages a fault clears many pages
