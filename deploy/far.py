"""Our side of a measurement: starts a runner (`deploy/runner.py`) here or behind ssh, and talks with it over its standard streams.

The runner's source goes first, through the same stream, so nothing has to be installed on the far side but Python, numpy and the
runtime, and nothing is left behind. A runner that breaks off or hangs ends in one line that says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deploy import runner, timing
from supernet.errors import InputError

ANSWER_SECONDS = 120.0
"""Silence after which a runner is given up, beside the time that it was allowed to measure."""
END_SECONDS = 5.0
"""How long a runner may take to end when its input ends."""
MOST_LINE = 1 << 20
OLDEST = (3, 9)
"""Python that a runner needs."""


class Broken(InputError):
    """The connection to a runner ended; what it had answered stands."""


class Unable(InputError):
    """The machine is there, and cannot run a model: it has too little memory for it, or its runtime refuses it."""


class Far:
    """A runner in a Python that `command` starts with given arguments; it is started when it is first asked. A context manager.

    `name` is what errors call the place. Closing ends the runner; asked again, another one is started.
    """

    def __init__(self, command: Callable[[Sequence[str]], list[str]], name: str) -> None:
        self.name, self._command = name, command
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._buffer = b""

    def ask(self, job: Mapping[str, Any], models: Sequence[bytes] = (), *, seconds: float = 0.0) -> Iterator[dict[str, Any]]:
        """Answers to a job as they come. Raises `InputError` where it cannot be done, `Unable` where a model is to blame.

        Raises `Broken` where the connection ends.

        `seconds` is how long the next answer may rightly take, beside `ANSWER_SECONDS`.
        """
        whole = False
        try:
            self._send(json.dumps({"format": runner.FORMAT, **job}).encode() + b"\n", *models)
            while not whole:
                answer = self._answer(seconds)
                whole = "done" in answer or "error" in answer
                if "error" in answer:
                    kind = Unable if answer["error"] in ("memory", "model") else InputError
                    raise kind(f"{self.name}: {one_line(str(answer.get('text')), 1000)}")
                yield answer
        finally:
            if not whole:  # what else it answers would be taken for answers to the next job
                self.close()

    def hello(self, runtime: str) -> dict[str, Any]:
        """The far machine's fingerprint (`runner.fingerprint`). Where an old connection is gone meanwhile, of a new one."""
        old = self._process is not None
        try:
            first, *_ = self.ask({"do": "hello", "runtime": runtime})
        except Broken:
            if not old:
                raise
            first, *_ = self.ask({"do": "hello", "runtime": runtime})
        found = first.get("fingerprint")
        try:
            return machine_of(found)
        except ValueError as error:
            raise InputError(
                f"{self.name} says of itself what no machine is ({error}): is it a runner of this version?"
            ) from error

    def close(self) -> None:
        """End the runner."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._errors.close()

    def __enter__(self) -> Far:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, *parts: bytes) -> None:
        """Write all of it. A runner that reads nothing for `ANSWER_SECONDS` is given up."""
        process = self._started()
        assert process.stdin is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            for part in parts:
                left = memoryview(part)
                while left:
                    if not selector.select(ANSWER_SECONDS):
                        raise self._silent(ANSWER_SECONDS)
                    try:
                        left = left[os.write(process.stdin.fileno(), left[: 1 << 20]) :]
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        raise self._broken() from error

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            source = source_of_runner().encode()
            # One line without single quotes, which every login shell takes as it is once it is quoted; -B: no cache files are left
            code = f'import sys;exec(getattr(sys.stdin,"buffer",sys.stdin).read({len(source)}))'
            command = self._command(["-u", "-B", "-c", code])
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
                )
            except OSError as error:
                self._errors.close()
                raise InputError(f"{self.name}: {command[0]} cannot be started ({error.strerror}): install it") from error
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
            self._send(source)
        return self._process

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the runner."""
        process, end = self._process, time.monotonic() + ANSWER_SECONDS + seconds
        assert process is not None and process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if len(self._buffer) > MOST_LINE:
                    raise self._strange(self._buffer)
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise self._silent(ANSWER_SECONDS + seconds)
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self._broken()
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._strange(line)
        return answer

    def _strange(self, line: bytes) -> Broken:
        self.close()
        said = one_line(line[:80].decode(errors="replace"), 80)
        return Broken(
            f"{self.name} answered with something else than a runner does ({said!r}): see that its login prints no text"
        )

    def _silent(self, seconds: float) -> Broken:
        process = self._process
        assert process is not None
        process.kill()  # it hangs: it would not end by itself
        self.close()
        return Broken(f"{self.name} did not answer for {seconds:.0f} s and was given up: see whether it is still reachable, "
                      "then give the same command again, which goes on from there")  # fmt: skip

    def _broken(self) -> Broken:
        """Why the runner is gone, from its last words."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")[-4000:]
        words = [line.strip() for line in text.splitlines() if line.strip()]
        code = process.returncode
        self.close()
        last = one_line(words[-1], 300) if words else f"exit code {code}"
        return Broken(f"{self.name}: the connection ended ({last}): {_advice(last, code)}")


ADVICE = {
    "Permission denied": "see that `ssh` reaches it without a password (a key, an agent)",
    "Too many authentication failures": "name one key for it in ~/.ssh/config (IdentityFile, IdentitiesOnly yes)",
    "Host key verification failed": "connect once by hand and accept its key, or correct known_hosts",
    "Could not resolve hostname": "correct the name, or add it to ~/.ssh/config",
    "Connection refused": "start its ssh server, or correct the port",
    "timed out": "see whether it is switched on and reachable",
    "No route to host": "see whether it is switched on and reachable",
    "unreachable": "see whether it is switched on and reachable",
    "not found": "name its Python with ?python=/path/to/python3",
    "No such file or directory": "name its Python with ?python=/path/to/python3",
    "cannot execute": "name its Python with ?python=/path/to/python3",
    "MemoryError": "free memory there, or measure smaller models",
    "bad_alloc": "free memory there, or measure smaller models",
    "Killed": "see whether it has too little memory; free some there, or measure smaller models",
}
"""What helps, by what ssh, a shell or a runner said last."""


def _advice(words: str, code: int | None) -> str:
    found = next((advice for part, advice in ADVICE.items() if part.lower() in words.lower()), None)
    if found is None and code in (137, -9):
        found = ADVICE["Killed"]
    return found or "give the same command again, which goes on from there"


def one_line(text: str, most: int) -> str:
    """Text from elsewhere on one line, without what a terminal would obey, at most so many characters."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:most]


def machine_of(value: Any) -> dict[str, Any]:
    """What a runner says of its machine (`runner.fingerprint`), nothing else. Raises `ValueError` for what cannot be."""
    texts = ("processor", "machine", "runtime")
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in texts):
        raise ValueError(f"a machine has {', '.join(texts)} and cores")
    if type(value.get("cores")) is not int or not 1 <= value["cores"] <= 1 << 20:
        raise ValueError(f"a machine has 1 or more cores, not {str(value.get('cores'))[:40]}")
    return {"cores": value["cores"], **{name: one_line(value[name], 200) for name in texts}}


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def source_of_runner() -> str:
    """Python that becomes a runner: `timing.py` and `runner.py` as the modules of a package `deploy`, then its main function.

    What it needs is asked for first, in words that every Python reads.
    """
    assert timing.__name__ == "deploy.timing"
    return f"""import json, sys
def _refuse(kind, text):
    sys.stdout.write(json.dumps({{"error": kind, "text": text}}) + "\\n")
    sys.exit()
if sys.version_info < {OLDEST}:
    _refuse("python", "Python {OLDEST[0]}.{OLDEST[1]} or later is needed there, but %s is %s: name another with ?python=PATH"
            % (sys.executable, sys.version.split()[0]))
try:
    import numpy
except ImportError as error:
    _refuse("missing_numpy", "numpy cannot be imported by %s there (%s): install it there with %s -m pip install numpy"
            % (sys.executable, error, sys.executable))
{runner.bootstrap()}
from deploy import runner
sys.exit(runner.main())
"""
