"""Times models on the machine where it runs: the far side of a measurement, on this machine or behind ssh.

It is told what to do by lines of JSON on its standard input, each followed by the bytes of the models it speaks of, and answers by
lines of JSON (`deploy/far.py` is the other side); it keeps nothing on the disk.

This file travels: it needs Python 3.9, numpy and the runtime, nothing else of Nestling but `timing.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

FORMAT = 2
AT_ONCE = 24
"""Models loaded and timed together; more are timed in groups."""
MOST_BYTES = 4 << 30
MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}
"""Runtime -> the package that it comes in."""

Session = Callable[[], object]


class Refused(Exception):
    """Something that the other side should be told, in a line: what kind it is of, and what holds."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


# --- runtimes ---


def load(runtime: str, model: bytes, shapes: Sequence[Sequence[int]], threads: int) -> Session:
    """A function that runs a model once on made-up inputs of these shapes. Raises `Refused`."""
    import numpy as np

    inputs = [np.random.default_rng(0).standard_normal(tuple(shape), dtype=np.float32) for shape in shapes]
    with _refusing(runtime):
        return {"onnxruntime": _onnxruntime, "openvino": _openvino, "executorch": _executorch}[runtime](model, inputs, threads)


@contextlib.contextmanager
def _refusing(runtime: str) -> Iterator[None]:
    """Turn whatever a runtime says of a model that it cannot run into `Refused`."""
    try:
        yield
    except ImportError as error:
        raise Refused("missing_runtime", _missing(runtime, error)) from error
    except (Refused, OSError):
        raise
    except Exception as error:  # each runtime has errors of its own
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, MemoryError) or "alloc" in text:
            raise Refused(
                "memory", f"too little memory for a model there ({text}): free some, or measure smaller models"
            ) from error
        raise Refused("model", f"{runtime} cannot run a model ({text})") from error


def _onnxruntime(model: bytes, inputs: list[Any], threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()
    if len(given) != len(inputs):
        raise Refused("model", f"a model has {len(given)} inputs, but {len(inputs)} were given")
    feed = {given[at].name: value for at, value in enumerate(inputs)}
    return lambda: session.run(None, feed)


def _openvino(model: bytes, inputs: list[Any], threads: int) -> Session:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = "f32"  # where the processor has bfloat16, it would take that for fp32
    read = core.read_model(model=model, weights=b"")
    read.reshape({at: list(value.shape) for at, value in enumerate(inputs)})
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    feed = dict(enumerate(inputs))
    return lambda: request.infer(feed, share_inputs=True)


def _executorch(model: bytes, inputs: list[Any], threads: int) -> Session:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)  # before a program is loaded that uses it
    program = Runtime.get().load_program(model)
    method = program.load_method("forward")
    tensors = [torch.from_numpy(value) for value in inputs]
    return lambda: (program, method.execute(tensors))[1]  # a method does not hold its program


def _missing(runtime: str, error: Exception) -> str:
    install = f"{sys.executable} -m pip install {MODULES[runtime]}"
    return f"{runtime} cannot be imported by {sys.executable} there ({error}): install it there with {install}"


# --- the machine ---


def fingerprint(runtime: str) -> dict[str, Any]:
    """What a latency depends on here, but for what it is measured by. Raises `Refused` where the runtime is missing."""
    if runtime not in MODULES:
        raise Refused("runtime", "the runtime must be one of {}, but is {!r}".format(", ".join(MODULES), runtime))
    try:
        __import__("numpy")
    except ImportError as error:
        install = f"{sys.executable} -m pip install numpy"
        raise Refused(
            "missing_numpy", f"numpy cannot be imported by {sys.executable} ({error}): install it with {install}"
        ) from error
    try:
        module = __import__(MODULES[runtime])
    except ImportError as error:
        raise Refused("missing_runtime", _missing(runtime, error)) from error
    version = str(getattr(module, "__version__", "")).split("-")[0]
    if not version:
        from importlib import metadata

        version = metadata.version(MODULES[runtime])
    return {"processor": processor(), "machine": platform.machine(), "cores": os.cpu_count() or 1,
            "runtime": f"{runtime} {version}"}  # fmt: skip


def processor() -> str:
    """The processor's name as the kernel gives it, on a board the board's."""
    wanted = {"model name", "Hardware"}
    for line in _text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in wanted and value.strip():
            return value.strip()
    board = _text("/proc/device-tree/model").strip("\0 \n")
    return board or platform.processor() or platform.machine()


def conditions() -> dict[str, Any]:
    """What a timing also depends on, and may change meanwhile: governor, frequency, temperature, load; None where unknown."""
    frequencies = [int(text) / 1000 for text in _numbered("/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq")]
    zones = [int(text) / 1000 for text in _numbered("/sys/class/thermal/thermal_zone%d/temp")]
    governor = _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"governor": governor or None, "frequency_mhz": max(frequencies) if frequencies else None,
            "temperature_c": max(zones) if zones else None, "load": load}  # fmt: skip


def _numbered(pattern: str) -> Iterator[str]:
    for number in range(256):
        text = _text(pattern % number).strip()
        if not text.lstrip("-").isdigit():
            return
        yield text


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""


# --- measuring ---


def timed(job: dict[str, Any], models: Callable[[int], bytes]) -> Iterator[dict[str, Any]]:
    """Time the models of a job, interleaved in groups; an answer for each as soon as its group is known.

    Models that say their "group" are timed with those of the same one, others in groups of mixed order.
    """
    from deploy.timing import time_interleaved

    listed = job["models"]
    for group in _groups(listed):
        calls = [load(job["runtime"], models(at), listed[at]["shapes"], job["threads"]) for at in group]
        with _refusing(job["runtime"]):
            found = time_interleaved(calls, clock=job["clock"], width=job["width"], most_seconds=job["most_seconds"])
        for place, at in enumerate(group):
            yield {"index": at, "timing": found[place].as_dict()}


def _groups(listed: Sequence[dict[str, Any]]) -> list[list[int]]:
    if all("group" in each for each in listed):
        named: dict[Any, list[int]] = {}
        for at in range(len(listed)):
            named.setdefault(listed[at]["group"], []).append(at)
        return list(named.values())
    import numpy as np

    order = [int(at) for at in np.random.default_rng(0).permutation(len(listed))]
    return [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]


def weighed(job: dict[str, Any], models: Callable[[int], bytes]) -> Iterator[dict[str, Any]]:
    """What else the models cost, each in a process of its own: memory, time to load, time of the first inference, throughput."""
    for at, listed in enumerate(job["models"]):
        wanted = {"runtime": job["runtime"], "threads": job["threads"], "shapes": listed["shapes"], "seconds": job["seconds"],
                  "many": listed["many"]}  # fmt: skip
        code = f"import sys\n{bootstrap()}\nfrom deploy import runner\nrunner.weigh_here()"
        given = json.dumps(wanted).encode() + b"\n" + models(at)
        done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=False)
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        if done.returncode or not lines:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
            if done.returncode == -9:
                raise Refused("memory", "the process that weighed a model was killed, as a system does that runs out of memory")
            raise Refused("model", f"the process that weighed a model ended with {done.returncode} ({last[:300]})")
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise Refused(answer["error"], answer["text"])
        yield {"index": at, "weight": answer}


def weigh_here() -> None:
    """Weigh the model on standard input in this process, which does nothing else; prints a line of JSON."""
    out = _own_output()
    wanted = json.loads(sys.stdin.buffer.readline())
    model = sys.stdin.buffer.read()
    try:
        fingerprint(wanted["runtime"])

        before = _bytes("VmRSS:")
        start = time.perf_counter()
        call = load(wanted["runtime"], model, wanted["shapes"], wanted["threads"])
        loaded = time.perf_counter()
        with _refusing(wanted["runtime"]):
            call()
            first = time.perf_counter()
            for _ in range(10):
                call()
        peak = _bytes("VmHWM:")
        answer: dict[str, Any] = {"resident_bytes": peak, "added_bytes": max(0, peak - before),
                                  "load_ms": 1e3 * (loaded - start), "first_ms": 1e3 * (first - loaded)}  # fmt: skip
        answer["images_per_s"] = _throughput(wanted, model)
    except Refused as error:
        answer = {"error": error.kind, "text": str(error)}
    _say(out, answer)


def _throughput(wanted: dict[str, Any], model: bytes) -> float:
    """Images a second at batch `many`, the best of several runs."""
    shapes = [[wanted["many"], *shape[1:]] for shape in wanted["shapes"]]
    call = load(wanted["runtime"], model, shapes, wanted["threads"])
    best, end = float("inf"), time.perf_counter() + wanted["seconds"]
    for run in range(1000):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if run >= 3 and time.perf_counter() > end:
            break
    return float(wanted["many"] / best)


def _bytes(name: str) -> int:
    """Memory that this process holds ("VmRSS:") or ever held ("VmHWM:"): its resident set."""
    for line in _text("/proc/self/status").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# --- talking ---

_WORK = {"time": timed, "weigh": weighed}


def serve(source: BinaryIO, out: BinaryIO) -> None:
    """Do what the lines of `source` ask for, until it ends."""
    _end_with(source)
    for line in iter(source.readline, b""):
        try:
            job = json.loads(line)
            models = [_model(source, listed) for listed in job.get("models", [])]
            if job.get("format") != FORMAT:
                raise Refused("format", f"this runner speaks format {FORMAT}, not {job.get('format')!r}")
            if job["do"] == "hello":
                _say(out, {"fingerprint": fingerprint(job["runtime"]), "conditions": conditions()})
            else:
                fingerprint(job["runtime"])
                for answer in _WORK[job["do"]](job, models.__getitem__):
                    _say(out, answer)
            _say(out, {"done": True, "conditions": conditions()})
        except Refused as error:
            _say(out, {"error": error.kind, "text": str(error)})
        except MemoryError:
            _say(out, {"error": "memory", "text": "too little memory for these models there: free some, or measure fewer"})


def _end_with(source: BinaryIO) -> None:
    """Let this process end as soon as nobody can ask anything more, even in the middle of a job that would disturb the next one."""
    try:
        watch, wanted = select.poll(), getattr(select, "POLLRDHUP", 0)
        watch.register(source.fileno(), wanted)
    except (AttributeError, OSError):  # no poll here, or no real stream
        return

    def wait() -> None:
        while not any(event & (select.POLLHUP | select.POLLERR | wanted) for _, event in watch.poll()):
            pass
        time.sleep(1.0)  # a job that is already whole in the pipe is not cut off by its sender's leaving at once
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _model(source: BinaryIO, listed: dict[str, Any]) -> bytes:
    data = _exactly(source, int(listed["bytes"]))
    return zlib.decompressobj().decompress(data, MOST_BYTES) if listed.get("packed") else data


def _exactly(source: BinaryIO, count: int) -> bytes:
    if not 0 <= count <= MOST_BYTES:
        raise Refused("format", f"a model has 0 to {MOST_BYTES} bytes, not {count}")
    data = source.read(count)
    if len(data) < count:
        raise SystemExit(0)  # the other side is gone
    return data


def _say(out: BinaryIO, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer, allow_nan=False).encode() + b"\n")
    out.flush()


def _own_output() -> BinaryIO:
    """Standard output for answers alone: whatever a runtime prints goes to standard error."""
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return own


def bootstrap() -> str:
    """Python that makes this file and `timing.py` importable in a new process of this machine."""
    lines = ["import sys, types", "sys.modules['deploy'] = package = types.ModuleType('deploy')"]
    for name in ("timing", "runner"):
        lines += [
            f"package.{name} = sys.modules['deploy.{name}'] = module = types.ModuleType('deploy.{name}')",
            f"module.SOURCE = {_source(name)!a}",  # ASCII: whatever that Python takes files to be written in
            f"exec(compile(module.SOURCE, '{name}.py', 'exec'), module.__dict__)",
        ]
    return "\n".join(lines)


def _source(name: str) -> str:
    """The text of this file or of its neighbour, wherever they came from."""
    module = __import__("deploy." + name, fromlist=["x"])
    given = getattr(module, "SOURCE", None)
    if given is not None:
        return str(given)
    import inspect

    return inspect.getsource(module)


def quiet() -> None:
    """Keep runtimes from leaving anything behind: from 1.32 on ONNX Runtime writes a data base of usage into the home directory."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def main() -> int:
    """Do what standard input asks for."""
    quiet()
    try:
        out = _own_output()
        serve(sys.stdin.buffer, out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
