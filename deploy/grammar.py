"""What users, hosts, serial numbers and paths may be that other programs are given: strict, since shells and ssh read much into them.

Each function gives back what it was given, or raises `InputError` on one line. They are asked before anything is started.
"""

from __future__ import annotations

import ipaddress
import re

from supernet.errors import InputError

LONGEST = 255
LONGEST_PATH = 1024

_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_ZONE = re.compile(r"[A-Za-z0-9._-]{1,32}")
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_NUMBER = re.compile(r"[0-9]{1,6}")
_EXPANDED = set("$`\\!")
"""What some login shell replaces even between quotes."""


def user(text: str) -> str:
    """A login name: letters, digits, `.`, `_`, `-`, the first none of `.` and `-`."""
    if not _USER.fullmatch(text) or len(text) > LONGEST:
        raise InputError(f"a user is a login name of letters, digits, '.', '_' and '-', but got {_shown(text)}: correct it")
    return text


def host(text: str) -> str:
    """A host name, an alias of ssh's configuration, an IPv4 address, or an IPv6 address in brackets."""
    if text.startswith("[") and text.endswith("]"):
        address, percent, zone = text[1:-1].partition("%")
        try:
            ipaddress.IPv6Address(address)
        except ValueError as error:
            raise InputError(f"between brackets stands an IPv6 address, but got {_shown(text)}: correct it") from error
        if percent and not _ZONE.fullmatch(zone):
            raise InputError(f"after % stands the name of a network interface, but got {_shown(text)}: correct it")
        return text
    if not _HOST.fullmatch(text) or len(text) > LONGEST:
        raise InputError(
            f"a host is a name of letters, digits, '.', '_' and '-', an alias of ~/.ssh/config, an IPv4 address or an [IPv6] one, "
            f"but got {_shown(text)}: correct it"
        )
    return text


def number(text: str, what: str, least: int, most: int) -> int:
    """A whole number in a range, in plain digits."""
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise InputError(f"{what} is a number from {least} to {most}, but got {_shown(text)}: correct it")
    return int(text)


def serial(text: str) -> str:
    """The serial number of an Android device as `adb devices` lists it, which may be HOST:PORT."""
    if not _SERIAL.fullmatch(text) or len(text) > LONGEST:
        raise InputError(f"a device has a serial number as `adb devices` lists it, but got {_shown(text)}: correct it")
    return text


def local_path(text: str, what: str) -> str:
    """A path on this machine that is given to a program: no control characters, and none that begins like an option."""
    if not text or len(text) > LONGEST_PATH or not text.isprintable() or text.startswith("-"):
        raise InputError(
            f"{what} is a path of printable characters that does not begin with '-', but got {_shown(text)}: correct it"
        )
    return text


def far_path(text: str, what: str) -> str:
    """A path on another machine, which a shell there will be given between quotes. It may hold spaces and quotes."""
    local_path(text, what)
    if set(text) & _EXPANDED:
        raise InputError(
            f"{what} is a path without '$', '`', '!' and '\\', which some shells replace even between quotes, but got {_shown(text)}: "
            "link to it by another name"
        )
    return text


def _shown(text: str) -> str:
    return ascii(text[:100])
