"""Evaluation by two real processes against one; the file is the tests, and (run as a program by torchrun) one of the processes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search import processes
from search.evaluate import SharedEvaluator, Spent
from search.processes import Cuts, Part, ProcessEvaluator, attempt, pieces, spread
from search.rungs import Rung
from search.trie import macs_shared, ordered
from supernet.arch import Arch
from supernet.distributed import ALONE, ProcessLost, World, world
from supernet.errors import InputError, say
from supernet.run import Run
from supernet.samples import Samples, pack, unpack

ROOT = Path(__file__).parents[2]
RUNGS = (Rung(16, 16), Rung(24, 32))


def archs_of(run: Run, count: int = 9) -> list[Arch]:
    rng = np.random.default_rng(0)
    return list(dict.fromkeys([run.space.smallest, run.space.largest, *(run.space.sample(rng) for _ in range(count))]))


def alone(run: Run) -> SharedEvaluator:
    return SharedEvaluator(run.evaluator(), run.dataset.split("search_val"), RUNGS)


class Troubled:
    """An evaluator to which a child may be trouble."""

    def __init__(self, run: Run, bad: Arch, trouble: Any) -> None:
        self.evaluator, self.bad, self.trouble = alone(run), bad, trouble

    @property
    def spent(self) -> Spent:
        return self.evaluator.spent

    @property
    def failed(self) -> Mapping[Arch, str]:
        return self.evaluator.failed

    def advance(self, archs: Sequence[Arch], rung: int) -> Mapping[Arch, Samples]:
        if self.bad in archs:
            self.trouble()
        return self.evaluator.advance(archs, rung)


# --- what a process of a job does ---


def overflow() -> None:
    raise FloatingPointError("overflow")


def unreadable() -> None:
    raise OSError("no such image")


def job_same(run: Run, all_: World, out: Path) -> None:
    """Two rungs; the main process leaves the others alone for longer than they may wait."""
    archs, bad = archs_of(run), archs_of(run)[4]
    with spread(all_, Troubled(run, bad, overflow), run, RUNGS) as advancing:
        if advancing is None:
            (out / f"served-{all_.rank}").touch()
            return
        time.sleep(float(os.environ["NESTLING_TIMEOUT_S"]) * 1.5)
        found = [advancing.advance(archs, 0), advancing.advance(archs[::-2], 1), advancing.advance([], 0)]
        told = [{arch.key: pack(each, run.task.columns).hex() for arch, each in part.items()} for part in found]
        failed = {arch.key: reason for arch, reason in advancing.failed.items()}
        result = {"found": told, "failed": failed, "images": advancing.spent.image_forwards}
    (out / "result.json").write_text(json.dumps(result))


def job_unreadable(run: Run, all_: World, out: Path) -> None:
    archs = archs_of(run)
    with spread(all_, Troubled(run, archs[4], unreadable), run, RUNGS) as advancing:
        assert advancing is not None
        advancing.advance(archs, 0)


def job_refused(run: Run, all_: World, out: Path) -> None:
    with spread(all_, alone(run), run, RUNGS):
        raise InputError("no such budget")


def job_killed(run: Run, all_: World, out: Path) -> None:
    """The second process is killed while it evaluates."""
    archs = archs_of(run)
    evaluator = Troubled(run, archs[4], lambda: os.kill(os.getpid(), signal.SIGKILL)) if all_.rank else alone(run)
    with spread(all_, evaluator, run, RUNGS) as advancing:
        assert advancing is not None
        for arch in archs:
            advancing.advance([arch, archs[4], arch], 0)
            advancing.advance([archs[4]], 0)


def job_others(run: Run, all_: World, out: Path) -> None:
    """The processes have other weights."""
    run.__dict__["weights_hash"] = f"{all_.rank}" * 64
    with spread(all_, alone(run), run, RUNGS):
        raise AssertionError


def torchrun(job: str, run: Run, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of the function `job_...` of this file."""
    whole = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, job, str(run.path),
             str(out)]  # fmt: skip
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NESTLING_TIMEOUT_S": "120", **environment}
    return subprocess.run(
        whole, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **more}, check=False, timeout=400
    )  # fmt: skip


def words(said: str) -> list[str]:
    return [line for line in said.splitlines() if "nestling:" in line]


def main(job: str, path: Path, out: Path) -> int:
    """As the command does: one line for what is no bug."""
    try:
        with world("cpu") as all_:
            globals()[f"job_{job}"](Run.open(path), all_, out)
    except (InputError, OSError) as error:
        say(error)
        return 2
    return 0


# --- tests of the pieces ---


def test_alone_the_evaluator_is_used_as_it_is(tiny_run: Run) -> None:
    evaluator = alone(tiny_run)
    with spread(ALONE, evaluator, tiny_run, RUNGS) as advancing:
        assert advancing is evaluator


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_pieces_hold_every_child_once_in_order_and_no_other_cuts_have_a_cheaper_dearest_piece(
    tiny_run: Run, count: int
) -> None:
    space = tiny_run.space
    archs = ordered(space, archs_of(tiny_run, 9))
    cut = pieces(space, archs, count)
    assert len(cut) == count
    assert [at for piece in cut for at in piece] == list(range(len(archs)))

    def dearest(ends: Sequence[int]) -> int:
        return max(macs_shared(space, archs[start:end]) for start, end in itertools.pairwise([0, *ends, len(archs)]))

    found = dearest([piece.stop for piece in cut[:-1]])
    inner = itertools.combinations_with_replacement(range(len(archs) + 1), min(count, len(archs)) - 1)
    if count < 5:  # of all ways
        assert found == min(map(dearest, inner))
    assert found <= macs_shared(space, archs)
    cuts = Cuts(space, archs)
    assert cuts.macs(cut) == sum(macs_shared(space, [archs[at] for at in piece]) for piece in cut)
    assert [list(piece) for piece in pieces(space, [], count)] == [[]] * count


def test_a_part_survives_the_way_between_processes() -> None:
    part = Part({3: b"\n\x00ab", 0: b"", 7: b"{}"}, {5: "line\nbreak ä"}, Spent(10**15, 2, 3), "no", 0.1)
    assert Part.from_bytes(part.to_bytes()) == part
    assert Part.from_bytes(Part().to_bytes()) == Part()


def test_a_child_that_raises_loses_no_other(tiny_run: Run) -> None:
    archs = archs_of(tiny_run, 3)
    part = attempt(Troubled(tiny_run, archs[1], overflow), dict(enumerate(archs)), 0, tiny_run.task)
    assert part.failed == {1: "FloatingPointError: overflow"}
    assert part.packed.keys() == set(range(len(archs))) - {1}
    assert part.spent.image_forwards == (len(archs) - 1) * RUNGS[0].images
    assert part.seconds > 0


def test_what_is_wrong_with_the_machine_is_no_childs_failure(tiny_run: Run) -> None:
    archs = archs_of(tiny_run, 3)
    part = attempt(Troubled(tiny_run, archs[1], unreadable), dict(enumerate(archs)), 0, tiny_run.task)
    assert (part.fatal, part.failed, part.packed) == ("no such image", {}, {})


def test_the_others_hear_of_a_main_process_that_is_busy_and_a_loss_is_told_when_next_it_asks(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "AWAKE_S", 0.01)
    heard = threading.Event()

    class Gone(World):
        def broadcast(self, value: Any) -> Any:
            heard.set()
            raise ProcessLost("it is gone")

    together = ProcessEvaluator(Gone(0, 2), alone(tiny_run), tiny_run.space, tiny_run.task, RUNGS)
    with together.awake():
        assert heard.wait(30)
    with pytest.raises(ProcessLost, match="it is gone"):
        together.advance([tiny_run.space.smallest], 0)
    together.end()  # says nothing to those that are gone


# --- tests of two processes ---


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_wait_for_a_busy_main_one(tiny_run: Run, tmp_path: Path) -> None:
    done = torchrun("same", tiny_run, tmp_path, NESTLING_TIMEOUT_S="20")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "served-1").exists()
    result = json.loads((tmp_path / "result.json").read_text())
    archs, here = archs_of(tiny_run), alone(tiny_run)
    bad, well = archs[4], [arch for arch in archs if arch != archs[4]]
    wanted = [here.advance(well, 0), here.advance([arch for arch in archs[::-2] if arch != bad], 1)]
    assert result["failed"] == {bad.key: "FloatingPointError: overflow"}
    assert result["images"] == here.spent.image_forwards
    assert result["found"][2] == {}
    for found, expected, rung in zip(result["found"], wanted, (0, 1), strict=False):
        images = RUNGS[rung].images - (RUNGS[rung - 1].images if rung else 0)
        assert list(found) == [arch.key for arch in expected]  # in the order asked for
        for arch, samples in expected.items():
            unpacked = unpack(bytes.fromhex(found[arch.key]), images, tiny_run.task.columns)
            np.testing.assert_array_equal(unpacked["rank"], samples["rank"])
            np.testing.assert_allclose(unpacked["loss"], samples["loss"], rtol=2e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "message"), [
    ("unreadable", "no such image"), ("others", "every process needs the same weights"),
    pytest.param("refused", "no such budget", marks=pytest.mark.nightly),
])  # fmt: skip
def test_an_error_of_either_process_is_told_once_by_the_main_one(tiny_run: Run, tmp_path: Path, job: str, message: str) -> None:
    done = torchrun(job, tiny_run, tmp_path)
    assert done.returncode != 0
    (line,) = words(done.stderr)
    assert line.startswith(f"nestling: {message}")
    assert str(ROOT / "search") not in done.stderr


@pytest.mark.slow
def test_a_process_is_killed_and_the_main_one_says_so_in_a_line(tiny_run: Run, tmp_path: Path) -> None:
    done = torchrun("killed", tiny_run, tmp_path)
    assert done.returncode != 0
    (line,) = words(done.stderr)
    assert line.startswith("nestling: ")
    assert "another process of this job ended" in line
    assert str(ROOT / "search") not in done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
