"""Reading targets: what each text becomes, and that nothing odd gets as far as a program."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.adb import Adb
from deploy.kit import Kit
from deploy.places import parse_target, parse_targets, read_targets
from deploy.ssh import Ssh
from deploy.targets import Local
from supernet.errors import InputError

READ: dict[str, Any] = {
    "local": Local(),
    "local:4": Local(4),
    "local?threads=4&runtime=openvino": Local(4, runtime="openvino"),
    "local?precision=int8": Local(precision="int8"),
    "kit": Kit(),
    "kit?threads=2": Kit(2),
    "ssh://board": Ssh(host="board"),
    "ssh://pi@raspberrypi.local": Ssh(host="raspberrypi.local", user="pi"),
    "ssh://pi@10.0.0.7:2222?threads=4": Ssh(4, host="10.0.0.7", user="pi", port=2222),
    "ssh://pi@[fe80::1%eth0]:22": Ssh(host="[fe80::1%eth0]", user="pi", port=22),
    "ssh://[::1]": Ssh(host="[::1]"),
    "ssh://b?python=/opt/py/bin/python3&config=/etc/a b": Ssh(host="b", python="/opt/py/bin/python3", config="/etc/a b"),
    "ssh://b?python=/a'b\"c%26%25/p": Ssh(host="b", python="/a'b\"c&%/p"),
    "adb:R58?binary=/x/onnxruntime_perf_test&threads=4": Adb(4, serial="R58", binary="/x/onnxruntime_perf_test"),
    "adb:10.0.0.5:5555?binary=b": Adb(serial="10.0.0.5:5555", binary="b"),
    "adb?python=/data/data/com.termux/files/usr/bin/python": Adb(python="/data/data/com.termux/files/usr/bin/python"),
}


@pytest.mark.parametrize("text", READ)
def test_a_text_becomes_the_target_that_it_says(text: str) -> None:
    assert parse_target(text) == READ[text]


def test_threads_and_precision_are_those_given_where_the_text_says_none() -> None:
    assert parse_target("local", threads=3, precision="int8") == Local(3, precision="int8")
    assert parse_target("local:2", threads=3) == Local(2)


@pytest.mark.parametrize(
    "target, name",
    [
        (READ["ssh://pi@10.0.0.7:2222?threads=4"], "ssh://pi@10.0.0.7:2222:threads=4"),
        (Ssh(host="host", user="pi", threads=4), "ssh://pi@host:threads=4"),
        (Kit(precision="int8"), "kit:threads=1,int8"),
        (READ["adb:R58?binary=/x/onnxruntime_perf_test&threads=4"], "adb:R58:threads=4"),
    ],
)
def test_names_of_targets(target: Any, name: str) -> None:
    assert target.name == name


WRONG = {
    "": "a target is local",
    "locl": "Did you mean 'local'?",
    "ssh:host": "a target is local",
    "ssh://": "a host is a name",
    "ssh://@host": "a user is a login name",
    "ssh://a@b@host": "a user is a login name",
    "ssh://host:": "a port is a number from 1 to 65535",
    "ssh://host:0": "a port is a number",
    "ssh://host:65536": "a port is a number",
    "ssh://host:22x": "a port is a number",
    "ssh://host:22:23": "a port is a number",
    "ssh://[::1": "a host is a name",
    "ssh://[::g]": "between brackets stands an IPv6 address",
    "ssh://[fe80::1%a;b]": "a network interface",
    "ssh://::1": "a host is a name",
    "ssh://host/path": "a host is a name",
    "ssh://hôst": "a host is a name",
    "ssh://host?thread=4": "Did you mean 'threads'?",
    "ssh://host?binary=x": "unknown key of ssh",
    "ssh://host?python": "KEY=VALUE",
    "ssh://host?python=": "KEY=VALUE",
    "ssh://host?": "KEY=VALUE",
    "ssh://host?threads=1&threads=2": "given twice",
    "ssh://host?threads=1&&": "KEY=VALUE",
    "ssh://host:22?port=23": "given twice",
    "ssh://host?threads=four": "threads is a number",
    "ssh://host?threads=٤": "threads is a number",
    "ssh://host?threads=0": "threads is a number",
    "ssh://host?python=%zz": "two hexadecimal digits",
    "ssh://host?python=%ff": "no UTF-8 text",
    "ssh://host?python=%0a": "a path of printable characters",
    "ssh://host?python=-c": "does not begin with '-'",
    "ssh://host?config=-oProxyCommand=x": "does not begin with '-'",
    "ssh://host?runtime=tensorflow": "the runtime of a target must be",
    "local:": "threads is a number",
    "local:1:2": "threads is a number",
    "local?precision=fp8": "the precision is one of",
    "local?host=a": "unknown key of local",
    "kit:4": "a target is local",
    "adb:R58": "needs one of ?binary=PATH",
    "adb:R58?binary=a&python=b": "needs one of ?binary=PATH",
    "adb:R 58?binary=a": "a serial number",
    "adb:-s?binary=a": "a serial number",
    "adb:a;b?binary=a": "a serial number",
    "local\n": "a line of printable text",
    "local\0": "a line of printable text",
    "x" * 5000: "a line of printable text",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_target_is_told_in_a_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_target(text)
    assert WRONG[text] in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@given(st.text(max_size=40), st.sampled_from(["", "ssh://", "ssh://a@", "adb:", "local?", "ssh://h?python=", "adb:x?binary="]))
def test_any_text_is_a_target_or_an_error_of_one_line_and_starts_nothing(text: str, start: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", fail)
        try:
            found = parse_target(start + text)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            assert found.name.isprintable() and " " not in found.name


def test_named_targets_stand_beside_this_machine() -> None:
    found = parse_targets(["pi=ssh://pi@host?threads=4", "laptop=local:2"], threads=3)
    assert found == {None: Local(3), "pi": Ssh(4, host="host", user="pi"), "laptop": Local(2)}


@pytest.mark.parametrize(
    "texts, said",
    [
        (["local"], "NAME=TARGET"),
        (["=local"], "NAME=TARGET"),
        (["a b=local"], "NAME=TARGET"),
        (["-a=local"], "NAME=TARGET"),
        (["a=local", "a=local:2"], "'a' was given twice: rename one"),
        (["a=nowhere"], "a target is local"),
    ],
)
def test_names_are_given_once_and_are_names(texts: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_targets(texts)


def test_a_file_names_targets_by_texts_and_by_mappings(tmp_path: Path) -> None:
    file = tmp_path / "targets.yaml"
    file.write_text(
        "format: 1\ntargets:\n  here: local:2\n  pi:\n    kind: ssh\n    host: '[::1]'\n    user: pi\n    port: 2222\n"
        "    python: /a b&c%/python\n    threads: 4\n  phone: {kind: adb, serial: R58, binary: /x}\n"
    )
    assert read_targets(file) == {
        "here": Local(2),
        "pi": Ssh(4, host="[::1]", user="pi", port=2222, python="/a b&c%/python"),
        "phone": Adb(serial="R58", binary="/x"),
    }


@pytest.mark.parametrize(
    "text, said",
    [
        ("targets: {a: local}", "has format: 1"),
        ("format: 2\ntargets: {a: local}", "has format: 1"),
        ("format: true\ntargets: {a: local}", "has format: 1"),
        ("format: 1", "must name targets"),
        ("format: 1\ntargets: [local]", "must name targets"),
        ("format: 1\ntarget: {a: local}", "Did you mean 'targets'?"),
        ("format: 1\ntargets: {a b: local}", "a target's name is"),
        ("format: 1\ntargets: {a: 4}", "a text or a mapping"),
        ("format: 1\ntargets: {a: {host: b}}", "'kind' must be one of"),
        ("format: 1\ntargets: {a: {kind: ssh, host: [b]}}", "must be a text or a whole number"),
        ("format: 1\ntargets: {a: {kind: ssh, hots: b}}", "Did you mean 'host'?"),
        ("format: 1\ntargets: {a: {kind: ssh, host: b, threads: 1.5}}", "must be a text or a whole number"),
        ("format: 1\ntargets: {a: {kind: ssh}}", "a: a host is a name"),
        ("format: 1\ntargets: {a: 'ssh://h;x'}", "a: a host is a name"),
        ("format: 1\ntargets: {a: local, a: local}", "stands here twice"),
        ('format: 1\ntargets: {a: {kind: ssh, host: h, python: "a\\nb"}}', "a path of printable characters"),
    ],
)
def test_a_file_with_a_mistake_is_told_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "targets.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=str(file)) as caught:
        read_targets(file)
    assert said in str(caught.value) and "\n" not in str(caught.value)
