"""The run directory: what it remembers, what it refuses, and who looked at the test images."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supernet import checkpoint, config
from supernet.data.batches import channel_statistics
from supernet.data.sources import Source, open_source
from supernet.data.splits import NAMES
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.recipe import TrainConfig, load_recipe
from supernet.run import Run, load_weights
from supernet.space import Space, load_space
from supernet.start import refuse_changes, refuse_other, resume, start


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved(run: Run, step: int = 1, **state: Any) -> Supernet:
    """A supernet saved as the run's checkpoint."""
    supernet = Supernet(run.space, seed=step)
    tensors = {"weights": supernet.state_dict(), "optimizer": {}}
    checkpoint.save(run.checkpoints, checkpoint.Checkpoint(step, tensors, {"space": run.space.key, "finished": False, **state}))
    return supernet


# --- what it remembers ---


def test_an_opened_run_is_the_one_that_was_created(run: Run, images: Source, recipe: TrainConfig, tiny_space: Space) -> None:
    opened = Run.open(run.path)
    assert opened.space.key == run.space.key == tiny_space.key
    assert opened.recipe == recipe
    assert opened.data == run.data
    assert opened.task.name == "classification"
    assert opened.classes == images.classes == ("0", "1", "2")
    assert opened.source.fingerprint == images.fingerprint
    for name in NAMES:
        assert np.array_equal(getattr(opened.dataset.splits, name), getattr(run.dataset.splits, name))
    assert not opened.finished


def test_mean_and_deviation_are_those_of_the_training_images(run: Run, images: Source) -> None:
    assert (run.dataset.mean, run.dataset.std) == channel_statistics(images, run.dataset.splits.train)
    assert Run.open(run.path).dataset.split("confirm").mean == run.dataset.mean


def test_the_seed_divides_the_images(tmp_path: Path, tiny_space: Space, images: Source) -> None:
    splits = [
        Run.create(
            tmp_path / str(number), tiny_space, load_recipe("digits", {"seed": seed}), images
        ).dataset.splits.train.tolist()
        for number, seed in enumerate((0, 0, 1))
    ]
    assert splits[0] == splits[1] != splits[2]


def test_a_run_is_not_overwritten(run: Run, images: Source) -> None:
    before = everything(run.path)
    with pytest.raises(InputError, match="run holds a run already: continue it with --resume, or choose another --out"):
        Run.create(run.path, run.space, run.recipe, images)
    assert everything(run.path) == before


def test_the_config_is_written_last_so_half_a_run_is_none(
    tmp_path: Path, tiny_space: Space, recipe: TrainConfig, images: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, Any]:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("supernet.run.environment", fail)
        with pytest.raises(OSError, match="No space left"):
            Run.create(tmp_path / "run", tiny_space, recipe, images)
    with pytest.raises(InputError, match="is not a run directory"):
        Run.open(tmp_path / "run")
    assert Run.create(tmp_path / "run", tiny_space, recipe, images).dataset


def test_the_environment_names_versions_and_no_host(run: Run) -> None:
    import platform

    environment = json.loads((run.path / "environment.json").read_text())
    assert (
        environment["versions"]["torch"] == torch.__version__.partition("+")[0]
        or environment["versions"]["torch"] == torch.__version__
    )
    assert not {"host", "hostname", "node", "user"} & environment.keys()
    assert platform.node() not in environment.values()


# --- the test split ---


def test_the_test_split_is_refused_where_search_and_training_look(run: Run) -> None:
    for name in ("test", "tset", "", "all"):
        with pytest.raises(
            InputError, match=r"are train, search_val and confirm, but got .*: the test split is read through Run.test_images"
        ):
            run.dataset.split(name)
    assert run.test_reads == 0


def test_every_read_of_the_test_split_is_counted_with_its_purpose(run: Run) -> None:
    for number in range(1, 4):
        split = run.test_images(f"table {number}")
        assert run.test_reads == Run.open(run.path).test_reads == number
    assert sorted(split.indices) == sorted(run.dataset.splits.test)
    lines = [json.loads(line) for line in (run.path / "test_reads.jsonl").read_text().splitlines()]
    assert [line["purpose"] for line in lines] == ["table 1", "table 2", "table 3"]


def test_a_read_is_counted_before_it_happens_and_after_a_torn_line(run: Run) -> None:
    run.test_images("first")
    with (run.path / "test_reads.jsonl").open("ab") as file:
        file.write(b'{"purp')  # a process died here
    run.test_images("second")
    assert run.test_reads == 2


def test_no_two_splits_share_an_image(run: Run) -> None:
    seen = [set(getattr(run.dataset.splits, name).tolist()) for name in NAMES]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 60


# --- damage ---


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\ud800", "[" * 100_000])
def test_a_damaged_config_is_an_input_error_that_names_it(run: Run, text: str) -> None:
    (run.path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"config.json"):
        Run.open(run.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format=2), "config.json has format 2, this version reads 1: use the version that wrote it"),
        (lambda value: value.pop("format"), "config.json has format None, this version reads 1"),
        (lambda value: value.pop("recipe"), "config.json is incomplete \\(missing: \\['recipe'\\]\\)"),
        (lambda value: value["data"].pop("fingerprint"), "config.json is incomplete \\(missing: \\['data.fingerprint'\\]\\)"),
        (lambda value: value.update(data=[1]), "config.json is incomplete \\(missing: \\['data'\\]\\)"),
        (lambda value: value.update(space=None), "config.json is incomplete \\(missing: \\['space'\\]\\)"),
        (lambda value: value.update(task="x"), "task must be one of \\['classification', 'regression'\\], but got 'x'"),
        (lambda value: value.update(task="regression"), "the space tiny learns classification, but task is 'regression'"),
        (lambda value: value["data"].update(std=0.3), "config.json: data.std must be a list of a positive number"),
        (lambda value: value.update(task=["classification"]), "config.json is incomplete \\(missing: \\['task'\\]\\)"),
        (lambda value: value["recipe"].update(epochs=0), "config.json: recipe: epochs: Input should be greater"),
        (lambda value: value["space"].update(resolution=[]), "config.json: space: resolution: choices must be listed"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_config_is_named(run: Run, change: Callable[[Any], object], message: str) -> None:
    edit(run.path / "config.json", change)
    with pytest.raises(InputError, match=message):
        Run.open(run.path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(deeper for key, item in inner for deeper in places(item, (*path, key)))]


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2), max_leaves=4,
)  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_config_is_a_run_or_an_input_error(run: Run, data: st.DataObject) -> None:
    file = run.path / "config.json"
    whole = file.read_text()
    value = copy.deepcopy(json.loads(whole))
    *way, last = data.draw(st.sampled_from(places(value)))
    place = value
    for part in way:
        place = place[part]
    if data.draw(st.booleans()):
        place[last] = data.draw(junk)
    else:
        del place[last]
    try:
        file.write_text(json.dumps(value))
        Run.open(run.path)
    except InputError as error:
        assert "config.json" in str(error)
    finally:
        file.write_text(whole)


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(
            InputError, match=r"is not a run directory \(it has no config.json\): give the --out of `nestling train`"
        ):
            Run.open(path)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", "\ud800"])
def test_damaged_splits_are_an_input_error(run: Run, text: str | None) -> None:
    file = run.path / "splits.json"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match="damaged"):
        _ = Run.open(run.path).dataset


def test_data_that_changed_is_noticed_before_anything_is_computed(run: Run, save_images: Callable[..., Path]) -> None:
    for seed, count in ((1, 60), (0, 63)):
        save_images(Path(run.data["name"]), seed=seed, count=count)
        with pytest.raises(
            InputError, match=r"changed since the run began .*: put the files back as they were, or start a new run"
        ):
            resume(run.path)
    save_images(Path(run.data["name"]))
    assert resume(run.path).run.dataset


def test_data_that_is_gone_is_named(run: Run) -> None:
    Path(run.data["name"]).unlink()
    with pytest.raises(InputError, match=r"there is no folder or file .*images.npz"):
        resume(run.path)


# --- weights ---


def test_the_supernet_is_that_of_the_newest_whole_checkpoint(run: Run) -> None:
    first, second = saved(run, 1), saved(run, 2)
    for name, value in Run.open(run.path).supernet().state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    digest = Run.open(run.path).weights_hash
    (run.checkpoints / "step-000000002" / "weights.safetensors").write_bytes(b"")
    reopened = Run.open(run.path)
    for name, value in reopened.supernet().state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    assert reopened.weights_hash != digest
    assert not any(parameter.requires_grad for parameter in reopened.supernet().parameters())


def test_a_run_without_a_whole_checkpoint_says_what_to_do(run: Run) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=r"has no whole checkpoint yet: train it first \(nestling train ... --resume\)"):
            run.supernet()
        with pytest.raises(InputError, match="has no whole checkpoint yet"):
            _ = Run.open(run.path).weights_hash
        assert not run.finished
        saved(run)
        (run.checkpoints / "step-000000001" / "manifest.json").unlink()


def test_weights_of_another_space_are_refused(run: Run) -> None:
    saved(run, space="5ab84f65890c")
    with pytest.raises(
        InputError, match=f"was written for the space 5ab84f65890c, this run has {run.space.key}: use the run's own"
    ):
        run.supernet()
    whole = checkpoint.load(run.checkpoints / "step-000000001")
    with pytest.raises(InputError, match="was written for the space"):
        load_weights(Supernet(load_space("digits")), whole)


def test_a_run_says_whether_it_is_finished(run: Run) -> None:
    saved(run, 1)
    assert not run.finished
    saved(run, 2, finished=True, epochs=run.recipe.epochs + 1)
    assert not run.finished  # of fewer epochs than are wanted now
    saved(run, 3, finished=True, epochs=run.recipe.epochs)
    assert run.finished


# --- how it begins ---


def test_what_is_not_given_is_chosen_from_the_data(images: Source, tmp_path: Path) -> None:
    begun = start(images.name, tmp_path / "run")
    assert (begun.run.space.name, begun.run.recipe.name) == ("digits", "digits")
    assert (begun.run.space.family.classes, begun.run.space.family.in_channels) == (3, 1)
    assert begun.reasons[0] == "data: 60 images (36 to train), 3 classes, 1 channels, about 8 px"
    assert resume(tmp_path / "run").run.recipe == begun.run.recipe


def test_what_is_given_wins(images: Source, tmp_path: Path) -> None:
    begun = start(images.name, tmp_path / "a", space="cifar-mbconv", epochs=3, overrides={"seed": 5, "epochs": 9})
    assert (begun.run.space.name, begun.run.recipe.name) == ("cifar-mbconv", "cifar")
    assert (begun.run.recipe.epochs, begun.run.recipe.seed) == (3, 5)
    assert start(images.name, tmp_path / "b", recipe="photo").run.recipe.epochs == load_recipe("photo").epochs
    assert start(images.name, tmp_path / "c", overrides={"epochs": 7}).run.recipe.epochs == 7


def test_bf16_of_a_recipe_gives_way_on_a_cpu_but_a_users_word_does_not(images: Source, tmp_path: Path) -> None:
    assert start(images.name, tmp_path / "a", recipe="attentivenas").run.recipe.precision == "fp32"
    assert start(images.name, tmp_path / "b", recipe="attentivenas", device="cuda").run.recipe.precision == "bf16"
    assert start(images.name, tmp_path / "c", recipe="digits", overrides={"precision": "bf16"}).run.recipe.precision == "bf16"


@pytest.mark.parametrize(
    "wrong",
    [{"data": "nowhere"}, {"space": "digit"}, {"recipe": "digit"}, {"overrides": {"colour": 1}}, {"overrides": {"epochs": 0}}],
)
def test_nothing_is_written_where_something_is_wrong(images: Source, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        start(**{"data": images.name, "out": tmp_path / "run", **wrong})
    assert not (tmp_path / "run").exists()


def test_a_second_start_is_refused_before_the_data_are_read(run: Run) -> None:
    with pytest.raises(InputError, match="holds a run already"):
        start("no such data", run.path)


def test_the_data_room_is_opened_by_name_again(run: Run) -> None:
    assert open_source(run.data["name"]).fingerprint == run.data["fingerprint"] == Run.open(run.path).source.fingerprint


def test_a_run_is_taken_up_by_what_began_it_and_by_nothing_else(tmp_path: Path) -> None:
    begun = start("digits", tmp_path / "run", epochs=2, overrides={"augment.rotate_degrees": 3}).run
    own = tmp_path / "own.yaml"
    own.write_text((config.configs_folder() / "spaces" / "digits.yaml").read_text())
    same = {"augment.rotate_degrees": 3}
    for options in ({}, {"space": str(own)}, {"recipe": "digits", "overrides": same}, {"space": "digits"}):
        refuse_other(begun, "digits", **options)
    for data, options in (
        ("mnist", {}),
        ("digits", {"space": "attentivenas"}),
        ("digits", {"recipe": "cifar"}),
        ("digits", {"recipe": "digits"}),
    ):
        with pytest.raises(InputError, match="leave"):
            refuse_other(begun, data, **options)
    for changes in ({}, {"epochs": 2}, same, {"learning_rate": "1e-1"}):
        refuse_changes(begun, changes)
    for changes in ({"epochs": 3}, {"augment.rotate_degrees": 4}):
        with pytest.raises(InputError, match="leave this out"):
            refuse_changes(begun, changes)
    with pytest.raises(InputError, match="no: unknown key"):
        refuse_changes(begun, {"no.such.key": 1})
