"""Measuring behind adb: a scripted adb records what it is told, keeps a device's files in a folder and has a real shell."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import adb
from deploy.adb import FOLDER, Adb, parse_perf_test, timing_of
from deploy.probe import probe
from deploy.targets import Model
from deploy.timing import Timing
from supernet.errors import InputError
from supernet.space import load_space

FAKE = """#!/bin/sh
home={home}
for argument; do printf '%s\\0' "$argument" >> "$home/log"; done
printf '\\n\\0' >> "$home/log"
there() {{ printf '%s' "$1" | sed "s|/data/local/tmp|$home/tmp|g"; }}
if [ "$*" = devices ]; then
    echo List of devices attached
    cat "$home/devices"
    exit
fi
if [ -e "$home/fault" ] && printf '%s' "$*" | grep -qF -- "$(cat "$home/fault")"; then
    printf 'adb: error: %s\\n' "$(cat "$home/words")" >&2
    exit 1
fi
if [ "$3" = push ]; then
    cat "$4" > "$(there "$5")"
    echo 1 file pushed
else
    [ "$3 $4 $#" = "shell -T 5" ] || exit 99
    exec sh -c "$(there "$5")"
fi
"""
PRINTS = """Session creation time cost: 0.0147 s
First inference time cost: 11 ms
Total inference time cost: 1.18 s
Total inference requests: 100
Average inference time cost: {average} ms
Total inference run time: 1.19 s
Number of inferences per second: 84.2
Avg CPU usage: 49 %
Peak working set size: 68 bytes
Min Latency: {least} s
Max Latency: 0.02 s
P50 Latency: {median} s
P90 Latency: 0.0121 s
P95 Latency: {p95} s
P99 Latency: 0.0135 s
P999 Latency: 0.0139 s
"""
USUAL = PRINTS.format(average=11.83, least=0.0117, median=0.0118, p95=0.0123)


class Device:
    """The made-up adb's device, and what it was told."""

    def __init__(self, home: Path) -> None:
        self.home, self.binary = home, home / "my perf test"
        (home / "tmp").mkdir()
        self.says(USUAL)
        self.devices("R58\tdevice")
        for name, lines in {
            "getprop": 'case "$1" in ro.product.model) echo "Pixel 9";; ro.board.platform) echo zuma;; *) echo arm64-v8a;; esac',
            "nproc": "echo 8",
            "adb": "",
            "canary": f": > {shlex.quote(str(home / 'canary'))}",
        }.items():
            path = home / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(FAKE.format(home=shlex.quote(str(home))) if name == "adb" else f"#!/bin/sh\n{lines}\n")
            path.chmod(0o755)

    def says(self, text: str) -> None:
        """What the perf test prints."""
        self.binary.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")

    def devices(self, *lines: str) -> None:
        (self.home / "devices").write_text("".join(f"{line}\n" for line in lines))

    def fails(self, what: str, words: str) -> None:
        (self.home / "fault").write_text(what)
        (self.home / "words").write_text(words)

    def told(self) -> list[list[str]]:
        log = self.home / "log"
        calls = log.read_text().split("\n\0")[:-1] if log.exists() else []
        return [call.split("\0")[:-1] for call in calls]

    @property
    def left(self) -> list[Path]:
        return list((self.home / "tmp").iterdir())


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(adb, "ROUNDS", 2)
    return made


MODELS = [Model(b"one", 1, 8), Model(b"two", 1, 8)]


def test_models_are_pushed_run_and_removed_one_after_the_other(device: Device) -> None:
    told: list[int] = []
    found = Adb(serial="R58", binary=str(device.binary), threads=4).measure(MODELS, each=lambda at, _: told.append(at))
    assert told == [0, 1]
    assert [timing.latency_ms for timing in found] == pytest.approx([11.7, 11.7])
    assert {timing.clock for timing in found} == {"wall"} and all(timing.stable for timing in found)
    assert found[0].samples == 2 * round(1000 / 11.83)
    assert device.left == []
    calls = [call for call in device.told() if call != ["devices"]]
    assert all(call[:2] == ["-s", "R58"] for call in calls)
    runs = [shlex.split(call[4]) for call in calls if call[2] == "shell" and "perf_test -e" in call[4]]
    assert len(runs) == 2 * 3
    folder = runs[0][0].removesuffix("/perf_test")
    assert folder.startswith(f"{FOLDER}/nestling-")
    assert runs[0][1:] == ["-e", "cpu", "-m", "times", "-r", "10", "-x", "4", "-I", f"{folder}/0.onnx"]
    assert [shlex.split(call[4])[0] for call in calls if call[2] == "shell" and "perf_test" not in call[4]] == [
        "mkdir",
        "rm",
        "rm",
        "rm",
    ]
    assert [call[4] for call in calls if call[2] == "push"] == [
        f"{folder}/{name}" for name in ("perf_test", "0.onnx", "1.onnx")
    ]


def test_nothing_to_measure_asks_nobody(device: Device) -> None:
    assert Adb(serial="R58", binary=str(device.binary)).measure([]) == []
    assert device.told() == []


def test_a_fingerprint_names_device_platform_cores_and_the_perf_test(device: Device) -> None:
    found = Adb(serial="R58", binary=str(device.binary), threads=4).fingerprint()
    assert found["processor"] == "Pixel 9 (zuma)" and found["machine"] == "arm64-v8a" and found["cores"] == 8
    assert found["clock"] == "least wall time" and found["threads"] == 4
    assert found["runtime"].startswith("onnxruntime_perf_test ")
    device.says("another")
    assert Adb(serial="R58", binary=str(device.binary), threads=4).fingerprint()["hash"] != found["hash"]


@pytest.mark.parametrize(
    "lines, serial, said",
    [
        ([], "R58", "there is no such device .adb lists none.: connect it"),
        (["X1\tdevice"], "R58", "there is no such device .adb lists X1."),
        ([], "", "adb:threads=1: there is no such device"),
        (["R58\tunauthorized"], "R58", "is unauthorized: unlock it and allow USB debugging"),
        (["R58\toffline"], "R58", "is offline"),
        (["R58\tno permissions (udev); see [http://x]"], "R58", "is no permissions"),
        (["R58\tdevice", "X1\tdevice"], "", "several devices .R58, X1.: name one"),
    ],
)
def test_a_device_that_is_not_there_is_told(device: Device, lines: list[str], serial: str, said: str) -> None:
    device.devices(*lines)
    for ask in (
        lambda: Adb(serial=serial, binary=str(device.binary)).measure(MODELS),
        Adb(serial=serial, python="python3").fingerprint,
    ):
        with pytest.raises(InputError, match=said) as caught:
            ask()
        assert str(caught.value).isprintable()


def test_the_only_device_needs_no_serial_number(device: Device) -> None:
    assert len(Adb(binary=str(device.binary)).measure(MODELS[:1])) == 1
    assert ["-s", "R58"] in [call[:2] for call in device.told()]


@pytest.mark.parametrize("serial", ["$(canary)", "a b", "-s", "a;canary", "`canary`", "a\ncanary", "a\0b", "x" * 300, "é"])
def test_a_hostile_serial_number_starts_nothing(device: Device, serial: str) -> None:
    with pytest.raises(InputError, match="a serial number as `adb devices` lists it"):
        Adb(serial=serial, binary=str(device.binary))
    assert device.told() == []


@pytest.mark.parametrize("python", ["; canary", "' ; canary ; '", "a b", '" canary', "(canary)", "> canary", "& canary", "*"])
def test_a_hostile_python_is_one_argument_on_the_device(device: Device, python: str) -> None:
    with pytest.raises(InputError):
        Adb(serial="R58", python=python).fingerprint()
    assert not (device.home / "canary").exists()
    assert shlex.split(device.told()[-1][4])[:2] == ["exec", python]


@pytest.mark.parametrize(
    "what, words, said",
    [
        ("push", "failed to copy: No space left on device", "adb push failed .*No space left on device.: make room there"),
        ("0.onnx", "failed to copy", "adb push failed"),
        ("perf_test -e", "device offline", "adb shell failed .*device offline.: see that the device is still there"),
        ("mkdir", "read-only", "adb shell failed"),
        ("chmod", "no", "adb shell failed"),
    ],
)
def test_a_failure_ends_in_a_line_and_the_folder_goes(device: Device, what: str, words: str, said: str) -> None:
    device.fails(what, words)
    with pytest.raises(InputError, match=said) as caught:
        Adb(serial="R58", binary=str(device.binary)).measure(MODELS)
    assert str(caught.value).isprintable()
    assert device.left == []


def test_what_was_timed_before_a_failure_is_told(device: Device) -> None:
    told: list[int] = []

    def unplug(at: int, timing: Timing) -> None:
        told.append(at)
        device.devices()

    with pytest.raises(InputError, match="no such device"):
        Adb(serial="R58", binary=str(device.binary)).measure(MODELS, each=unplug)
    assert told == [0]


def test_a_hang_is_cut_off(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "RUN_SECONDS", 0.5)
    device.binary.write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(InputError, match="did not end within 0 s"):
        Adb(serial="R58", binary=str(device.binary)).measure(MODELS)
    assert device.left == []


def test_a_missing_adb_and_a_missing_binary_are_told(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'/no/binary' is no file: correct \?binary="):
        Adb(serial="R58", binary="/no/binary").measure(MODELS)
    monkeypatch.setenv("PATH", str(tmp_path / "tmp"))
    with pytest.raises(
        InputError, match=r"adb cannot be started .No such file or directory.: install Android's platform tools"
    ):
        Adb(serial="R58", binary=str(device.binary)).measure(MODELS)


def test_a_perf_test_weighs_nothing(device: Device) -> None:
    target = Adb(serial="R58", binary=str(device.binary))
    with pytest.raises(InputError, match="weighs nothing"):
        target.weigh(MODELS)
    assert set(target.conditions().values()) == {None}


def test_a_python_on_the_device_is_a_runner(device: Device) -> None:
    space = load_space("digits")
    model = Model(probe(space, space.smallest), 1, space.resolution(space.smallest))
    target = Adb(serial="R58", python=sys.executable)
    (timing,) = target.measure([model], width=10.0, most_seconds=0.2)
    assert timing.clock == "wall" and timing.latency_ms > 0
    found = target.fingerprint()
    assert found["processor"] == "Pixel 9 (zuma)" and found["runtime"].startswith("onnxruntime 1.")
    assert device.left == []
    target.close()


# --- what a perf test prints ---


def test_the_times_of_a_perf_test_are_read() -> None:
    found = parse_perf_test(USUAL)
    assert found["mean"] == 11.83
    assert [found[name] for name in ("Min", "P50", "P95")] == pytest.approx([11.7, 11.8, 12.3])


@pytest.mark.parametrize(
    "text",
    [
        "", "Segmentation fault", USUAL.replace("Average", "Middle"), USUAL.replace("Min Latency: 0.0117 s\n", ""),
        USUAL.replace("0.0117", "nan"), USUAL.replace("0.0117", "0"), USUAL.replace("0.0117", "-1"), USUAL.replace("0.0117", "0.5"),
        USUAL.replace("0.0123", "0.001"), USUAL.replace("0.0123", "1e999"), USUAL.replace("11.83", "1e999"),
        USUAL.replace("11.83", "0"),
        USUAL.replace("11.83", "-"), "\x1b[2J" * 99,
    ],
)  # fmt: skip
def test_what_is_no_measurement_is_told(device: Device, text: str) -> None:
    with pytest.raises(ValueError):
        parse_perf_test(text)
    device.says(text)
    with pytest.raises(InputError, match="onnxruntime_perf_test gave no latency") as caught:
        Adb(serial="R58", binary=str(device.binary)).measure(MODELS)
    assert str(caught.value).isprintable() and device.left == []


def test_several_launches_become_a_timing_by_their_least_times() -> None:
    rounds: list[dict[str, Any]] = [
        {"Min": 10.0, "P50": 10.2, "P95": 12.0, "mean": 10.5},
        {"Min": 9.9, "P50": 15.0, "P95": 30.0, "mean": 18.0},
    ]
    found = timing_of(rounds, 50, 0.04)
    assert (found.latency_ms, found.low_ms, found.high_ms, found.samples, found.stable) == (9.9, 9.9, 10.2, 100, True)
    narrow = timing_of(rounds, 50, 0.01)
    assert not narrow.stable and "3.0 % above the least or more, 1 % is asked for: the times vary" in narrow.why
    assert Timing.from_dict(narrow.as_dict()) == narrow
    assert timing_of([{**rounds[1], "mean": 40.0}], 50, 0.01).throttled
