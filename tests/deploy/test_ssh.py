"""Measuring behind ssh: what is given to ssh and to the far shell, and a real sshd on this machine."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import pytest

from deploy import far, runner, targets
from deploy.places import parse_target
from deploy.probe import probe
from deploy.ssh import Ssh
from deploy.targets import Local, Machine, Model
from deploy.timing import Timing
from supernet.errors import InputError
from supernet.space import load_space

QUICK = {"width": 10.0, "most_seconds": 0.2}


@pytest.fixture(scope="module")
def tiny() -> Model:
    space = load_space("digits")
    return Model(probe(space, space.smallest), 1, space.resolution(space.smallest))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "PAUSE_SECONDS", 0.0)


# --- a made-up ssh, which runs what it is given in a real shell ---

FAKE = """#!/bin/sh
for argument; do printf '%s\\0' "$argument" >> "$SSH_LOG"; done
printf '\\n\\0' >> "$SSH_LOG"
for command; do :; done
exec sh -c "$command"
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the made-up ssh writes its arguments; a command `canary` on the PATH makes a file of that name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"ssh": FAKE, "canary": f"#!/bin/sh\n: > {shlex.quote(str(tmp_path / 'canary'))}\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "log"


def logged(log: Path) -> list[list[str]]:
    if not log.exists():
        return []
    calls = log.read_text().split("\n\0")[:-1]
    return [call.split("\0")[:-1] for call in calls]


def test_ssh_is_given_its_options_the_host_and_one_command(log: Path, tiny: Model, tmp_path: Path) -> None:
    config = tmp_path / "my config"
    config.write_text("")
    python = tmp_path / 'it\'s a "python"'
    python.symlink_to("/bin/false")
    target = parse_target(f"ssh://pi@[::1]:2222?python={python}&config={config}&threads=4")
    with pytest.raises(
        InputError, match=r"ssh://pi@\[::1\]:2222:threads=4: the connection ended .exit code 1.: give the same command"
    ):
        target.fingerprint()
    (call,) = logged(log)
    options = [part for option in ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
               for part in ("-o", option)]  # fmt: skip
    assert call[:-1] == ["-T", *options, "-F", str(config), "-p", "2222", "--", "pi@::1"]
    assert shlex.split(call[-1])[:5] == ["exec", str(python), "-u", "-B", "-c"]
    assert not any("StrictHostKeyChecking" in part for part in call)


def test_models_are_measured_through_the_shell_of_the_far_side(log: Path, tiny: Model) -> None:
    target = Ssh(host="board", python=sys.executable)
    (timing,) = target.measure([tiny], **QUICK)
    assert timing.latency_ms > 0
    assert len(logged(log)) == 1
    assert target.fingerprint()["hash"] == Local().fingerprint()["hash"]  # the machine, not the way to it
    target.close()


PARTS = [
    "; canary", "& canary", "&& canary", "| canary", "|| canary", "$(canary)", "`canary`", "\ncanary", "\r\ncanary\r\n", "\0canary",
    "-oProxyCommand=canary", "-o ProxyCommand=canary", "--", "-", "-Fcanary", "' ; canary ; '", '" ; canary ; "', "'; canary #",
    "\\'; canary; \\'", "${IFS}canary", "$IFS$9canary", "> canary", "< canary", "!canary", "{canary,}", "*", "?", "~", "#canary",
    "%0acanary", "%h", "%n", "%p;canary", "\tcanary", " canary", "a b", "a\x7fb", "\x1b[31m", "\u202ecanary", "é", "\u2028canary",
    "(canary)", "[canary]", "{ canary; }", "a=b canary", "exec canary", "../canary", "/../../canary", "$((canary))", "$'\\ncanary'",
]  # fmt: skip
HOSTILE = [*PARTS, *(f"a{part}" for part in PARTS), *(f"{part}a" for part in PARTS)]
PLACES: dict[str, Callable[[str], str]] = {
    "user": "ssh://{}@host?python=/no/python".format,
    "host": "ssh://{}?python=/no/python".format,
    "port": "ssh://host:{}?python=/no/python".format,
    "python": "ssh://host?python={}".format,
    "config": "ssh://host?python=/no/python&config={}".format,
    "serial": "adb:{}?python=/no/python".format,
}


def started(text: str, log: Path, canary: Path) -> bool:
    """Whether a target is taken and ssh started; the canary must not sing."""
    try:
        parse_target(text).fingerprint()
    except InputError as error:
        assert "\n" not in str(error)
    assert not canary.exists(), text
    found = bool(logged(log))
    log.unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_no_hostile_text_reaches_a_shell(place: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 900 texts those in users, hosts, ports and serial numbers are refused but for harmless ones (a-, an escaped b)."""
    texts = HOSTILE if place != "python" else HOSTILE[::3]
    for text in texts:
        reached = started(PLACES[place](text), log, tmp_path / "canary")
        dangerous = set(text) & set(";&|$`\n\r\0'\"\\<>!{}*?~#\t ()[]=") or text.startswith("-")
        if place in ("host", "port", "serial") and not text.endswith("-"):
            assert not reached or not dangerous or "?" in text, text


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_path_on_the_far_side_is_one_argument_or_refused(text: str, log: Path, tmp_path: Path) -> None:
    for written in (text, quote(text), f"/opt/{text}/python", quote(f"/opt/{text}/python")):
        started(f"ssh://host?python={written}", log, tmp_path / "canary")
    for machine in ({"python": text}, {"python": f"/opt/{text}"}, {"user": text}, {"host": text}):
        with suppress(InputError):
            Ssh(**{"host": "host", "python": "/no/python", **machine}).fingerprint()
        assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("text", ["-oProxyCommand=canary", "a\nb", "a\0b", "$(canary)", "`canary`", "a b", "a;b", "a'b", ""])
def test_users_and_hosts_are_refused_before_anything_starts(text: str, log: Path) -> None:
    for wrong in ({"user": text}, {"host": text}):
        with pytest.raises(InputError):
            Ssh(**{"host": "host", **wrong})
    assert logged(log) == []


def test_a_configuration_that_is_missing_is_told(log: Path) -> None:
    with pytest.raises(InputError, match="the ssh configuration '/no/config' is no file"):
        parse_target("ssh://board?config=/no/config").fingerprint()
    assert logged(log) == []


def test_a_missing_ssh_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"ssh cannot be started .No such file or directory.: install it"):
        parse_target("ssh://board").fingerprint()


SAID = {
    "ssh: Could not resolve hostname nowhere: Name or service not known": "correct the name",
    "ssh: connect to host board port 22: Connection refused": "start its ssh server, or correct the port",
    "ssh: connect to host board port 22: Connection timed out": "switched on",
    "ssh: connect to host board port 22: No route to host": "switched on",
    "pi@board: Permission denied (publickey).": "without a password",
    "Host key verification failed.": "connect once by hand",
    "sh: 1: exec: python3: not found": "?python=",
    "bash: line 1: /opt/python: No such file or directory": "?python=",
    "client_loop: send disconnect: Broken pipe": "goes on from there",
    "Killed": "too little memory",
}


@pytest.mark.parametrize("words", SAID)
def test_what_ssh_says_last_is_told_with_what_helps(words: str, log: Path) -> None:
    (log.parent / "bin" / "ssh").write_text(
        f"#!/bin/sh\necho 'Warning: something else' >&2\necho {shlex.quote(words)} >&2\nexit 255\n"
    )
    with pytest.raises(InputError) as caught:
        parse_target("ssh://board").fingerprint()
    assert words in str(caught.value) and SAID[words] in str(caught.value) and "\n" not in str(caught.value)


def test_a_login_that_prints_text_is_told(log: Path) -> None:
    (log.parent / "bin" / "ssh").write_text(FAKE.replace("exec sh", "echo Welcome to the board\nexec sh"))
    with pytest.raises(InputError, match=r"'Welcome to the board'.: see that its login prints no text"):
        Ssh(host="board", python=sys.executable).fingerprint()


def test_a_hang_is_cut_off(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "ANSWER_SECONDS", 0.3)
    (log.parent / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(InputError, match="did not answer for 0 s and was given up"):
        Ssh(host="board").fingerprint()


def test_an_old_python_is_told(log: Path, tmp_path: Path) -> None:
    old = next(iter(sorted(Path.home().glob(".pyenv/versions/3.[678].*/bin/python"))), None)
    if old is None:
        pytest.skip("no Python before 3.9 is at ~/.pyenv/versions")
    with pytest.raises(InputError, match=r"Python 3.9 or later is needed there, but .* is 3.[678]"):
        Ssh(host="board", python=str(old)).fingerprint()


# --- a real sshd ---

SSHD = shutil.which("sshd") or next((path for path in ("/usr/sbin/sshd",) if Path(path).exists()), None)


def no_sshd() -> str | None:
    """Why the tests with a real sshd cannot run here."""
    if SSHD is None or shutil.which("ssh") is None:
        return "no sshd and ssh are here (apt-get install openssh-server)"
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return None if Path("/run/sshd").is_dir() else "/run/sshd is missing, and only root may make it"


real = [pytest.mark.slow, pytest.mark.skipif(SSHD is None, reason="no sshd is here (apt-get install openssh-server)")]


@dataclass
class Server:
    """A running sshd with its keys; `config` is the ssh configuration that reaches it as `board`."""

    process: subprocess.Popen[bytes]
    config: Path
    port: int

    def target(self, **options: object) -> Ssh:
        return Ssh(**{"host": "board", "config": str(self.config), "python": sys.executable, **options})

    def changed(self, name: str, **lines: str) -> Path:
        """A configuration in which some lines are others."""
        text = self.config.read_text()
        for key, value in lines.items():
            text = "\n".join(f"  {key} {value}" if line.split()[:1] == [key] else line for line in text.splitlines())
        path = self.config.with_name(name)
        path.write_text(text + "\n")
        return path

    def sessions(self) -> list[int]:
        """Processes of connections, the runners among them."""
        found, level = [], [self.process.pid]
        while level:
            level = [int(pid) for parent in level for path in Path(f"/proc/{parent}/task").glob("*/children")
                     for pid in path.read_text().split()]  # fmt: skip
            found += level
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if reason := no_sshd():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host_key", "key", "other_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "key.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    (folder / "unknown").write_text("")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        "PrintMotd no\nPrintLastLog no\nMaxStartups 100\n"
    )
    (folder / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/key\n"
        f"  IdentitiesOnly yes\n  IdentityAgent none\n  UserKnownHostsFile {folder}/known\n  GlobalKnownHostsFile none\n"
        "  StrictHostKeyChecking yes\n"
    )
    with (folder / "log").open("wb") as log_file:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=log_file)
    try:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield Server(process, folder / "config", port)
    finally:
        process.terminate()
        process.wait()


def wrapper(path: Path, lines: str) -> str:
    path.write_text(f'#!/bin/sh\n{lines}\nexec {shlex.quote(sys.executable)} $OPTIONS "$@"\n')
    path.chmod(0o755)
    return str(path)


class TestRealSshd:
    pytestmark = real

    def test_a_model_is_measured_as_here(self, server: Server, tiny: Model) -> None:
        target = server.target()
        (timing,) = target.measure([tiny], **QUICK)
        assert timing.latency_ms > 0 and timing.clock == "cpu"
        assert target.fingerprint() == Local().fingerprint()
        assert target.weigh([tiny], seconds=0.01)[0].resident_bytes > 1 << 20
        target.close()

    def test_after_a_drop_in_the_middle_it_goes_on_and_no_runner_stays(self, server: Server, tiny: Model) -> None:
        told: list[int] = []
        first: list[int] = []

        def drop(at: int, timing: Timing) -> None:
            told.append(at)
            if len(told) == 5:
                first.extend(server.sessions())
                os.kill(first[0], signal.SIGKILL)

        target = server.target()
        found = target.measure([tiny] * (runner.AT_ONCE + 3), **QUICK, each=drop)
        assert sorted(told) == list(range(len(found)))
        assert len(first) >= 2
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in first):
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in first)
        target.close()

    def test_a_machine_that_is_gone_for_good_keeps_what_was_told(self, server: Server, tiny: Model, tmp_path: Path) -> None:
        told: list[int] = []
        config = server.changed("config-gone")

        def drop(at: int, timing: Timing) -> None:
            told.append(at)
            if len(told) == 1:
                server.changed("config-gone", Port="1")
                os.kill(server.sessions()[0], signal.SIGKILL)

        with pytest.raises(InputError, match="Connection refused"):
            server.target(config=str(config)).measure([tiny] * (runner.AT_ONCE + 1), **QUICK, each=drop)
        assert 1 <= len(told) <= runner.AT_ONCE

    @pytest.mark.parametrize(
        "lines, said",
        [
            ({"IdentityFile": "{folder}/other_key"}, "Permission denied .*without a password"),
            ({"IdentityFile": "/no/key"}, "Permission denied .*without a password"),
            ({"Port": "1"}, "Connection refused.*correct the port"),
            ({"UserKnownHostsFile": "{folder}/unknown"}, "Host key verification failed.*accept its key"),
            ({"HostName": "nowhere.invalid"}, "Could not resolve hostname.*correct the name"),
        ],
    )
    def test_a_connection_that_cannot_be_made(self, server: Server, lines: dict[str, str], said: str) -> None:
        config = server.changed("changed", **{key: value.format(folder=server.config.parent) for key, value in lines.items()})
        with pytest.raises(InputError, match=said) as caught:
            server.target(config=str(config)).fingerprint()
        assert "\n" not in str(caught.value)

    def test_a_python_that_is_not_there(self, server: Server) -> None:
        for python in ("/no/python", "nosuchpython"):
            with pytest.raises(InputError, match=r"name its Python with \?python="):
                server.target(python=python).fingerprint()

    def test_a_python_without_numpy_or_onnxruntime(self, server: Server, tmp_path: Path) -> None:
        bare = wrapper(tmp_path / "bare", "OPTIONS='-S -E'")
        with pytest.raises(InputError, match=r"numpy cannot be imported by .*: install it there with .* -m pip install numpy"):
            server.target(python=bare).fingerprint()
        (tmp_path / "hidden" / "onnxruntime").mkdir(parents=True)
        (tmp_path / "hidden" / "onnxruntime" / "__init__.py").write_text("raise ImportError('none here')")
        hidden = wrapper(tmp_path / "python", f"export PYTHONPATH={shlex.quote(str(tmp_path / 'hidden'))}")
        with pytest.raises(InputError, match=r"onnxruntime cannot be imported by .* .none here.: install it there with"):
            server.target(python=hidden).fingerprint()

    def test_a_machine_with_too_little_memory(self, server: Server, tiny: Model, tmp_path: Path) -> None:
        tight = wrapper(tmp_path / "tight", "export OPENBLAS_NUM_THREADS=1; ulimit -v 900000")
        big = replace(tiny, shape=(20_000, 1, tiny.resolution, tiny.resolution))
        target = server.target(python=tight)
        with pytest.raises(InputError, match="memory"):
            target.measure([big], **QUICK)
        assert target.measure([tiny], **QUICK)[0].latency_ms > 0
        target.close()

    def test_a_full_disk_on_the_far_side_is_no_matter(self, server: Server, tiny: Model, tmp_path: Path) -> None:
        full = tmp_path / "full"
        full.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full], capture_output=True, check=False
        ).returncode:
            pytest.skip("a small file system cannot be mounted here")
        try:
            with suppress(OSError), (full / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
            with pytest.raises(OSError, match="No space left"):
                (full / "more").write_bytes(bytes(4096))
            (full / "more").unlink(missing_ok=True)
            python = wrapper(tmp_path / "python", f"export HOME={shlex.quote(str(full))} TMPDIR={shlex.quote(str(full))}; cd")
            target = server.target(python=python)
            assert target.measure([tiny], **QUICK)[0].latency_ms > 0
            assert target.weigh([tiny], seconds=0.01)[0].load_ms > 0
            target.close()
        finally:
            subprocess.run(["umount", full], check=True)

    def test_nothing_is_left_behind(self, server: Server, tiny: Model, tmp_path: Path) -> None:
        home = tmp_path / "home"
        home.mkdir()
        python = wrapper(tmp_path / "python", f"export HOME={shlex.quote(str(home))} TMPDIR={shlex.quote(str(home))}; cd")
        target = server.target(python=python)
        target.measure([tiny], **QUICK)
        target.weigh([tiny], seconds=0.01)
        target.close()
        assert list(home.rglob("*")) == []

    def test_another_machine_behind_the_name_in_the_middle(self, server: Server, tiny: Model, tmp_path: Path) -> None:
        marker = tmp_path / "swapped"
        lines = f'[ -e {shlex.quote(str(marker))} ] && set -- -u -B -c "import os; os.cpu_count = lambda: 999; $4"'
        target = server.target(python=wrapper(tmp_path / "python", lines))

        def swap(at: int, timing: Timing) -> None:
            if not marker.exists():
                marker.write_text("")
                os.kill(server.sessions()[0], signal.SIGKILL)

        with pytest.raises(InputError, match=r"another machine than before .cores is 999 now and"):
            target.measure([tiny] * (runner.AT_ONCE + 1), **QUICK, each=swap)


# --- a machine that is stopped now and then ---


@pytest.fixture
def quota(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The file into which a process writes its number to be stopped for 60 % of the time."""
    name = f"nestling-test-{os.getpid()}"
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    try:
        if (v1 / "cpu.cfs_quota_us").exists() or (v1 / "tasks").exists():
            (group := v1 / name).mkdir()
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text("40000")
            tasks = group / "tasks"
        else:
            (group := v2 / name).mkdir()
            (group / "cpu.max").write_text("40000 100000")
            tasks = group / "cgroup.procs"
    except OSError as error:
        pytest.skip(f"no cgroup with a quota can be made here ({error.strerror})")
    yield tasks
    time.sleep(0.5)
    group.rmdir()


@pytest.mark.slow
def test_a_machine_under_a_quota_is_called_throttled(quota: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = load_space("digits")
    model = Model(probe(space, space.largest), 1, space.resolution(space.largest))

    def command(_: Machine, arguments: list[str]) -> list[str]:
        return ["sh", "-c", f'echo $$ > {shlex.quote(str(quota))}; exec "$@"', "sh", sys.executable, *arguments]

    monkeypatch.setattr(Local, "command", command)
    target = Local()
    (timing,) = target.measure([model], width=0.0, most_seconds=3.0)
    target.close()
    assert timing.throttled and not timing.stable, json.dumps(timing.as_dict())
