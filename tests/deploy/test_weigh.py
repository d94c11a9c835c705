"""What a model costs beside its latency, by a real runner: memory, loading, throughput; and what becomes of models that fail."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy import runner
from deploy.targets import Local, Model
from supernet.errors import InputError


def layer(width: int) -> Model:
    """A product with a matrix of `width` x `width` numbers, for inputs of shape (N, 1, 1, width)."""
    matrix = np.random.default_rng(0).standard_normal((width, width), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 1, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 1, width])], [numpy_helper.from_array(matrix, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return Model(model.SerializeToString(), 1, width, (1, 1, 1, width))


@pytest.fixture
def local() -> Iterator[Local]:
    target = Local()
    yield target
    target.close()


@pytest.mark.slow
def test_a_larger_model_holds_more_memory_and_does_less_in_a_second(local: Local) -> None:
    small, large = local.weigh([layer(64), layer(4096)], batch=4, seconds=0.1)
    weights = 4 * 4096 * 4096
    assert large.resident_bytes - small.resident_bytes > 0.9 * weights
    assert large.added_bytes - small.added_bytes > 0.9 * weights
    assert large.images_per_s < small.images_per_s
    for weight in (small, large):
        assert weight.resident_bytes > weight.added_bytes >= 0
        assert weight.load_ms > 0 and weight.first_ms > 0 and weight.batch == 4


@pytest.mark.slow
def test_each_model_is_weighed_by_itself(local: Local) -> None:
    after, alone = local.weigh([layer(4096), layer(64)], seconds=0.05)[1], local.weigh([layer(64)], seconds=0.05)[0]
    assert abs(after.resident_bytes - alone.resident_bytes) < 20e6


@pytest.mark.slow
def test_what_is_no_model_is_one_line_and_the_runner_goes_on(local: Local) -> None:
    with pytest.raises(InputError, match="onnxruntime cannot run a model") as raised:
        local.weigh([Model(b"no model", 1, 8)])
    assert "\n" not in str(raised.value)
    assert local.weigh([layer(8)], seconds=0.01)[0].load_ms > 0


@pytest.mark.slow
def test_a_model_with_another_input_than_told_is_one_line(local: Local) -> None:
    with pytest.raises(InputError, match="onnxruntime cannot run a model") as raised:
        local.weigh([Model(layer(8).data, 1, 9, (1, 1, 1, 9))])
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_of_a_runner_that_is_killed_another_one_takes_the_place(local: Local) -> None:
    local.fingerprint()
    process: Any = local._far._process
    process.kill()
    process.wait()
    assert local.weigh([layer(8)], seconds=0.01)[0].load_ms > 0


@pytest.mark.parametrize(
    "code, word",
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "was killed, as a system does"),
        ("sys.exit('first\\nlast words')", "ended with 1 .last words"),
        ("sys.exit(0)", "ended with 0 .no word"),
    ],
)
def test_a_process_that_dies_while_it_weighs_is_one_line(monkeypatch: pytest.MonkeyPatch, code: str, word: str) -> None:
    monkeypatch.setattr(runner, "bootstrap", lambda: code)
    job = {"runtime": "onnxruntime", "threads": 1, "seconds": 0.1, "models": [{"shapes": [[1, 1, 8, 8]], "many": 1}]}
    with pytest.raises(runner.Refused, match=word) as raised:
        list(runner.weighed(job, lambda at: b"model"))
    assert "\n" not in str(raised.value)
