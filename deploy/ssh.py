"""A machine behind ssh as a target: the user's own OpenSSH, with the user's keys and configuration, holds one connection to a runner.

Nothing is copied to the far disk and nothing is left there. Host keys are checked as the user's configuration says.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from deploy import grammar
from deploy.targets import Machine
from supernet.errors import InputError

OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
"""Nobody is asked for a password; a machine that cannot be reached, or is gone, is given up after a quarter or a whole minute."""


@dataclass(frozen=True)
class Ssh(Machine):
    """A machine that `ssh host` reaches without a password, with a Python that has numpy and the runtime.

    `host` is a name, an alias of ssh's configuration, an IPv4 address or an [IPv6] one; `python` a command or path there (a path that
    begins with no / is looked for in the home directory); `config` an ssh configuration to use in place of the user's own.
    """

    host: str = ""
    user: str | None = None
    port: int | None = None
    python: str = "python3"
    config: str | None = None

    kind: ClassVar[str] = "ssh"
    far_away: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        grammar.host(self.host)
        if self.user is not None:
            grammar.user(self.user)
        if self.port is not None:
            grammar.number(str(self.port), "a port", 1, 65535)
        grammar.far_path(self.python, "the far Python")
        if self.config is not None:
            grammar.local_path(self.config, "the ssh configuration")

    @property
    def address(self) -> str:
        """As people write it: ssh://user@host:port."""
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{'' if self.user is None else self.user + '@'}{self.host}{port}"

    @property
    def name(self) -> str:
        """The address, with what the target was told."""
        return self.address + super().name.removeprefix(self.kind)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The ssh that runs the far Python with these arguments. Raises `InputError` where its configuration is missing."""
        if self.config is not None and not Path(self.config).is_file():
            raise InputError(f"{self.address}: the ssh configuration {self.config!r} is no file: correct ?config=")
        given = [part for option in OPTIONS for part in ("-o", option)]
        given += [] if self.config is None else ["-F", self.config]
        given += [] if self.port is None else ["-p", str(self.port)]
        destination = ("" if self.user is None else f"{self.user}@") + self.host.strip("[]")
        return ["ssh", "-T", *given, "--", destination, f"exec {shlex.join([self.python, *arguments])}"]
