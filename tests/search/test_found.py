"""The outcome of a search in its file: it comes back as it was, or whoever reads it is told what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.card import card
from deploy.commands import best_of
from deploy.targets import Latency
from search.found import Found
from search.report.content import content_of
from supernet.errors import InputError
from supernet.run import Run

ODD: tuple[Any, ...] = (..., None, [], {}, "x", -1, True, [1], ["x"])
"""What a part of the file is replaced by; `...` removes it."""


def parts_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a JSON value; of an arch and of long lists only some."""
    if path:
        yield path
    if isinstance(value, dict):
        for name in value:
            if path[-1:] != ("arch",) or name in {"resolution", "head.width"}:
                yield from parts_of(value[name], (*path, name))
    elif isinstance(value, list):
        for position in range(min(1, len(value))):
            yield from parts_of(value[position], (*path, position))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    result = copy.deepcopy(value)
    place = result
    for step in path[:-1]:
        place = place[step]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return result


def test_an_outcome_comes_back_as_it_was(searched_copy: Run, tiny_found: Found) -> None:
    assert Found.load(searched_copy).as_dict() == tiny_found.as_dict()


@pytest.mark.slow
def test_a_file_of_which_any_part_is_amiss_is_read_right_or_is_an_input_error(
    searched_copy: Run, tiny_found: Found, tiny_bundle: Any
) -> None:
    run, path, whole = searched_copy, searched_copy.path / "search" / "found.json", json.loads(json.dumps(tiny_found.as_dict()))
    manifest, refused = dict(tiny_bundle.manifest), 0
    for part in parts_of(whole):
        for new in ODD:
            path.write_text(json.dumps(changed(whole, part, new)))
            try:
                found = Found.load(run)
            except InputError as error:
                assert "found.json" in str(error) and "\n" not in str(error)
                refused += 1
            else:
                json.dumps(found.as_dict(), allow_nan=False)
            try:
                _, latencies = best_of(run)
            except InputError as error:
                assert "found.json" in str(error) and "\n" not in str(error)
            else:
                card({**manifest, "latency": latencies}, run.space)
    assert refused > 100


@pytest.mark.nightly
def test_a_report_of_a_file_of_which_any_part_is_amiss_is_written_or_is_an_input_error(
    searched_copy: Run, tiny_found: Found
) -> None:  # fmt: skip
    run, path, whole = searched_copy, searched_copy.path / "search" / "found.json", json.loads(json.dumps(tiny_found.as_dict()))
    for number, part in enumerate(parts_of(whole)):
        path.write_text(json.dumps(changed(whole, part, ODD[number % len(ODD)])))
        try:
            content_of(run)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"format": 2}'])
def test_what_is_no_outcome_is_an_input_error(searched_copy: Run, content: str) -> None:
    (searched_copy.path / "search" / "found.json").write_text(content)
    for read in (Found.load, best_of):
        with pytest.raises(InputError, match=r"found\.json"):
            read(searched_copy)


def test_a_run_that_was_not_searched_says_how(run_copy: Run) -> None:
    for read in (Found.load, best_of):
        with pytest.raises(InputError, match="was not searched yet: run `nestling search"):
            read(run_copy)


def test_the_best_child_and_its_latency_go_to_the_export(searched_copy: Run, tiny_found: Found) -> None:
    assert tiny_found.best.latency is not None
    assert best_of(searched_copy) == (tiny_found.best.arch, [tiny_found.best.latency.as_dict()])


def test_a_latency_goes_through_json(tiny_found: Found, tmp_path: Path) -> None:
    latency = tiny_found.best.latency
    assert latency is not None
    assert Latency.from_dict(json.loads(json.dumps(latency.as_dict()))) == latency
