"""A bundle opens as it was exported or not at all, and writing one never costs anything that was there."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.again import verify_again
from deploy.bundle import Bundle, being_written, write_manifest
from supernet.errors import InputError

FILES = ("card.md", "images.json", "model.onnx", "predict.py", "preprocess.py")
SQUARE = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))


def manifest_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return value


def put_manifest(folder: Path, value: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(value))


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files, as somebody would who plants something."""
    write_manifest(folder, manifest_of(folder))


def test_a_bundle_opens_as_it_was_exported(tiny_bundle: Bundle) -> None:
    again = Bundle.open(tiny_bundle.path)
    assert again.manifest == tiny_bundle.manifest
    assert sorted(path.name for path in tiny_bundle.path.iterdir()) == sorted([*FILES, "manifest.json"])
    assert again.classes == ["bar", "rail", "slash"]


def test_a_bundle_opens_wherever_it_is_copied_to(tiny_bundle: Bundle, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_bundle.path, tmp_path / "an ä b"))
    assert np.array_equal(Bundle.open(moved).predict([SQUARE]), tiny_bundle.predict([SQUARE]))
    assert np.array_equal(Bundle.open(str(moved)).predict([SQUARE]), tiny_bundle.predict([SQUARE]))


def test_probabilities_are_a_row_for_each_image_and_add_up_to_1(tiny_bundle: Bundle) -> None:
    found = tiny_bundle.predict([SQUARE] * 70)  # more than a batch
    assert found.shape == (70, 3)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-6)
    assert tiny_bundle.predict([]).shape == (0, 3)


def test_an_image_that_cannot_be_read_is_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"broken\.png"):
        tiny_bundle.predict([tmp_path / "broken.png"])
    with pytest.raises(InputError, match="there is no such file"):
        tiny_bundle.predict([tmp_path / "none.png"])


# --- damage ---


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "a byte changed", "a byte more", "empty", "a link", "a folder"])
def test_a_file_that_is_not_the_exported_one_is_named(bundle_copy: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = bundle_copy / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(
            {"truncated": content[:-1], "a byte changed": changed, "a byte more": content + b"\n", "empty": b""}[damage]
        )
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        Bundle.open(bundle_copy)


def test_two_files_exchanged_are_noticed(bundle_copy: Path) -> None:
    one, other = bundle_copy / "predict.py", bundle_copy / "preprocess.py"
    texts = one.read_text(), other.read_text()
    one.write_text(texts[1])
    other.write_text(texts[0])
    with pytest.raises(InputError, match="was changed"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["numpy.py", "PIL/", "onnxruntime/", "__pycache__/", "numpy.so", "sitecustomize.py"])
def test_a_file_that_was_not_exported_is_refused_for_python_would_run_it(bundle_copy: Path, name: str) -> None:
    if name.endswith("/"):
        (bundle_copy / name).mkdir()
    else:
        (bundle_copy / name).write_text("raise SystemExit('planted')")
    with pytest.raises(InputError, match="was not exported with the bundle"):
        Bundle.open(bundle_copy)


def test_a_note_that_somebody_put_beside_the_model_does_no_harm(bundle_copy: Path) -> None:
    (bundle_copy / "notes.txt").write_text("ours since May")
    assert Bundle.open(bundle_copy).classes


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "a/../../outside", "sub/file", "", ".", "..", "nul\0", "x" * 300, "\ud800", "manifest.json"],
)  # fmt: skip
def test_a_manifest_cannot_name_files_elsewhere(bundle_copy: Path, name: str) -> None:
    (bundle_copy.parent / "outside").write_text("secret")
    (bundle_copy / "sub").mkdir()
    (bundle_copy / "sub" / "file").write_text("secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    put_manifest(bundle_copy, {**manifest_of(bundle_copy), "files": {**manifest_of(bundle_copy)["files"], name: digest}})
    with pytest.raises(InputError) as raised:
        Bundle.open(bundle_copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["model.onnx", "images.json", "predict.py", "preprocess.py"])
def test_a_manifest_must_list_what_a_bundle_needs(bundle_copy: Path, name: str) -> None:
    manifest = manifest_of(bundle_copy)
    del manifest["files"][name]
    put_manifest(bundle_copy, manifest)
    with pytest.raises(InputError):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"format": 1}', b'{"format": 2}', b"1" * 5000],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Bundle.open(bundle_copy)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(InputError, match=r"bundle|cannot be read"):
            Bundle.open(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([-0.5, 0.5, 1000.0]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
READ = [
    ("format",), ("task",), ("classes",), ("classes", 0), ("files",), ("files", "model.onnx"), ("files", "card.md"), ("accuracy",),
    ("accuracy", "metric"), ("training",), ("training", "weights_sha256"), ("arch",), ("arch", "resolution"), ("key",), ("input",),
    *[("preprocessing",), *(("preprocessing", part) for part in ("resolution", "crop", "mean", "std")), ("preprocessing", "mean", 0)],
]  # fmt: skip
"""Parts of the manifest that some code of ours reads."""


@pytest.fixture(scope="module")
def victim(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose manifest is written anew for every example."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path_factory.mktemp("fuzz") / "bundle"))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(READ), st.just(...) | JSON), min_size=1, max_size=3))
def test_a_manifest_of_wrong_types_opens_right_or_is_an_input_error(
    tiny_bundle: Bundle, victim: Path, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    value: Any = copy.deepcopy(dict(tiny_bundle.manifest))
    for path, new in changes:
        change(value, path, new)
    put_manifest(victim, value)
    try:
        probabilities = Bundle.open(victim).predict([SQUARE])
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert probabilities.shape == (1, 3)
        assert np.isfinite(probabilities).all()
    try:
        verify_again(victim, None, None)
    except InputError as error:
        assert "\n" not in str(error)


def change(value: Any, path: tuple[Any, ...], new: Any) -> None:
    """Set (or, given `...`, remove) what lies at `path`, where an earlier change left such a place."""
    *way, last = path
    for step in way:
        if not isinstance(value, dict | list) or not (step in value if isinstance(value, dict) else step < len(value)):
            return
        value = value[step]
    if isinstance(value, list) and isinstance(last, int) and last < len(value):
        value[last] = None if new is ... else new
    elif isinstance(value, dict) and new is ...:
        value.pop(last, None)
    elif isinstance(value, dict):
        value[last] = new


PLANTED_MODELS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda model: b"",
    "noise": lambda model: bytes(range(256)) * 20,
    "half of it": lambda model: model[: len(model) // 2],
    "text": lambda model: b"import os; os.system('true')",
}


@pytest.mark.parametrize("planted", PLANTED_MODELS)
def test_a_planted_model_that_is_none_is_an_input_error(
    bundle_copy: Path, planted: str, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    model = bundle_copy / "model.onnx"
    model.write_bytes(PLANTED_MODELS[planted](model.read_bytes()))
    rehash(bundle_copy)
    with pytest.raises(InputError) as raised:
        Bundle.open(bundle_copy).predict([SQUARE])
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"model\.onnx"):
        verify_again(bundle_copy, None, None)
    assert capfd.readouterr() == ("", "")


def test_a_planted_model_cannot_read_other_files(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    path = bundle_copy / "model.onnx"
    model = onnx.load_model_from_string(path.read_bytes())
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("classifier.weight"))
    (tmp_path / "secret.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret.bin")
    path.write_bytes(model.SerializeToString())
    rehash(bundle_copy)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        Bundle.open(bundle_copy).predict([SQUARE])


@pytest.mark.parametrize("classes", [["bar"], ["bar", "rail"], ["a", "b", "c", "d"], []])
def test_classes_that_are_not_those_of_the_model_are_an_input_error(bundle_copy: Path, classes: list[str]) -> None:
    put_manifest(bundle_copy, {**manifest_of(bundle_copy), "classes": classes})
    with pytest.raises(InputError, match="describes"):
        Bundle.open(bundle_copy).predict([SQUARE])


def test_nothing_in_a_bundle_is_executed(bundle_copy: Path, tmp_path: Path) -> None:
    for name in ("predict.py", "preprocess.py"):
        (bundle_copy / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()")
    rehash(bundle_copy)
    assert Bundle.open(bundle_copy).predict([SQUARE]).shape == (1, 3)
    verify_again(bundle_copy, None, None)
    assert not (tmp_path / "executed").exists()


# --- writing ---


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_something(out: Path) -> None:
    with being_written(out) as draft:
        (draft / "model.onnx").write_bytes(b"new")


def test_a_bundle_appears_whole_and_nothing_else_does(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "bundle"
    with being_written(out) as draft:
        (draft / "model.onnx").write_bytes(b"new")
        assert not out.exists()
    assert listing(tmp_path) == {"deep/er/bundle/model.onnx": b"new"}
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_an_older_bundle_is_replaced_whole(bundle_copy: Path) -> None:
    write_something(bundle_copy)
    assert listing(bundle_copy) == {"model.onnx": b"new"}
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["bundle"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_something(tmp_path / "bundle")
    assert listing(tmp_path) == {"bundle/model.onnx": b"new"}


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def a_web_app(out: Path) -> None:
    put(out / "manifest.json", '{"name": "app", "icons": []}')
    put(out / "index.html", "x")


def a_link_to_a_folder(out: Path) -> None:
    (out.parent / "real").mkdir()
    out.symlink_to(out.parent / "real")


FOREIGN: dict[str, Callable[[Path], None]] = {
    "a file": lambda out: put(out, "x"),
    "a folder with a file": lambda out: put(out / "notes.txt", "x"),
    "a folder with a hidden file": lambda out: put(out / ".git" / "config", "x"),
    "a web app": a_web_app,
    "a manifest alone": lambda out: put(out / "manifest.json", "{}"),
    "a checkpoint": lambda out: put(out / "manifest.json", '{"format": 1, "step": 3, "sha256": {"state.json": "00"}}'),
    "a link to a folder": a_link_to_a_folder,
    "a link to nothing": lambda out: out.symlink_to(out.parent / "nothing"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    FOREIGN[foreign](out)
    before, names = listing(tmp_path), sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="choose another place"):
        write_something(out)
    assert (listing(tmp_path), sorted(path.name for path in tmp_path.iterdir())) == (before, names)


def test_a_file_that_a_user_put_into_a_bundle_is_never_removed(bundle_copy: Path) -> None:
    (bundle_copy / "my notes.txt").write_text("dear")
    before = listing(bundle_copy)
    with pytest.raises(InputError, match=r"my notes\.txt"):
        write_something(bundle_copy)
    assert listing(bundle_copy) == before


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_the_old_bundle_and_nothing_half_written(bundle_copy: Path, error: BaseException) -> None:
    before = listing(bundle_copy.parent)
    with pytest.raises(type(error)), being_written(bundle_copy) as draft:
        (draft / "model.onnx").write_bytes(b"half")
        raise error
    assert listing(bundle_copy.parent) == before
    with pytest.raises(type(error)), being_written(bundle_copy.parent / "fresh") as draft:
        (draft / "model.onnx").write_bytes(b"half")
        raise error
    assert listing(bundle_copy.parent) == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_rename_that_fails_leaves_the_old_bundle(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    before, calls, replace = listing(bundle_copy.parent), [0], Path.replace

    def failing(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == fails_at:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write_something(bundle_copy)
    assert listing(bundle_copy.parent) == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["bundle"]


def test_a_place_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        write_something(tmp_path / "file" / "bundle")
    assert listing(tmp_path) == {"file": b"x"}
