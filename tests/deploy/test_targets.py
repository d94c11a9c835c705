"""What targets share: what is timed by which clock, under which name it is filed, and what becomes of a connection that breaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from deploy import targets
from deploy.far import Broken
from deploy.probe import probe
from deploy.targets import TRIES, Latency, Local, Machine, Model, differing
from deploy.timing import Timing
from supernet.errors import InputError
from supernet.space import load_space

HERE = {"processor": "a board", "machine": "aarch64", "cores": 4, "runtime": "onnxruntime 1.23.0"}


class FakeFar:
    """A runner that follows a script: each job gets the next answers of it; an exception among them is raised."""

    def __init__(self, *script: list[Any], hellos: Sequence[Any] = ()) -> None:
        self.script, self.hellos, self.jobs = list(script), list(hellos), list[Mapping[str, Any]]()

    def hello(self, runtime: str) -> dict[str, Any]:
        found = self.hellos.pop(0) if self.hellos else HERE
        if isinstance(found, Exception):
            raise found
        return dict(found)

    def ask(self, job: Mapping[str, Any], models: Sequence[bytes] = (), *, seconds: float = 0.0) -> Iterator[Any]:
        self.jobs.append(job)
        for answer in self.script.pop(0):
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def close(self) -> None:
        pass


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """A machine whose runner is the given fake; broken connections are made anew at once."""
    monkeypatch.setattr(targets, "PAUSE_SECONDS", 0.0)

    def make(far: FakeFar, **options: Any) -> Machine:
        machine = Local(**options)
        machine.__dict__["_far"] = far
        return machine

    return make


@pytest.fixture
def answer(make_timing: Callable[..., Timing]) -> Callable[..., dict[str, Any]]:
    """A runner's answer for a model."""
    return lambda at, ms=1.0, **more: {"index": at, "timing": make_timing(ms, **more).as_dict()}


Answer = Callable[..., dict[str, Any]]
Place = Callable[..., Machine]
DONE = {"done": True}


def models(count: int) -> list[Model]:
    return [Model(bytes([number]), 1, 8) for number in range(count)]


def test_timings_come_in_the_order_of_the_models_and_are_told_as_they_come(place: Place, answer: Answer) -> None:
    told: list[tuple[int, float]] = []
    far = FakeFar([answer(2, 3.0), answer(0, 1.0), answer(1, 2.0), DONE])
    found = place(far).measure(models(3), each=lambda at, timing: told.append((at, timing.latency_ms)))
    assert [timing.latency_ms for timing in found] == [1.0, 2.0, 3.0]
    assert told == [(2, 3.0), (0, 1.0), (1, 2.0)]


def test_nothing_to_measure_asks_nobody(place: Place) -> None:
    far = FakeFar(hellos=[InputError("asked")])
    assert place(far).measure([]) == []


def test_a_broken_connection_goes_on_with_what_is_left(place: Place, answer: Answer) -> None:
    far = FakeFar([answer(1, 2.0), Broken("gone")], [Broken("gone")], [answer(1, 3.0), Broken("gone")], [answer(0, 1.0), DONE])
    told: list[int] = []
    found = place(far).measure(models(3), each=lambda at, _: told.append(at))
    assert [timing.latency_ms for timing in found] == [1.0, 2.0, 3.0]
    assert told == [1, 2, 0]
    assert [len(job["models"]) for job in far.jobs] == [3, 2, 2, 1]


def test_connections_that_break_without_progress_end_it(place: Place, answer: Answer) -> None:
    far = FakeFar([answer(0), Broken("gone")], *([Broken("gone")] for _ in range(TRIES - 1)), [answer(0), DONE])
    told: list[int] = []
    with pytest.raises(Broken, match="gone"):
        place(far).measure(models(2), each=lambda at, _: told.append(at))
    assert told == [0] and len(far.jobs) == TRIES


def test_weighing_goes_on_likewise(place: Place) -> None:
    def weight(at: int, load_ms: float) -> dict[str, Any]:
        whole = {"resident_bytes": 9, "added_bytes": 1, "load_ms": load_ms, "first_ms": 1.0, "images_per_s": 7.0}
        return {"index": at, "weight": whole}

    far = FakeFar([weight(1, 2.0), Broken("gone")], [Broken("gone")], [weight(0, 1.0), weight(1, 3.0), DONE])
    assert [found.load_ms for found in place(far).weigh(models(3), batch=4, seconds=0.5)] == [1.0, 2.0, 3.0]
    assert [[model["many"] for model in job["models"]] for job in far.jobs] == [[4] * 3, [4] * 2, [4] * 2]
    twice = FakeFar([weight(0, 2.0), weight(0, 2.0), DONE])
    with pytest.raises(InputError, match="answered for twice"):
        place(twice).weigh(models(2))


def test_another_machine_behind_the_name_is_noticed_when_the_connection_is_made_anew(place: Place, answer: Answer) -> None:
    far = FakeFar([answer(0), Broken("gone")], hellos=[HERE, {**HERE, "cores": 8}])
    with pytest.raises(InputError, match=r"another machine than before .cores is 8 now and 4 before.: measure again"):
        place(far).measure(models(2))


def test_another_runtime_is_noticed_too(place: Place) -> None:
    far = FakeFar([Broken("gone")], hellos=[HERE, {**HERE, "runtime": "onnxruntime 1.24.0"}])
    with pytest.raises(InputError, match=r"runtime is onnxruntime 1.24.0 now and onnxruntime 1.23.0 before"):
        place(far).measure(models(1))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"index": 2}, "there is no model 2"),
        ({"index": -1}, "there is no model -1"),
        ({"index": True}, "there is no model True"),
        ({"index": "0"}, "there is no model 0"),
        ({"timing": None}, "a timing has"),
        ({"timing": {}}, "a timing has"),
    ],
)
def test_an_answer_that_cannot_be_ends_it(place: Place, answer: Answer, change: dict[str, Any], said: str) -> None:
    told: list[int] = []
    with pytest.raises(InputError, match=said) as caught:
        place(FakeFar([{**answer(0), **change}, DONE])).measure(models(2), each=lambda at, _: told.append(at))
    assert told == [] and "\n" not in str(caught.value)


def test_an_answer_given_twice_a_missing_one_and_another_clock_end_it(place: Place, answer: Answer) -> None:
    with pytest.raises(InputError, match="model 0 was answered for twice"):
        place(FakeFar([answer(0), answer(0), DONE])).measure(models(2))
    with pytest.raises(InputError, match="answered for 1 of 2 models and called it done"):
        place(FakeFar([answer(0), DONE])).measure(models(2))
    with pytest.raises(InputError, match="by the clock wall, cpu was asked for"):
        place(FakeFar([answer(0, clock="wall"), DONE])).measure(models(1))


WEIGHT = {"resident_bytes": 5, "added_bytes": 2, "load_ms": 1.5, "first_ms": 2.5, "images_per_s": 100.0}


def test_weights_are_those_of_the_models(place: Place) -> None:
    far = FakeFar([{"index": 1, "weight": {**WEIGHT, "load_ms": 9}}, {"index": 0, "weight": WEIGHT}, DONE])
    first, second = place(far).weigh(models(2), batch=4)
    assert (first.load_ms, second.load_ms, first.batch) == (1.5, 9, 4)
    assert first.as_dict() == {**WEIGHT, "batch": 4}


@pytest.mark.parametrize(
    "value", [None, 7, {}, {**WEIGHT, "load_ms": -1}, {**WEIGHT, "load_ms": float("nan")}, {**WEIGHT, "load_ms": "1"}]
)
def test_what_is_no_weight_is_refused(place: Place, value: Any) -> None:
    with pytest.raises(InputError, match="which is no weight"):
        place(FakeFar([{"index": 0, "weight": value}, DONE])).weigh(models(1))


def test_a_model_that_was_not_weighed_is_missed(place: Place) -> None:
    with pytest.raises(InputError, match="0 of 1 models"):
        place(FakeFar([DONE])).weigh(models(1))


# --- names and fingerprints ---


@pytest.mark.parametrize(
    "options, clock, name",
    [
        ({}, "cpu", "local:threads=1"),
        ({"threads": 4}, "wall", "local:threads=4"),
        ({"runtime": "openvino"}, "wall", "local:threads=1,runtime=openvino"),
        ({"precision": "int8"}, "cpu", "local:threads=1,int8"),
    ],
)
def test_cpu_time_counts_where_one_thread_of_ours_works_and_names_say_what_differs(
    place: Place, options: dict[str, Any], clock: str, name: str
) -> None:  # fmt: skip
    machine = place(FakeFar(), **options)
    assert (machine.clock, machine.name) == (clock, name)
    assert machine.fingerprint()["clock"] == targets.CLOCKS[clock]


def test_results_of_other_threads_precisions_and_machines_are_filed_apart(place: Place) -> None:
    prints = [
        place(FakeFar()).fingerprint(),
        place(FakeFar(), threads=2).fingerprint(),
        place(FakeFar(), precision="int8").fingerprint(),
        place(FakeFar(hellos=[{**HERE, "runtime": "onnxruntime 1.24.0"}])).fingerprint(),
        place(FakeFar(hellos=[{**HERE, "processor": "another"}])).fingerprint(),
    ]
    assert len({each["hash"] for each in prints}) == len(prints)
    assert place(FakeFar()).fingerprint() == prints[0] == json.loads(json.dumps(prints[0]))
    assert set(prints[0]) == {"processor", "machine", "cores", "runtime", "threads", "clock", "precision", "batch", "hash"}


def test_what_differs_between_fingerprints_is_said() -> None:
    assert differing({"cores": 4, "hash": "a"}, {"cores": 4, "hash": "b"}) == "nothing differs"
    assert differing({"cores": 4}, {"cores": 8}) == "cores is 4 here and 8 there"


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1025}, {"runtime": "tensorflow"}])
def test_a_target_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a target has 1 to 1024 threads|the runtime of a target must be one of onnxruntime"):
        Local(**options)


@pytest.mark.parametrize("change", [{"low": -1}, {"latency_ms": float("nan")}, {"target": 3}, {"fingerprint": {}}, {"more": 1}])
def test_a_latency_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    whole = {"target": "a", "latency_ms": 1.0, "low": 0.9, "high": 1.1, "date": "2026-01-01",
             "fingerprint": {"processor": "p", "runtime": "r", "hash": "h"}}  # fmt: skip
    assert Latency.from_dict(whole).as_dict() == whole
    with pytest.raises(ValueError, match="a latency"):
        Latency.from_dict({**whole, **change})


def test_real_models_are_timed_and_weighed_here() -> None:
    space = load_space("digits")
    given = [Model(probe(space, arch), 1, space.resolution(arch)) for arch in (space.smallest, space.largest)]
    here = Local()
    for timing in here.measure(given, width=0.5, most_seconds=1.0):
        assert 0 < timing.low_ms <= timing.latency_ms <= timing.high_ms
        assert timing.clock == "cpu"
    weights = here.weigh(given, seconds=0.01)
    assert all(each.resident_bytes > each.added_bytes > 0 and each.images_per_s > 0 for each in weights)
    assert set(here.conditions()) == {"governor", "frequency_mhz", "temperature_c", "load"}
    here.close()


def test_executorch_is_not_sent_what_it_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "_hello", lambda _: {})
    target = Local(runtime="executorch")
    for ask in (target.measure, target.weigh):
        with pytest.raises(InputError, match=r"executorch runs \.pte programs"):
            ask([Model(b"\x08\x0aan ONNX file", 1, 8)])
