"""Talking with a runner: a real one on this machine, and made-up ones that do what a runner must not."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from deploy import far, runner, targets
from deploy.far import Broken, Far, machine_of, one_line, source_of_runner
from deploy.probe import probe
from deploy.targets import Local, Machine, Model
from deploy.timing import Timing
from supernet.errors import InputError
from supernet.space import load_space

QUICK = {"width": 10.0, "most_seconds": 0.5}


@pytest.fixture(scope="module")
def tiny() -> Model:
    space = load_space("digits")
    return Model(probe(space, space.smallest), 1, space.resolution(space.smallest))


@pytest.fixture(scope="module")
def here() -> Iterator[Local]:
    machine = Local()
    yield machine
    machine.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "PAUSE_SECONDS", 0.0)


# --- a real runner ---


def test_a_runner_says_what_it_runs_on(here: Local) -> None:
    found = here._far.hello("onnxruntime")
    assert set(found) == {"processor", "machine", "cores", "runtime"}
    assert found["cores"] == os.cpu_count() and found["runtime"].startswith("onnxruntime 1.")


def test_a_runner_stays_up_from_one_call_to_the_next_and_is_started_anew_after_its_end(here: Local, tiny: Model) -> None:
    here.measure([tiny], **QUICK)
    process = here._far._process
    here.fingerprint()
    assert process is not None and here._far._process is process and process.poll() is None
    here.close()
    assert process.returncode == 0
    assert len(here.measure([tiny], **QUICK)) == 1


@pytest.mark.slow
def test_more_models_than_are_timed_together_each_get_an_answer(
    here: Local, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    told: list[int] = []
    found = here.measure([tiny] * (runner.AT_ONCE + 2), width=10.0, most_seconds=0.1, each=lambda at, _: told.append(at))
    assert sorted(told) == list(range(len(found))) != told


@pytest.mark.parametrize(
    "model, said",
    [
        (Model(b"no model", 1, 8), "onnxruntime cannot run a model"),
        (Model(b"", 1, 8), "onnxruntime cannot run a model"),
    ],
)
def test_a_model_that_cannot_run_is_told_in_a_line_and_the_runner_goes_on(
    here: Local, tiny: Model, model: Model, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        here.measure([tiny, model], **QUICK)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, Broken)
    with pytest.raises(InputError, match=said):
        here.weigh([model], seconds=0.01)
    assert len(here.measure([tiny], **QUICK)) == 1


def test_an_input_of_another_shape_is_told_in_a_line(here: Local, tiny: Model) -> None:
    for wrong in (Model(tiny.data, 2, tiny.resolution), Model(tiny.data, 1, 8, shape=(1, 5))):
        with pytest.raises(InputError, match="onnxruntime cannot run a model"):
            here.measure([wrong], **QUICK)


def test_a_model_with_more_memory_than_there_is_is_told_in_a_line(here: Local) -> None:
    from onnx import TensorProto, helper

    size = helper.make_tensor("size", TensorProto.INT64, [1], [1 << 46])
    nodes = [helper.make_node("ConstantOfShape", ["size"], ["huge"]), helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
             helper.make_node("Add", ["x", "sum"], ["y"])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "huge", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])], [size],
    )  # fmt: skip
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    onnx.checker.check_model(data)
    with pytest.raises(InputError, match="memory"):
        here.measure([Model(data, 1, 1, shape=(1,))], **QUICK)


def test_a_missing_runtime_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Local(runtime="openvino")
    probe_code = "import sys; sys.modules['openvino'] = None; "
    monkeypatch.setattr(
        Local, "command", lambda _, arguments: [sys.executable, *arguments[:3], probe_code + arguments[3]]
    )  # fmt: skip
    with pytest.raises(InputError, match=r"openvino cannot be imported by .* install it there with .* -m pip install openvino"):
        machine.fingerprint()
    machine.close()


def test_missing_numpy_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "command", lambda _, arguments: [sys.executable, "-S", "-E", *arguments])
    machine = Local()
    with pytest.raises(InputError, match=r"numpy cannot be imported by .*: install it there with .* -m pip install numpy"):
        machine.fingerprint()
    machine.close()


@pytest.mark.slow
def test_a_consumer_that_stops_in_the_middle_leaves_no_answers_to_the_next_job(here: Local, tiny: Model) -> None:
    def stop(at: int, timing: Timing) -> None:
        raise KeyError(at)

    with pytest.raises(KeyError):
        here.measure([tiny, tiny], **QUICK, each=stop)
    assert len(here.measure([tiny], **QUICK)) == 1
    assert here.fingerprint()["cores"] == os.cpu_count()


@pytest.mark.slow
def test_a_runner_that_is_killed_in_the_middle_is_started_anew_and_nothing_is_timed_twice(here: Local, tiny: Model) -> None:
    told: list[int] = []

    def kill_once(at: int, timing: Timing) -> None:
        told.append(at)
        if len(told) == runner.AT_ONCE:
            process = here._far._process
            assert process is not None
            process.send_signal(signal.SIGKILL)

    found = here.measure([tiny] * (runner.AT_ONCE + 1), width=10.0, most_seconds=0.1, each=kill_once)
    assert sorted(told) == list(range(runner.AT_ONCE + 1))
    assert len(found) == len(told)


@pytest.mark.slow
def test_a_runner_ends_with_its_asker_even_in_the_middle_of_a_job(tiny: Model) -> None:
    machine = Local()
    answers = machine._timed([tiny] * 2, 0.0, 60.0)
    machine.fingerprint()
    process = machine._far._process
    assert process is not None
    job = {"do": "time", "format": runner.FORMAT, "runtime": "onnxruntime", "threads": 1, "clock": "cpu", "width": 0.0,
           "most_seconds": 60.0,
           "models": [{"bytes": len(tiny.data), "shapes": [tiny.input_shape]}]}  # fmt: skip
    machine._far._send(json.dumps(job).encode() + b"\n", tiny.data)
    time.sleep(1.0)
    assert process.poll() is None and process.stdin is not None
    process.stdin.close()  # as when a connection is cut
    assert process.wait(10) == 0
    machine.close()
    answers.close()


# --- runners that are not what they should be ---

START = """
import json, os, sys, time
source = sys.stdin.buffer
source.read({source})
job = json.loads(source.readline())
for model in job.get("models", []): source.read(model["bytes"])
def say(value): os.write(1, (value if isinstance(value, str) else json.dumps(value)).encode() + b"\\n")
here = {{"processor": "p", "machine": "m", "cores": 2, "runtime": "onnxruntime 1"}}
timing = {timing}
def answer(at, **changes): return {{"index": at, "timing": dict(timing, **changes)}}
if job["do"] == "hello":
    say({{"fingerprint": here, "conditions": {{}}}}); say({{"done": True}})
    job = json.loads(source.readline())
    for model in job.get("models", []): source.read(model["bytes"])
"""


class Scripted(Machine):
    """A machine whose runner is a few lines of Python: what it does when it is given its first job with models."""

    kind = "scripted"
    script = ""

    def command(self, arguments: Any) -> list[str]:
        return [sys.executable, "-u", "-c", self.script]


@pytest.fixture
def scripted(make_timing: Callable[..., Timing]) -> Callable[[str], Machine]:
    def make(lines: str) -> Machine:
        start = START.format(source=len(source_of_runner().encode()), timing=make_timing(2.0, 1.9, 2.1).as_dict())
        kind = type("Scripted", (Scripted,), {"script": start + textwrap.dedent(lines)})
        machine: Machine = kind()
        return machine

    return make


FAULTS: dict[str, tuple[str, str]] = {
    "hangs": ("time.sleep(60)", "did not answer for"),
    "hangs in the middle of a line": ("os.write(1, b'{\"index\"'); time.sleep(60)", "did not answer for"),
    "half an answer": ('os.write(1, b\'{"index": 0, "timi\'); sys.exit()', "the connection ended"),
    "half an answer, a line": ('say(\'{"index": 0, "timi\')', "something else than a runner"),
    "text first": ("say('Welcome to the board!')", "see that its login prints no text"),
    "text that a terminal obeys": ("say('\\x1b[2J\\x07')", "something else than a runner"),
    "a number": ("say('7')", "something else than a runner"),
    "a list": ("say('[1]')", "something else than a runner"),
    "deeply nested": ("say('[' * 100000)", "something else than a runner"),
    "bytes that are no text": ("os.write(1, bytes(range(128, 256)) + b'\\n')", "something else than a runner"),
    "a line without end": ("os.write(1, b'x' * (3 << 20)); source.read()", "something else than a runner"),
    "not a number": ("say(answer(0, latency_ms=float('nan')))", "something else than a runner"),
    "infinite": ("say(answer(0, latency_ms=float('inf')))", "something else than a runner"),
    "zero": ("say(answer(0, latency_ms=0.0, low_ms=0.0))", "an answer that cannot be"),
    "negative": ("say(answer(0, low_ms=-1.0))", "an answer that cannot be"),
    "ends swapped": ("say(answer(0, low_ms=2.1, high_ms=1.9))", "an answer that cannot be"),
    "a text for a number": ("say(answer(0, latency_ms='2'))", "an answer that cannot be"),
    "another clock": ("say(answer(0, clock='wall'))", "by the clock wall"),
    "no timing": ("say({'index': 0, 'timing': None})", "an answer that cannot be"),
    "a model that there is not": ("say(answer(2))", "there is no model 2"),
    "a model before the first": ("say(answer(-1))", "there is no model -1"),
    "a model twice": ("say(answer(0)); say(answer(0))", "answered for twice"),
    "too few answers": ("say(answer(0)); say({'done': True}); source.read()", "answered for 1 of 2 models"),
    "no answer at all": ("say({'done': True}); source.read()", "answered for 0 of 2 models"),
    "an error": ("say({'error': 'model', 'text': 'no\\nsuch\\x1b[2J model'})", "no such [2J model"),
    "an error without text": ("say({'error': 'model'})", "scripted:threads=1: None"),
    "dies": ("sys.exit(3)", "the connection ended (exit code 3)"),
    "dies with a word": ("sys.exit('so it is')", "the connection ended (so it is)"),
    "is killed": ("os.kill(os.getpid(), 9)", "see whether it has too little memory"),
    "has no memory": ("raise MemoryError", "free memory there"),
    "dies after an answer": ("say(answer(0)); os._exit(4)", "the connection ended"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_a_line_that_says_what_it_was(
    scripted: Callable[[str], Machine], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far, "ANSWER_SECONDS", 0.4 if "hangs" in fault else 20.0)
    monkeypatch.setattr(targets, "TRIES", 1)
    monkeypatch.setattr(targets, "MOST_SECONDS", 0.0)
    lines, said = FAULTS[fault]
    machine = scripted(lines)
    with pytest.raises(InputError) as caught:
        machine.measure([Model(b"a", 1, 8), Model(b"b", 1, 8)], most_seconds=0.0)
    assert said in str(caught.value) and str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    machine.close()


@pytest.mark.parametrize(
    "hello", ["{}", "{'fingerprint': 3}", "{'fingerprint': dict(here, cores=0)}", "{'fingerprint': dict(here, runtime=None)}"]
)
def test_a_runner_that_says_nothing_of_its_machine_is_refused(
    make_timing: Callable[..., Timing], hello: str
) -> None:  # fmt: skip
    start = START.format(source=len(source_of_runner().encode()), timing={}).split("if job")[0]
    lines = f"say({hello}); say({{'done': True}}); source.read()"
    machine: Machine = type("Scripted", (Scripted,), {"script": start + lines})()
    with pytest.raises(InputError, match="is it a runner of this version"):
        machine.fingerprint()


def test_a_program_that_is_not_there_is_told_in_a_line() -> None:
    place = Far(lambda arguments: ["/no/such/program", *arguments], "place")
    with pytest.raises(InputError, match=r"place: /no/such/program cannot be started .No such file or directory.: install it"):
        place.hello("onnxruntime")


def test_a_runner_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "ANSWER_SECONDS", 0.3)
    place = Far(lambda _: [sys.executable, "-c", "import time; time.sleep(60)"], "place")
    with pytest.raises(Broken, match="did not answer for 0 s and was given up"):
        list(place.ask({"do": "time"}, [bytes(8 << 20)]))
    assert place._process is None


def test_what_stands_in_a_fingerprint_is_on_one_line_and_nothing_else_is_taken_over() -> None:
    found = machine_of({"processor": "a\nb\x1b[2J", "machine": "m", "runtime": "r", "cores": 2, "more": "x"})
    assert found == {"processor": "a b [2J", "machine": "m", "runtime": "r", "cores": 2}
    assert one_line("a" * 500, 300) == "a" * 300


# --- the far side by itself ---


@pytest.mark.parametrize("name", ["timing", "runner", "kit_runner"])
def test_what_travels_is_read_by_the_oldest_python_that_it_may_meet(name: str) -> None:
    import ast

    ast.parse((Path(runner.__file__).parent / f"{name}.py").read_text(), feature_version=far.OLDEST)
    assert source_of_runner().isascii()


def test_a_runner_of_another_format_says_so() -> None:
    import io

    out = io.BytesIO()
    runner.serve(io.BytesIO(b'{"format": 99, "do": "hello"}\n'), out)
    assert json.loads(out.getvalue()) == {"error": "format", "text": f"this runner speaks format {runner.FORMAT}, not 99"}
