"""What happens between an image file and the network's input: opening, cropping, resizing, normalising.

Training, evaluation, calibration and every exported bundle run this file, so it needs NumPy and Pillow and nothing else.
Axes: N images, H height, W width, C channels (1 grey, 3 red green blue).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # never EPS: Pillow would run Ghostscript on it
MAX_PIXELS = 64_000_000
LARGEST, SMALLEST_STD = 1e6, 1e-6  # of mean and std: beyond them fp32 overflows
MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's mode
ORIENTATION_TAG = 0x0112
UPRIGHT = {  # EXIF 2.32, table 5: what the camera did -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path_or_file: str | os.PathLike[str] | BinaryIO, channels: int) -> Image.Image:
    """Decode an image file to mode L (1 channel) or RGB (3 channels), turned upright by its EXIF orientation.

    Of an animation, the first frame. Raises ValueError, "NAME: reason", for what is missing, truncated, of another format
    than `FORMATS`, or larger than 64 megapixels (refused before it is decoded).
    """
    name = _name(path_or_file)
    try:
        with open_header(path_or_file) as image:
            return to_mode(_upright(image), channels)
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ValueError(f"{name}: {_reason(error)}") from error


def open_header(path_or_file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Open an image file so that `size` and `mode` are known, and decode no pixel.

    Raises ValueError for more than 64 megapixels and, for damaged files, nearly anything.
    """
    try:
        image = Image.open(path_or_file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError("has more than 64 megapixels") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"has {width} x {height} pixels, more than 64 megapixels")
    return image


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image in memory to mode L (1 channel) or RGB (3 channels); itself where it is that already.

    Alpha is dropped, 16 bits are scaled to 8 (rounded), a palette is looked up. Pillow's mode "I" is taken to hold
    16 bits, as it does for a PNG. Raises ValueError for modes without a fixed range ("F", and "I" beyond 16 bits).
    """
    if channels not in MODES:
        raise ValueError(f"an image has 1 or 3 channels here, not {channels}")
    if image.mode == MODES[channels]:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode in ("La", "RGBa"):  # alpha multiplied in: Pillow divides it out again only on the way to LA and RGBA
        image = image.convert(image.mode.upper())
    elif image.mode in ("P", "PA"):  # by way of RGBA, or a transparent palette makes Pillow warn
        image = image.convert("RGBA").convert("RGB")
    elif image.mode == "F":
        raise ValueError("holds floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if channels == 1 and image.mode not in ("1", "L", "LA"):
        image = image.convert("RGB")  # not every mode goes to grey at once
    return image.convert(MODES[channels])


@dataclass(frozen=True)
class Preprocessing:
    """From an upright image to the network's input: central square, bicubic resize, normalisation.

    `resolution` is the side of the square in pixels; `crop` the fraction of the short side that the central square keeps;
    `mean` and `std` (one or three numbers, of pixels in 0..1) are subtracted and divided by.
    """

    resolution: int
    crop: float = 1.0
    mean: tuple[float, ...] = ()  # no default that holds: the check below refuses it
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (_is_whole(self.resolution) and 1 <= self.resolution <= 8000):
            raise ValueError(f"resolution is a whole number of pixels, 1 to 8000, not {self.resolution!r}")
        if not (_is_number(self.crop) and 0 < self.crop <= 1):
            raise ValueError(f"crop is the fraction of the short side that is kept, above 0 and at most 1, not {self.crop!r}")
        for name in ("mean", "std"):
            values: object = getattr(self, name)
            if not isinstance(values, tuple) or len(values) not in MODES or not all(map(_is_number, values)):
                raise ValueError(f"{name} is a tuple of 1 or 3 finite numbers of ordinary size, not {str(values)[:200]}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} numbers and std {len(self.std)}: give one of each per channel")
        if min(self.std) < SMALLEST_STD:
            raise ValueError(f"std is at least {SMALLEST_STD}, not {self.std!r}")

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (red, green, blue)."""
        return len(self.mean)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize the central square: uint8 (H, W, C) with H = W = resolution. Another mode than the network's is converted."""
        image = to_mode(image, self.channels)
        side = self.crop * min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        square = (left, top, min(left + side, image.width), min(top + side, image.height))
        small = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC, box=square)
        return np.asarray(small).reshape(self.resolution, self.resolution, self.channels)

    def normalise(self, pixels_nhwc: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`(pixels / 255 - mean) / std`: uint8 (N, H, W, C) to contiguous float32 (N, C, H, W)."""
        if pixels_nhwc.dtype != np.uint8 or pixels_nhwc.ndim != 4 or pixels_nhwc.shape[3] != self.channels:
            given = f"{pixels_nhwc.dtype} {pixels_nhwc.shape}"
            raise ValueError(f"pixels are uint8 of shape (images, height, width, {self.channels}), not {given}")
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        x_nhwc: NDArray[np.float32] = (pixels_nhwc.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(x_nhwc.transpose(0, 3, 1, 2))

    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Make the network's input of images: float32 (N, C, resolution, resolution)."""
        pixels_nhwc = np.empty((len(images), self.resolution, self.resolution, self.channels), np.uint8)
        for row, image in enumerate(images):
            pixels_nhwc[row] = self.pixels(image)
        return self.normalise(pixels_nhwc)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them."""
        return {"resolution": self.resolution, "crop": self.crop, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Read what `as_dict` wrote. Raises ValueError for a missing or unknown key, a wrong type or a wrong range."""
        if not isinstance(value, Mapping):
            raise ValueError(f"preprocessing is a table of resolution, crop, mean and std, not {value!r}")
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            given = ", ".join(map(str, value)) or "nothing"
            raise ValueError(f"preprocessing has exactly the keys crop, mean, resolution and std; it was given {given}")
        for name in ("mean", "std"):
            if not isinstance(value[name], (list, tuple)):
                raise ValueError(f"preprocessing {name} is a list of 1 or 3 numbers, not {value[name]!r}")
        return cls(value["resolution"], value["crop"], mean=tuple(value["mean"]), std=tuple(value["std"]))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # EXIF data that cannot be read hold no orientation; the pixels are whole
        return image
    method = UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"holds pixels from {values.min()} to {values.max()}: save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _name(path_or_file: object) -> str:
    if isinstance(path_or_file, (str, os.PathLike)):
        return os.fspath(path_or_file)
    return str(getattr(path_or_file, "name", "the file"))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image that is read here ({', '.join(FORMATS)})"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Whether it is a number that fp32 can work with; infinities and NaN are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
