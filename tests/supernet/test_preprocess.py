"""From image files of every kind to the network's input."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import supernet.preprocess
from supernet.preprocess import Preprocessing, open_image, to_mode

GREY = Preprocessing(8, mean=(0.5,), std=(0.25,))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    chunks = [struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B"],
)
def test_every_mode_becomes_grey_or_rgb(mode: str, channels: int) -> None:
    image = to_mode(Image.new(mode, (3, 2)), channels)
    assert (image.mode, image.size) == ({1: "L", 3: "RGB"}[channels], (3, 2))


def test_an_image_in_the_right_mode_is_not_copied() -> None:
    image = Image.new("RGB", (2, 2))
    assert to_mode(image, 3) is image


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    file = encoded(Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(np.asarray(open_image(file, 1)), [[0, 0, 1, 1, 128, 255]])
    assert open_image(file, 3).getpixel((4, 0)) == (128, 128, 128)


def test_pixels_of_unknown_range_are_refused_and_not_clipped() -> None:
    with pytest.raises(ValueError, match="from 0 to 70000"):
        to_mode(Image.fromarray(np.array([[0, 70000]], np.int32)), 1)
    with pytest.raises(ValueError, match="floating-point"):
        to_mode(Image.new("F", (2, 2)), 3)


def test_one_bit_images_become_black_and_white() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    assert np.asarray(open_image(encoded(image, "PNG"), 1)).tolist() == [[255, 0]]


def test_alpha_is_dropped_and_colours_kept() -> None:
    pixels = noise(4, 5, 4)
    image = open_image(encoded(Image.fromarray(pixels), "PNG"), 3)
    np.testing.assert_array_equal(np.asarray(image), pixels[..., :3])
    grey = Image.merge("LA", [Image.fromarray(pixels[..., 0].copy()), Image.fromarray(pixels[..., 3].copy())])
    np.testing.assert_array_equal(np.asarray(open_image(encoded(grey, "PNG"), 1)), pixels[..., 0])


def test_a_palette_with_transparency_is_looked_up_without_a_warning() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    file = encoded(palette, "PNG", transparency=b"\x00\x80")  # warnings are errors here
    assert np.asarray(open_image(file, 3)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert open_image(file, 1).mode == "L"


def test_cmyk_photos_open_with_their_colours() -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    pixel = open_image(encoded(red, "JPEG", quality=95), 3).getpixel((8, 8))
    np.testing.assert_allclose(pixel, (250, 10, 10), atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_undone(orientation: int) -> None:
    upright = np.zeros((24, 16), np.uint8)
    upright[:8, :8] = 255  # the bright corner is top left when upright
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=95, exif=exif), 1)
    np.testing.assert_allclose(np.asarray(image), upright, atol=3)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_damaged_exif_does_not_lose_the_image(exif: bytes) -> None:
    file = encoded(Image.new("L", (4, 4), 77), "PNG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some of them
        assert open_image(file, 1).size == (4, 4)


def test_a_truncated_photo_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "half a cat.jpg"
    path.write_bytes(encoded(Image.fromarray(noise(64, 64)), "JPEG").getvalue()[:-600])
    with pytest.raises(ValueError, match=r"half a cat\.jpg: .*truncated"):
        open_image(path, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_cut_file_is_refused_with_a_one_line_value_error_or_decoded_whole(kind: str, tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(noise(20, 20)), kind).getvalue()
    refused = 0
    for length in range(0, len(whole), max(1, len(whole) // 25)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        try:
            assert open_image(path, 3).size == (20, 20)
        except ValueError as error:
            assert re.fullmatch(r".*/cut: .+", str(error))
            refused += 1
    assert refused >= 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a shopping list\n", "is not an image"),
        (b"", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image"),  # never to Ghostscript
        (png_claiming(50_000, 50_000), "megapixels"),
        (png_claiming(10_000, 9_999), "megapixels"),
        (png_claiming(8_001, 8_000), "8001 x 8000 pixels, more than 64 megapixels"),
        (png_claiming(100, 100), "truncated|broken|ended"),
    ],
)
def test_what_is_not_an_image_is_refused_with_the_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cat\.jpg: .*({reason})"):
        open_image(path, 3)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jpg: there is no such file"):
        open_image(tmp_path / "none.jpg", 3)
    with pytest.raises(ValueError, match="directory"):
        open_image(tmp_path, 3)


def test_a_file_of_the_caller_stays_open_and_is_named_if_it_has_a_name(tmp_path: Path) -> None:
    file = encoded(Image.new("L", (2, 2)), "PNG")
    open_image(file, 1)
    assert not file.closed
    with pytest.raises(ValueError, match=r"^the file: "):
        open_image(io.BytesIO(b"x"), 1)


def test_pixels_at_the_images_own_size_are_the_image() -> None:
    for channels, preprocessing in ((1, GREY), (3, Preprocessing(8, mean=(0.0,) * 3, std=(1.0,) * 3))):
        pixels = noise(8, 8, channels)
        np.testing.assert_array_equal(preprocessing.pixels(Image.fromarray(pixels)), pixels.reshape(8, 8, channels))


def test_the_crop_is_the_central_square() -> None:
    pixels = noise(8, 12, 1)
    np.testing.assert_array_equal(GREY.pixels(Image.fromarray(pixels))[..., 0], pixels[:, 2:10])
    half = Preprocessing(4, 0.5, mean=(0.5,), std=(0.5,))
    np.testing.assert_array_equal(half.pixels(Image.fromarray(pixels))[..., 0], pixels[2:6, 4:8])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 1.0))
def test_any_size_and_crop_give_the_resolution_and_keep_a_constant_image(
    width: int, height: int, resolution: int, crop: float
) -> None:
    pixels = Preprocessing(resolution, crop, mean=(0.5,), std=(0.5,)).pixels(Image.new("L", (width, height), 131))
    assert pixels.shape == (resolution, resolution, 1)
    assert (pixels == 131).all()


@settings(deadline=None)
@given(st.integers(4, 30), st.integers(4, 30), st.integers(1, 12), st.floats(0.5, 1.0))
def test_a_mirrored_image_gives_mirrored_pixels(height: int, width: int, resolution: int, crop: float) -> None:
    preprocessing = Preprocessing(resolution, crop, mean=(0.5,), std=(0.5,))
    pixels = noise(height, width, 1)
    mirrored = preprocessing.pixels(Image.fromarray(np.ascontiguousarray(pixels[::-1, ::-1])))
    np.testing.assert_allclose(mirrored[::-1, ::-1].astype(int), preprocessing.pixels(Image.fromarray(pixels)), atol=3)


def test_the_input_is_normalised_contiguous_and_channels_first() -> None:
    preprocessing = Preprocessing(4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    images = [Image.fromarray(noise(4, 4, seed=seed)) for seed in range(3)]
    x_nchw = preprocessing(images)
    assert (x_nchw.shape, x_nchw.dtype, x_nchw.flags.c_contiguous) == ((3, 3, 4, 4), np.float32, True)
    expected = (noise(4, 4, seed=2)[1, 3].astype(float) / 255 - (0.1, 0.2, 0.3)) / (0.5, 0.25, 2.0)
    np.testing.assert_allclose(x_nchw[2, :, 1, 3], expected, rtol=1e-5, atol=1e-6)
    assert preprocessing([]).shape == (0, 3, 4, 4)


def test_pixels_of_another_type_or_shape_are_not_normalised() -> None:
    for wrong in (np.zeros((1, 8, 8, 1)), np.zeros((8, 8, 1), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="pixels are uint8"):
            GREY.normalise(wrong)


@settings(deadline=None)
@given(
    st.integers(1, 8000),
    st.floats(0, 1, exclude_min=True),
    st.lists(st.tuples(st.floats(-10, 10), st.floats(1e-6, 10)), min_size=1, max_size=1),
)
def test_a_preprocessing_survives_json(resolution: int, crop: float, moments: list[tuple[float, float]]) -> None:
    mean, std = zip(*moments, strict=True)
    preprocessing = Preprocessing(resolution, crop, mean, std)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.as_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 0}, "resolution"),
        ({"resolution": 32.0}, "resolution"),
        ({"resolution": True}, "resolution"),
        ({"crop": 0.0}, "crop"),
        ({"crop": 1.01}, "crop"),
        ({"crop": "1"}, "crop"),
        ({"crop": float("nan")}, "crop"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": 0.5}, "mean"),
        ({"mean": [None]}, "mean"),
        ({"mean": "x"}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"std": [float("inf")]}, "std"),
        ({"std": [0.5, 0.5, 0.5]}, "one of each per channel"),
        ({"colour": "bgr"}, "exactly the keys"),
    ],
)
def test_a_wrong_value_or_an_unknown_key_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(GREY.as_dict() | change)


def test_a_missing_key_is_refused() -> None:
    for name in GREY.as_dict():
        with pytest.raises(ValueError, match="exactly the keys"):
            Preprocessing.from_dict({key: value for key, value in GREY.as_dict().items() if key != name})
    with pytest.raises(ValueError, match="mean is a tuple"):
        Preprocessing(32)


def test_the_file_runs_alone_with_numpy_and_pillow_only(tmp_path: Path) -> None:
    copy = tmp_path / "preprocess.py"
    copy.write_bytes(Path(supernet.preprocess.__file__).read_bytes())
    Image.fromarray(noise(9, 9)).save(tmp_path / "x.png")
    code = (
        "import sys; from preprocess import Preprocessing, open_image\n"
        "p = Preprocessing.from_dict({'resolution': 4, 'crop': 1.0, 'mean': [0.5] * 3, 'std': [0.5] * 3})\n"
        "print(p([open_image('x.png', p.channels)]).shape)\n"
        "print(sorted({'torch', 'supernet', 'torchvision', 'sklearn', 'timm'} & {m.split('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["(1, 3, 4, 4)", "[]"]
