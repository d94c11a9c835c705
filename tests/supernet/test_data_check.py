"""What `nestling data check` finds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from supernet.data.check import Report, Same, Spread, check
from supernet.data.commands import app
from supernet.data.sources import ArraySource, open_source

SIZES = {"train": 60, "val": 20, "test": 20}


def folder_of(root: Path, counts: Mapping[str, Mapping[str, int]], *, first: int = 0) -> Path:
    """Different photos, so many of each part and class."""
    rng = np.random.default_rng(first)
    for part, classes in counts.items():
        for label, count in classes.items():
            (root / part / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(root / part / label / f"{i:03d}.png")
    return root


def even(**parts: int) -> dict[str, dict[str, int]]:
    return {part: {"a": count, "b": count} for part, count in parts.items()}


def checked(root: Path, **options: object) -> Report:
    return check(open_source(str(root)), **options)  # type: ignore[arg-type]


def copy(root: Path, one: str, other: str) -> None:
    (root / other).write_bytes((root / one).read_bytes())


def test_counts_sizes_modes_and_splits(tmp_path: Path) -> None:
    root = folder_of(tmp_path, even(train=30, test=10))
    Image.new("L", (40, 10), 7).save(root / "train" / "a" / "000.png")
    Image.new("RGBA", (8, 10), (1, 2, 3, 4)).save(root / "train" / "b" / "000.png")
    report = checked(root)
    assert (report.images, report.looked_at, report.channels) == (80, 80, 3)
    assert report.parts == {"train": 60, "test": 20}
    assert report.splits == {"train": 48, "search_val": 6, "confirm": 6, "test": 20}
    assert report.classes == {label: {"train": 24, "search_val": 3, "confirm": 3, "test": 10} for label in "ab"}
    assert report.modes == {"L": 1, "RGB": 78, "RGBA": 1}
    assert report.sizes["width"] == Spread(8, 8, 40)
    assert report.sizes["short side"] == Spread(8, 8, 10)
    assert report.sizes["aspect"] == Spread(0.8, 0.889, 4.0)
    assert (report.errors, report.duplicates, report.unreadable) == ([], (), ())
    assert json.loads(json.dumps(report.to_json_dict()))["sizes"]["aspect"] == {"least": 0.8, "median": 0.889, "most": 4.0}


def test_leaks_from_train_to_test_come_first_and_are_errors_when_many(tmp_path: Path) -> None:
    root = folder_of(tmp_path, even(train=40, val=10, test=60))
    copy(root, "train/a/003.png", "train/a/004.png")
    copy(root, "train/b/001.png", "val/b/002.png")
    copy(root, "train/a/000.png", "test/a/009.png")
    report = checked(root)
    assert report.duplicates[0] == Same(("train/a/000.png", "test/a/009.png"), ("train", "test"), ("a", "a"))
    assert report.errors == []
    expected = r"1 of 120 images of test are also in train, such as train/a/000\.png and test/a/009\.png: remove them"
    assert re.fullmatch(expected, report.warnings[0])
    assert re.match(r"1 of 10 images of (confirm|search_val) are also in train", report.warnings[1])
    assert "1 images repeat another one of the same split" in report.warnings
    copy(root, "train/a/001.png", "test/b/001.png")
    report = checked(root)
    assert report.errors[0].startswith("2 of 120 images of test are also in train")
    torn = next(text for text in report.warnings if "two classes" in text)
    assert torn == "1 images are there under two classes, such as train/a/001.png and test/b/001.png: correct their labels"


def test_duplicates_are_found_by_their_pixels_not_their_bytes(tmp_path: Path) -> None:
    root = folder_of(tmp_path, even(train=30, test=10))
    image = Image.open(root / "train" / "a" / "000.png")
    image.save(root / "train" / "a" / "999.bmp")
    Image.fromarray(np.asarray(image)[::-1].copy()).save(root / "train" / "a" / "998.png")
    assert [same.identities for same in checked(root).duplicates] == [("train/a/000.png", "train/a/999.bmp")]
    for size in ((4, 6), (6, 4)):
        Image.new("RGB", size, (9, 9, 9)).save(root / "train" / "b" / f"flat-{size[0]}.png")
    assert len(checked(root).duplicates) == 1  # the same bytes, but of another shape
    flat = ArraySource("flat", ["a", "b"], np.arange(40) % 2, [""] * 40, np.zeros((40, 2, 3), np.uint8))
    assert len(check(flat).duplicates[0].identities) == 40


def test_unreadable_images_are_errors_until_they_are_allowed(tmp_path: Path) -> None:
    root = folder_of(tmp_path, even(train=30, test=10))
    (root / "train" / "a" / "003.png").write_text("a shopping list")
    path = root / "test" / "b" / "003.png"
    path.write_bytes(path.read_bytes()[:-100])
    report = checked(root)
    assert [flaw.identity for flaw in report.unreadable] == ["train/a/003.png", "test/b/003.png"]
    assert report.errors[0].startswith("every image must be readable, but 2 of 80 are not (train/a/003.png: is not an image")
    assert sum(report.splits.values()) == 78
    report = checked(root, skip_unreadable=0.05)
    assert report.errors == []
    assert report.warnings[0].startswith("2 images cannot be read and are left out")
    assert json.loads(json.dumps(report.to_json_dict()))["unreadable"][0]["identity"] == "train/a/003.png"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"train": {"a": 30, "b": 30}, "val": {"a": 9}, "test": {"a": 9, "b": 9}},
            "class 'b' of .* has 0 images in the val part",
        ),
        (
            {"train": {"a": 30, "b": 30}, "val": {"a": 9, "b": 1}, "test": {"a": 9, "b": 9}},
            "'b' of .* has 1 images in the val part",
        ),
        ({"train": {"a": 30, "b": 30}, "test": {"a": 9}}, "class 'b' of .* has 0 images for test"),
        ({".": {"a": 30, "b": 3}}, "class 'b' of .* has 3 images to divide, and at least 4 are needed"),
        ({"train": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2}}, "has 2 images to divide, and at least 3"),
    ],
)
def test_what_cannot_be_divided_is_an_error_that_says_why(
    tmp_path: Path, counts: dict[str, dict[str, int]], message: str
) -> None:
    report = checked(folder_of(tmp_path, counts))
    assert len(report.errors) == 1
    assert re.search(message, report.errors[0])
    assert report.splits == {}
    assert sum(sum(own.values()) for own in report.classes.values()) == report.images


def test_uneven_classes_few_images_and_large_batches_are_remarked_upon(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"train": {"a": 100, "b": 8}, "test": {"a": 10, "b": 10}})
    report = checked(root, batch_size=128)
    assert report.errors == []
    text = "\n".join(report.warnings)
    assert "classes are uneven: 82 training images of 'a' and 6 of 'b'" in text
    assert "1 classes have fewer than 20 training images, such as 'b' (6)" in text
    assert "test has 20 images: at 80 % top-1 its standard error is 8.9 points" in text
    assert "a batch of 128 is larger than the 88 training images" in text
    assert "a batch" not in "\n".join(checked(root, batch_size=88).warnings)


def test_colours_that_a_grey_set_would_lose_are_remarked_upon(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB" if i == 5 else "L", (4, 4), i if i != 5 else (1, 2, 3)).save(tmp_path / "ab"[i % 2] / f"{i:03d}.png")
    source = open_source(str(tmp_path))
    assert source.channels == 1
    assert any("taken to be grey, but some have colours (modes L, RGB)" in text for text in check(source).warnings)


def test_a_part_of_the_images_may_be_looked_at(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = checked(folder_of(tmp_path, even(train=30, test=10)), most=11, progress=lambda *done: seen.append(done))
    assert (report.looked_at, sum(report.modes.values()), report.images, sum(report.splits.values())) == (11, 11, 80, 80)
    assert seen == [(i + 1, 11) for i in range(11)]


def test_the_command_prints_all_of_it_and_its_exit_code_tells(tmp_path: Path) -> None:
    root = folder_of(tmp_path, even(train=40, test=20))
    good = CliRunner().invoke(app, ["check", str(root)])
    assert good.exit_code == 0, good.output
    assert "this data can be trained on" in good.stdout
    assert "warning: test has 40 images" in good.stdout
    as_json = CliRunner().invoke(app, ["check", str(root), "--json", "--images", "30"])
    assert json.loads(as_json.stdout) == json.loads(json.dumps(checked(root, most=30).to_json_dict()))
    copy(root, "train/a/000.png", "test/a/009.png")
    (root / "train" / "b" / "000.png").write_text("x")
    bad = CliRunner().invoke(app, ["check", str(root)])
    assert bad.exit_code == 1
    assert "same pixels: train/a/000.png (train), test/a/009.png (test)" in bad.stdout.replace("(search_val)", "(train)")
    assert "unreadable: train/b/000.png: is not an image" in bad.stdout
    assert "error: every image must be readable" in bad.stdout
    assert "can be trained on" not in bad.stdout
    assert CliRunner().invoke(app, ["check", str(root), "--json"]).exit_code == 1


def test_many_classes_are_shown_by_their_ends(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(30), np.arange(10, 40))
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels, classes=np.array([f"class-{i:02d}" for i in range(30)]))
    shown = CliRunner().invoke(app, ["check", str(tmp_path / "x.npz")]).stdout
    assert [name for name in (f"class-{i:02d}" for i in range(30)) if name in shown.split("warning")[0]] == [
        f"class-{i:02d}" for i in (*range(10), *range(20, 30))
    ]
    assert "(10 more)" in shown
