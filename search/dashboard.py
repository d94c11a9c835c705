"""The children of a search in optuna-dashboard: a mirror of the store in an Optuna journal, and its server on this machine.

The journal is made anew from the store each time and nothing is ever read back from it, whatever is done in the dashboard. It
shows at most `MOST` children, for the dashboard loads all of a study at once (14 kB a child of 40 dimensions).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search import pareto
from search.budget import Budget, parse_all
from search.found import Found
from search.store import Store, latest_store
from search.table import Child, children, columns_of, meets
from supernet import durable
from supernet.errors import InputError
from supernet.family import Dimension
from supernet.run import Run
from supernet.space import Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

MOST = 500
MOST_ORDINARY = 400
"""Children that are shown beside the elites; the rest of `MOST` is kept for elites that the search finds later."""
HOST = "127.0.0.1"  # the dashboard knows no passwords
INSTALL = "the dashboard needs Optuna and optuna-dashboard: pip install 'nestling[dashboard]'"
REFRESH_SECONDS = 10.0
START_SECONDS = 60.0

_SERVER = """
import os, sys, threading
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna_dashboard import wsgi

class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass

def stop_with_parent():
    sys.stdin.buffer.read()
    os._exit(0)

path, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
threading.Thread(target=stop_with_parent, daemon=True).start()
make_server(host, port, wsgi(JournalStorage(JournalFileBackend(path))), Server, Quiet).serve_forever()
"""


class Mirror:
    """An Optuna study of a search's children, in a journal made anew at `path`.

    A trial is a child: its parameters are the dimensions with a choice, its values the score and the macs. It is feasible if it was
    scored on all `images` of the search split and meets the budgets over costs that are known of it. What else is known stands in
    its user attributes. Raises `InputError` where Optuna is not installed, and `WriteError` where `path` cannot be written.
    """

    def __init__(
        self, path: Path, space: Space, *, name: str, metric: str, images: int, budgets: Sequence[Budget] = ()
    ) -> None:  # fmt: skip
        optuna = _optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path, self.space, self.images, self.budgets = path, space, images, tuple(budgets)
        self._distributions = {each.name: _distribution(each) for each in space.dimensions if len(each.choices) > 1}
        self._seen: set[tuple[str, int]] = set()
        self._ordinary = 0
        with durable.writing(path):
            path.unlink(missing_ok=True)
            storage = JournalStorage(JournalFileBackend(str(path)))
            self.study = optuna.create_study(storage=storage, study_name=name, directions=["maximize", "minimize"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names([metric, "macs"])

    def update(self, table: Sequence[Child]) -> int:
        """Show children that are not shown yet, or were with fewer images; returns how many were added.

        All elites (none cheaper is as good), and others drawn at random, while there is room. Raises `InputError` where the arch of a
        child is none of the space.
        """
        elites = _elites(table)
        new = [child for child in table if (child["key"], child["images"]) not in self._seen]
        first = [child for child in new if child["key"] in elites][: MOST - len(self._seen)]
        others = [child for child in new if child["key"] not in elites]
        room = max(0, min(MOST_ORDINARY - self._ordinary, MOST - len(self._seen) - len(first)))
        drawn = np.random.default_rng(len(self._seen)).permutation(len(others))[:room]
        chosen = {child["key"] for child in [*first, *(others[place] for place in drawn)]}
        added = [child for child in new if child["key"] in chosen]  # in the order of the search
        with durable.writing(self.path):
            self.study.add_trials([self._trial(child, child["key"] in elites) for child in added])
        self._seen |= {(child["key"], child["images"]) for child in added}
        self._ordinary += len(drawn)
        return len(added)

    def _trial(self, child: Child, elite: bool) -> FrozenTrial:
        from optuna.trial import TrialState, create_trial

        prefix = "arch."
        choices = {
            name.removeprefix(prefix): child[name] for name in child if name.startswith(prefix) and child[name] is not None
        }
        arch = self.space.arch(choices, f"child {child['key']}")
        constraints = self._constraints(child)
        hidden = {"score", "macs", *(name for name in child if name.startswith(prefix))}
        values = [child["score"], child["macs"]]
        whole = all(math.isfinite(value) for value in values)
        trial = create_trial(
            state=TrialState.COMPLETE if whole else TrialState.FAIL,
            values=values if whole else None,
            params={name: arch[name] for name in self._distributions},
            distributions=self._distributions,
            user_attrs={
                **{name: value for name, value in child.items() if name not in hidden and value is not None}, "elite": elite,
            },
            # optuna-dashboard 0.21 reads only this list, Optuna 5 only what `constraints` stores.
            system_attrs={"constraints": list(constraints.values())},
            constraints=constraints,
        )  # fmt: skip
        trial.datetime_complete = datetime.fromisoformat(child["created"]).astimezone().replace(tzinfo=None)
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=child["seconds"])
        return trial

    def _constraints(self, child: Child) -> dict[str, float]:
        """Name -> how far it is violated; feasible means none above 0. A budget over what was not measured of the child is not."""
        missed = {str(budget): 0.0 for budget in self.budgets}
        for budget in self.budgets:
            with contextlib.suppress(InputError):  # of no child known
                known = [names for names in columns_of([child], budget) if any(child[name] is not None for name in names)]
                missed[str(budget)] = float(not all(meets(child, budget, names) for names in known))
        return {"images missing": float(self.images - child["images"]), **missed}


def _elites(table: Sequence[Child]) -> set[str]:
    """Keys of the children scored on the most images that no other such child beats in score and macs."""
    most = max((child["images"] for child in table), default=0)
    known = [child for child in table if child["images"] == most]
    places = pareto.front([child["score"] for child in known], np.array([child["macs"] for child in known])[:, None])
    return {known[place]["key"] for place in places}


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Whole numbers in order as integers (their step divides all gaps), other numbers in order as floats, all else as kinds."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    choices = dimension.choices
    if not dimension.ordered or any(isinstance(choice, bool | str) for choice in choices):
        return CategoricalDistribution(choices)
    numbers = [choice for choice in choices if isinstance(choice, int | float)]
    if all(isinstance(choice, int) for choice in numbers):
        whole = [int(choice) for choice in numbers]
        return IntDistribution(min(whole), max(whole), step=math.gcd(*(choice - min(whole) for choice in whole)))
    return FloatDistribution(min(numbers), max(numbers))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(INSTALL) from error
    return optuna


# --- serving ---


def dashboard(
    run: Run, *, port: int = 8080, budgets: Sequence[Budget] | None = None, say: Callable[[str], None] = print,
    going: Callable[[], bool] = lambda: True,
) -> None:  # fmt: skip
    """Show a run's search in optuna-dashboard on this machine, until interrupted; children found meanwhile appear by themselves.

    `budgets` are those of the run's latest search, unless given. `port` 0 takes a free one. `going` is asked every `REFRESH_SECONDS`.
    Raises `InputError` where nothing was searched yet, a package is missing, the port is taken, or the run is shown already.
    """
    folder = run.path / "search"
    with (
        Store.existing(latest_store(run.path)) as store,
        durable.locked(folder / "dashboard.lock", f"the dashboard of {run.path}"),
    ):
        mirror = Mirror(
            folder / "dashboard.jsonl", run.space, name=run.path.absolute().name, metric=run.task.metric,
            budgets=_of_latest(run) if budgets is None else budgets,
            images=len(run.dataset.split("search_val")),
        )  # fmt: skip
        table = children(store)
        shown = mirror.update(table)
        with serving(mirror.path, port) as (address, server), contextlib.suppress(KeyboardInterrupt):
            some = "" if shown == len(table) else f" (the best, and others at random: the dashboard is slow beyond {MOST})"
            say(f"{address} shows {shown} of {len(table)} children{some}; stop with Ctrl-C")
            while going():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    raise InputError(
                        f"the dashboard at {address} ended by itself (exit code {server.wait(REFRESH_SECONDS)}): start it again"
                    )
                mirror.update(children(store))


def _of_latest(run: Run) -> tuple[Budget, ...]:
    """The budgets of the latest search that came to its end; none where there is none."""
    try:
        return parse_all(Found.load(run).budgets)
    except InputError:
        return ()


@contextlib.contextmanager
def serving(journal: Path, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve a journal on the loopback interface while the block runs; gives the address and the server's process.

    The server also ends when this process dies, however it dies. Raises `InputError` where it cannot start.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise InputError(INSTALL)
    port = _free(port)
    command = [sys.executable, "-c", _SERVER, str(journal.absolute()), HOST, str(port)]
    with tempfile.TemporaryFile() as errors:
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        assert server.stdin is not None
        try:
            _wait_until_it_answers(server, port, errors)
            yield f"http://{HOST}:{port}/", server
        finally:
            server.stdin.close()
            server.terminate()
            server.wait()


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"port {port} of {HOST} cannot be used ({error}): give another --port, or 0 for a free one"
            ) from error
        return int(probe.getsockname()[1])


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int, errors: Any) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        if server.poll() is not None:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
            raise InputError(f"the dashboard did not start ({last or server.returncode}): try again, or give another --port")
        if time.monotonic() > end:
            raise InputError(
                f"the dashboard did not answer for {START_SECONDS:.0f} s: try again when the machine has less to do"
            )
        time.sleep(0.05)
