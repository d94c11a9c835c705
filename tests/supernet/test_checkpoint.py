"""Checkpoints: bit-equal when whole, refused when damaged, and never lost by a kill or a full disk."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from supernet import checkpoint, durable
from supernet.checkpoint import Checkpoint, latest, load, optimizer_groups, restore_optimizer, save, verify
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.optimizer import make_optimizer
from supernet.recipe import load_recipe
from supernet.space import Space

ROOT = Path(__file__).parents[2]


def small(step: int, size: int = 7) -> Checkpoint:
    """Distinct for every step."""
    return Checkpoint(
        step,
        {
            "weights": {"a": torch.arange(size) + float(step), "b": torch.full((), step)},
            "optimizer": {"0/m": torch.ones(3) * step},
        },
        {"space": "x", "step": step, "third": 1 / 3},
    )


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.step == other.step
    assert one.state == other.state
    assert one.tensors.keys() == other.tensors.keys()
    for name, group in one.tensors.items():
        assert group.keys() == other.tensors[name].keys()
        for key, value in group.items():
            theirs = other.tensors[name][key]
            assert value.dtype == theirs.dtype
            assert torch.equal(value.nan_to_num(12345), theirs.nan_to_num(12345))


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# --- whole ---


def test_tensors_of_all_kinds_and_json_come_back_bit_equal(tmp_path: Path) -> None:
    awkward = {
        "floats": torch.tensor([0.1, -0.0, float("inf"), float("nan"), 1e-45]),
        "half": torch.tensor([0.1], dtype=torch.bfloat16),
        "integers": torch.tensor([2**62, -1]), "bools": torch.tensor([True, False]), "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 3),
        "view": torch.arange(12.0).view(3, 4)[:, 1:3], "turned": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "leaf": torch.ones(2, requires_grad=True),
    }  # fmt: skip
    saved = Checkpoint(3, {"weights": awkward, "more.groups": {}}, {"pi": 3.141592653589793, "text": "ü", "list": [1, None]})
    path = save(tmp_path, saved)
    assert path == tmp_path / "step-000000003"
    assert verify(path) is None
    back = load(path)
    assert_same(saved, back)
    assert torch.equal(torch.signbit(back.tensors["weights"]["floats"]), torch.signbit(awkward["floats"]))


def stepped(supernet: Supernet, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    supernet(images, supernet.space.largest).square().sum().backward()
    optimizer.step()


def made(space: Space, name: str) -> tuple[Supernet, torch.optim.Optimizer]:
    supernet = Supernet(space)
    return supernet, make_optimizer(supernet, load_recipe("digits", {"optimizer": name}))


def went_on_alike(space: Space, name: str, folder: Path) -> bool:
    """Whether two more steps from a checkpoint give the same weights and state as two more steps without one."""
    supernet, optimizer = made(space, name)
    for seed in range(2):
        stepped(supernet, optimizer, seed)
    tensors, rest = optimizer_groups(optimizer)
    saved = load(save(folder, Checkpoint(2, {"weights": supernet.state_dict(), "optimizer": tensors}, {"optimizer": rest})))
    other, restored = made(space, name)
    other.load_state_dict(saved.tensors["weights"])
    restore_optimizer(restored, saved.tensors["optimizer"], saved.state["optimizer"])
    assert optimizer_groups(restored)[0].keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in optimizer_groups(restored)[0].items())
    for seed in range(2, 4):
        stepped(supernet, optimizer, seed)
        stepped(other, restored, seed)
    states = [optimizer_groups(each)[0] for each in (optimizer, restored)]
    return all(torch.equal(a, b) for a, b in zip(supernet.parameters(), other.parameters(), strict=True)) and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadam", "rmsprop", "lion"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(name: str, tiny_space: Space, tmp_path: Path) -> None:
    assert went_on_alike(tiny_space, name, tmp_path)


def accepted_optimizers() -> list[str]:
    from timm.optim import list_optimizers

    from supernet.recipe import UNUSABLE

    return [name for name in list_optimizers() if not name.startswith(UNUSABLE)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the optimizers' own
@pytest.mark.parametrize("name", accepted_optimizers())
def test_every_optimizer_that_a_recipe_may_name_can_be_saved(name: str, tiny_space: Space, tmp_path: Path) -> None:
    assert load_recipe("digits", {"optimizer": name}).optimizer == name
    assert went_on_alike(tiny_space, name, tmp_path)


# --- damaged ---


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[:-2])
    elif how == "tail zeroed":
        path.write_bytes(data[:-4] + bytes(4))
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "a bit flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "a folder":
        path.unlink()
        path.mkdir()


HOWS = ["removed", "emptied", "truncated", "tail zeroed", "longer", "a bit flipped", "a folder"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damage_to_any_file_makes_the_checkpoint_not_whole_and_the_older_one_the_latest(
    tmp_path: Path, name: str, how: str
) -> None:
    older, newer = save(tmp_path, small(1)), save(tmp_path, small(2))
    assert latest(tmp_path) == newer
    assert sorted(file.name for file in newer.iterdir()) == [
        "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"
    ]  # fmt: skip
    damaged(newer / name, how)
    problem = verify(newer)
    assert problem is not None
    assert "\n" not in problem
    with pytest.raises(
        InputError, match=r"step-000000002 is not a whole checkpoint: .*. Use an older one, or start the run anew"
    ):
        load(newer)
    assert latest(tmp_path) == older
    assert_same(load(older), small(1))
    damaged(older / name, how)
    assert latest(tmp_path) is None


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, small(1, size=1))
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position, bit in itertools.product(range(0, len(whole) - 1), (0, 5)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            assert verify(path) is not None, f"{file.name}, byte {position}, bit {bit}"
        file.write_bytes(whole)
    assert verify(path) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([1e400, 10**30, "../state.json"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints"), small(1))


@given(json_values, st.sampled_from([None, "format", "step", "sha256"]))
def test_a_manifest_of_anything_is_a_problem_and_never_an_exception(written: Path, value: Any, key: str | None) -> None:
    file = written / "manifest.json"
    whole = file.read_text()
    try:
        manifest = json.loads(whole)
        file.write_text(json.dumps(value if key is None else {**manifest, key: value}))
        same = key is not None and manifest[key] == value
        assert (verify(written) is None) == (same or (key == "step" and not isinstance(value, str) and value in (1, True)))
    finally:
        file.write_text(whole)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "\ud800", '{"format": 1, "step": 1, "sha256": {"\\u0000": "a"}}', "NaN", '{"format": 1}']
)
def test_a_manifest_that_attacks_the_reader_is_a_problem_and_never_an_exception(written: Path, text: str) -> None:
    file = written / "manifest.json"
    whole = file.read_bytes()
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    problem = verify(written)
    file.write_bytes(whole)
    assert problem is not None
    assert verify(written) is None


def test_files_outside_the_checkpoint_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, small(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (tmp_path / "elsewhere").write_bytes(b"x")
    manifest["sha256"]["../elsewhere"] = durable.sha256(tmp_path / "elsewhere")
    durable.write_json(path / "manifest.json", manifest)
    assert verify(path) == "../elsewhere was changed since it was written"


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, small(1))
    (path / "more.safetensors").write_bytes(b"not verified")
    assert_same(load(path), small(1))


def test_a_checkpoint_without_weights_or_state_is_not_whole(tmp_path: Path) -> None:
    path = save(tmp_path, small(1))
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("weights.safetensors", "state.json"):
        left = {key: value for key, value in manifest["sha256"].items() if key != name}
        durable.write_json(path / "manifest.json", {**manifest, "sha256": left})
        assert verify(path) == "its manifest does not list the weights and the state"


def test_another_format_and_another_step_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, small(1))
    other = path.rename(tmp_path / "step-000000009")
    assert verify(other) == "its manifest is of step 1"
    manifest = json.loads((other / "manifest.json").read_text())
    durable.write_json(other / "manifest.json", {**manifest, "format": 1})
    assert verify(other) == "it has format 1, this version reads 2"


def test_what_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None
    assert latest(tmp_path) is None
    assert verify(tmp_path / "step-000000001") == "manifest.json is missing"
    (tmp_path / "step-000000001").write_text("a file")
    assert latest(tmp_path) is None


# --- pruning ---


def test_the_newest_are_kept_and_the_others_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, small(step), keep=2)
    assert folders(tmp_path) == ["step-000000004", "step-000000005"]


def test_broken_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, small(step), keep=3)
    for step in (2, 3):
        damaged(tmp_path / f"step-00000000{step}" / "state.json", "a bit flipped")
    save(tmp_path, small(4), keep=2)
    assert verify(tmp_path / "step-000000001") is None
    assert latest(tmp_path) == tmp_path / "step-000000004"
    save(tmp_path, small(5), keep=2)
    assert folders(tmp_path) == ["step-000000004", "step-000000005"]


@pytest.mark.parametrize("when", ["while it is written", "once it is written"])
def test_the_last_good_one_stays_when_the_newest_turns_out_broken(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are lost on their way to the disk."""
    good = save(tmp_path, small(1), keep=1)
    write_bytes = durable.write_bytes

    def spoil(path: Path, data: bytes) -> None:
        write_bytes(path, data)
        if path.name == ("weights.safetensors" if when == "while it is written" else "manifest.json"):
            damaged(path.parent / "weights.safetensors", "tail zeroed")

    monkeypatch.setattr(durable, "write_bytes", spoil)
    save(tmp_path, small(2), keep=1)
    assert latest(tmp_path) == good


def test_a_broken_checkpoint_of_the_same_step_is_written_anew_and_a_whole_one_left_alone(tmp_path: Path) -> None:
    path = save(tmp_path, small(1))
    before = (path / "weights.safetensors").stat().st_mtime_ns
    save(tmp_path, small(1))
    assert (path / "weights.safetensors").stat().st_mtime_ns == before
    damaged(path / "weights.safetensors", "truncated")
    (path / ".weights.safetensors.left-over").write_bytes(b"x")
    assert save(tmp_path, small(1)) == path
    assert_same(load(path), small(1))
    assert not (path / ".weights.safetensors.left-over").exists()


# --- killed, and no room ---


def test_a_failure_at_any_write_leaves_the_older_checkpoint_and_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, small(1))
    fsync, calls = os.fsync, 0

    def count(handle: int) -> None:
        nonlocal calls
        calls += 1
        fsync(handle)

    monkeypatch.setattr(os, "fsync", count)
    save(tmp_path / "elsewhere", small(2))
    assert calls >= 8
    for failing in range(calls - 1):  # all but the last, which only makes the finished folder's name durable
        left = failing

        def fail(handle: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, small(2))
        assert folders(tmp_path) == ["elsewhere", "step-000000001"]
        assert latest(tmp_path) == tmp_path / "step-000000001"
    monkeypatch.setattr(os, "fsync", fsync)
    assert_same(load(save(tmp_path, small(2))), small(2))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 1 MiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(full_disk: Path) -> None:
    root = full_disk / "checkpoints"
    first = save(root, small(1, size=60_000))
    for step in (2, 3, 4):
        with pytest.raises(OSError, match="No space left on device"):
            save(root, small(step, size=200_000))
        assert folders(root) == [first.name]
        assert_same(load(first), small(1, size=60_000))
    assert_same(load(save(root, small(5, size=60_000))), small(5, size=60_000))  # there is room again


KILLED = """
import os, pathlib, random, signal, sys, time, warnings
import torch
from supernet import checkpoint
root, rounds, delays = pathlib.Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
def made(step):
    return checkpoint.Checkpoint(step, {"weights": {"a": torch.full((20000,), float(step))}}, {"step": step})
began = time.monotonic()
checkpoint.save(root.parent / "measured", made(1))
duration = time.monotonic() - began
newest = 0
for number in range(rounds):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            for step in range(newest + 1, newest + 10000):
                checkpoint.save(root, made(step))
                os.write(writer, step.to_bytes(4, "big"))
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(delays.uniform(0, 5 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = os.read(reader, 65536)
    os.close(reader)
    acknowledged = int.from_bytes(told[-4:], "big") if told else newest
    path = checkpoint.latest(root)
    whole = checkpoint.load(path) if path else None
    step = whole.step if whole else 0
    assert step >= acknowledged, (step, acknowledged)
    assert whole is None or (whole.state["step"] == step and bool((whole.tensors["weights"]["a"] == step).all()))
    torn = sum(checkpoint.verify(each) is not None for each in checkpoint.all_of(root))
    print(step, torn, flush=True)
    newest = max(step, newest)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_never_loses_what_it_had_saved(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), "20"], capture_output=True, text=True, cwd=ROOT, check=False
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    rounds = [tuple(map(int, line.split())) for line in found.stdout.splitlines()]
    assert len(rounds) == 20
    assert rounds[-1][0] > 3
    assert any(torn for _, torn in rounds)  # some did die in the middle of a checkpoint
    kept = [save(tmp_path / "checkpoints", small(step)) for step in (10**6, 10**6 + 1)]
    assert checkpoint.all_of(tmp_path / "checkpoints") == kept  # what they left behind does not pile up


# --- optimizers ---


def test_an_optimizers_state_is_tensors_and_plain_json() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.5}], betas=(0.8, 0.9))
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    tensors, rest = optimizer_groups(optimizer)
    assert {"0/exp_avg", "0/exp_avg_sq", "0/step"} == tensors.keys()
    assert all(isinstance(value, Tensor) for value in tensors.values())
    assert json.loads(json.dumps(rest))["groups"][0]["lr"] == 0.5
    fresh = torch.optim.AdamW([weight], lr=0.1)
    restore_optimizer(fresh, tensors, json.loads(json.dumps(rest)))
    assert fresh.param_groups[0]["lr"] == 0.5
    assert tuple(fresh.param_groups[0]["betas"]) == (0.8, 0.9)


def test_an_optimizer_that_made_no_step_yet_can_be_saved() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    tensors, rest = optimizer_groups(optimizer)
    assert tensors == {}
    restore_optimizer(optimizer, tensors, rest)


def test_checkpoint_folders_are_listed_oldest_first(tmp_path: Path) -> None:
    for step in (10, 9, 100_000_000, 1):
        save(tmp_path, small(step), keep=9)
    assert [int(path.name.removeprefix("step-")) for path in checkpoint.all_of(tmp_path)] == [1, 9, 10, 100_000_000]
