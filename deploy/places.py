"""Reads targets: from a text as on the command line, or from a YAML file that names several.

    local   local:4   local?threads=4&runtime=openvino
    ssh://user@host:port?python=/opt/py/bin/python3&threads=4&config=/path/ssh_config
    kit?threads=4
    adb:SERIAL?binary=/path/to/onnxruntime_perf_test&threads=4   adb:SERIAL?python=/path/on/the/device

`&` and `%` within a value are written as in an address: %26, %25.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from deploy import grammar
from deploy.adb import Adb
from deploy.kit import Kit
from deploy.ssh import Ssh
from deploy.targets import Local, Target
from supernet import config
from supernet.errors import InputError

FORMAT = 1
"""Of targets.yaml."""
LONGEST_TEXT = 4096
EXAMPLES = "local, local:4, ssh://user@host?threads=4, kit or adb:SERIAL?binary=PATH"
KEYS: dict[str, tuple[str, ...]] = {
    "local": ("threads", "runtime", "precision"),
    "ssh": ("host", "user", "port", "python", "config", "threads", "runtime", "precision"),
    "kit": ("threads", "runtime", "precision"),
    "adb": ("serial", "binary", "python", "threads", "precision"),
}
"""Kind -> what it may be told."""
PRECISIONS = ("fp32", "int8")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def parse_target(text: str, *, threads: int = 1, precision: str = "fp32") -> Target:
    """The target that a text describes; `threads` and `precision` where it says none. Starts nothing. Raises `InputError`."""
    if len(text) > LONGEST_TEXT or not text.isprintable():
        raise InputError(f"a target is a line of printable text, such as {EXAMPLES}, but got {text[:100]!a}: correct it")
    place, _, query = text.partition("?")
    values = _place(place)
    for part in query.split("&") if "?" in text else ():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise InputError(f"{_shown(text)}: after '?' stand KEY=VALUE joined by '&', but got {part[:100]!r}: correct it")
        if key in values:
            raise InputError(f"{_shown(text)}: {key[:100]!r} is given twice: leave one out")
        values[key] = _decoded(value, text)
    return _target(values, _shown(text), threads, precision)


def parse_targets(texts: Sequence[str], *, threads: int = 1, precision: str = "fp32") -> dict[str | None, Target]:
    """The targets of `--target NAME=TEXT`, and this machine at `threads` threads without a name. Raises `InputError`."""
    found: dict[str | None, Target] = {None: Local(threads, precision=precision)}
    for text in texts:
        name, equals, target = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise InputError(f"a target is written NAME=TARGET, such as pi4=ssh://pi@host?threads=4, but got {text[:100]!a}")
        if name in found:
            raise InputError(f"every target has a name of its own, but {name[:100]!r} was given twice: rename one")
        found[name] = parse_target(target, precision=precision)
    return found


def read_targets(path: Path, *, precision: str = "fp32") -> dict[str, Target]:
    """The targets of a YAML file: `format: 1`, and `targets`, a mapping of names to texts or to mappings of the same keys.

    A mapping says its `kind` beside them. Raises `InputError`.
    """
    value = config.read(path)
    unknown = sorted(set(value) - {"format", "targets"})
    if unknown:
        raise InputError(f"{path}: {unknown[0][:100]!r}: unknown key{config.nearest(unknown[0], ['format', 'targets'])}")
    if type(value.get("format")) is not int or value["format"] != FORMAT:
        raise InputError(f"{path}: a file of targets has format: {FORMAT}, but got {str(value.get('format'))[:40]!r}")
    listed = value.get("targets")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{path}: 'targets' must name targets, such as pi4: ssh://pi@host")
    found: dict[str, Target] = {}
    for name, given in listed.items():
        if not _NAME.fullmatch(name):
            raise InputError(f"{path}: a target's name is letters, digits, '.', '_' and '-', but got {name[:100]!a}")
        where = f"{path}: {name}"
        try:
            found[name] = (
                parse_target(given, precision=precision) if isinstance(given, str) else _mapped(given, where, precision)
            )
        except InputError as error:
            raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from error
    return found


def _place(text: str) -> dict[str, str]:
    """Kind and address, of what stands before the question mark."""
    if text.startswith("ssh://"):
        return {"kind": "ssh", **_address(text.removeprefix("ssh://"))}
    kind, colon, rest = text.partition(":")
    if kind == "local" and colon:
        return {"kind": kind, "threads": rest}
    if kind == "adb":
        return {"kind": kind, "serial": rest}
    if kind in ("local", "kit") and not colon:
        return {"kind": kind}
    raise InputError(f"a target is {EXAMPLES}, but got {text[:100]!a}{config.nearest(kind, list(KEYS))}")


def _address(text: str) -> dict[str, str]:
    user, at, rest = text.rpartition("@")
    bracketed = re.fullmatch(r"(\[[^\]]*\])(?::(.*))?", rest)
    host, colon, port = rest.partition(":")
    if bracketed:
        host, port = bracketed[1], bracketed[2] or ""
        colon = ":" if bracketed[2] is not None else ""
    return {"host": host, **({"user": user} if at else {}), **({"port": port} if colon else {})}


def _decoded(value: str, text: str) -> str:
    if _PERCENT.search(value):
        raise InputError(f"{_shown(text)}: % begins two hexadecimal digits: write %25 for itself")
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError as error:
        raise InputError(f"{_shown(text)}: what stands after % is no UTF-8 text: correct it") from error


def _mapped(given: Any, where: str, precision: str) -> Target:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: a target is a text or a mapping with its kind, but got {str(given)[:100]!r}: correct it")
    values: dict[str, str] = {}
    for key, value in given.items():
        if type(value) not in (str, int):
            raise InputError(
                f"{where}: {key[:100]!r} must be a text or a whole number, but got {str(value)[:100]!r}: correct it"
            )
        values[key] = str(value)
    if values.get("kind") not in KEYS:
        raise InputError(
            f"{where}: 'kind' must be one of {', '.join(KEYS)}, but got {values.get('kind', '')[:100]!r}: correct it"
        )
    return _target(values, where, 1, precision)


def _target(values: Mapping[str, str], where: str, threads: int, precision: str) -> Target:
    kind = values["kind"]
    told = {key: value for key, value in values.items() if key != "kind"}
    for key in told:
        if key not in KEYS[kind]:
            near = config.nearest(key, list(KEYS[kind])) or f"; known are {', '.join(KEYS[kind])}"
            raise InputError(f"{where}: {key[:100]!r}: unknown key of {kind}{near}")
    options: dict[str, Any] = {**told, "threads": threads, "precision": told.get("precision", precision)}
    if "threads" in told:
        options["threads"] = grammar.number(told["threads"], "threads", 1, 1024)
    if kind == "ssh":
        grammar.host(told.get("host", ""))  # before the port, which it may have been taken for
    if "port" in told:
        options["port"] = grammar.number(told["port"], "a port", 1, 65535)
    if options["precision"] not in PRECISIONS:
        raise InputError(
            f"{where}: the precision is one of {', '.join(PRECISIONS)}, but got {options['precision'][:100]!r}: correct it"
        )
    made: dict[str, Any] = {"local": Local, "ssh": Ssh, "kit": Kit, "adb": Adb}
    target: Target = made[kind](**options)
    return target


def _shown(text: str) -> str:
    return ascii(text)[1:-1][:100]
