"""The rungs of a race: how many images, and by how many the statistics are."""

from __future__ import annotations

import pytest

from search.rungs import calibration_spent, rungs
from supernet.errors import InputError


@pytest.mark.parametrize(
    ("images", "calibration", "expected"),
    [
        (10_000, 8_192, [(256, 64), (1024, 256), (4096, 1024 + 1024), (10_000, 8192)]),
        (4_000, 1_024, [(256, 64), (1024, 256), (4000, 1024)]),
        (50_000, 131_072, [(256, 64), (1024, 2048), (4096, 8192), (16384, 32768), (50_000, 131_072)]),
        (400, 2_048, [(256, 64), (400, 2048)]),
        (200, 2_048, [(200, 2048)]),
        (200, 30, [(200, 30)]),
        (4_000, 30, [(256, 30), (1024, 30), (4000, 30)]),
    ],
)
def test_a_table_of_rungs(images: int, calibration: int, expected: list[tuple[int, int]]) -> None:
    found = [(rung.images, rung.calibration_images) for rung in rungs(images, calibration)]
    assert found[0] == expected[0] and found[-1] == expected[-1]
    assert [each for each, _ in found] == [each for each, _ in expected]
    counts = [each for _, each in found]
    assert counts == sorted(counts) and all(count % 256 == 0 or count == calibration for count in counts[1:])


def test_statistics_go_on_from_the_rung_below_where_that_had_whole_batches() -> None:
    steps = rungs(4_000, 1_024)
    assert [calibration_spent(steps, rung) for rung in range(3)] == [64, 64 + 256, 64 + 1024]
    assert calibration_spent(rungs(200, 2_048), 0) == 2_048
    assert [calibration_spent(rungs(4_000, 100), rung) for rung in range(3)] == [64, 164, 164]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"calibration_images": 0}, {"first": 0}, {"factor": 1}])
def test_rungs_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="rungs need"):
        rungs(**{"images": 100, "calibration_images": 100, **wrong})
