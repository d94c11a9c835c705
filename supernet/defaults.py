"""Sensible choices for data that we have not seen: space, recipe and epochs from image size, number of images and device."""

from __future__ import annotations

import numpy as np

from supernet.costs import Costs
from supernet.space import Space

RECIPES = {
    **dict.fromkeys(["digits", "mlp"], "digits"),
    **dict.fromkeys(["cifar-mbconv", "cifar-resnet", "cell"], "cifar"),
    **dict.fromkeys(["photo-mbconv"], "photo"),
    **dict.fromkeys(["attentivenas", "efficientnet-b0", "mobilenetv3-large", "ofa-mobilenetv3", "ofa-mobilenetv3-w1.2",
                     "ofa-resnet50", "resnet50d"], "attentivenas"),
    **dict.fromkeys(["autoformer-base", "autoformer-small", "autoformer-tiny", "vit-tiny"], "autoformer"),
    "bignas": "bignas",
    "cifar-vit": "cifar-vit",
    "autoencoder": "autoencoder",
}  # fmt: skip
"""Space -> the recipe made for its kind of networks and images."""
MOST_SEEN = {
    "digits": 40_000, "autoencoder": 100_000, "cifar": 1_500_000, "cifar-vit": 3_000_000, "photo": 300_000, "attentivenas": 460_000_000,
    "bignas": 460_000_000, "autoformer": 640_000_000,
}  # fmt: skip
"""Recipe -> images shown in all, beyond which more epochs bring little."""
MOST_MACS = {"cpu": 2.5e13, "cuda": 5e18}
"""Training work that is reasonable without being asked: half an hour to an hour on two CPU cores, days on a GPU."""
LEAST_EPOCHS, MOST_EPOCHS = 3, 360
BACKWARD = 2
"""A backward pass costs about two forward passes."""


def space_for(image_size: int, images: int, device: str) -> tuple[str, str]:
    """Name of the space for `images` images of `image_size` pixels on "cpu" or "cuda", and the reason."""
    if image_size <= 16:
        return "digits", f"images of {image_size} px are tiny"
    if image_size <= 64:
        return "cifar-mbconv", f"images of {image_size} px are small"
    if image_size < 200 or device == "cpu" or images < 50_000:
        needs = "the ImageNet space needs a GPU, 200 px and 50,000 images"
        return "photo-mbconv", f"{images} images of {image_size} px on {device} ({needs})"
    return "attentivenas", f"{images} images of {image_size} px on {device}"


def recipe_for(space: str) -> str:
    """The recipe made for a space; "photo" for spaces that are not ours."""
    return RECIPES.get(space, "photo")


def epochs_for(space: Space, images: int, device: str, children: int) -> int:
    """Epochs over `images` training images: as many as pay, within the work that the device can reasonably do."""
    seen = min(MOST_SEEN[recipe_for(space.name)], MOST_MACS[device] / training_macs(space, children))
    return int(np.clip(round(seen / images), LEAST_EPOCHS, MOST_EPOCHS))


def training_macs(space: Space, children: int) -> float:
    """Multiply-accumulates of a training step for one image: forward and backward of all children of the sandwich."""
    costs = Costs(space)
    ends = costs.macs(space.encode([space.largest, space.smallest]))[:children].sum()
    mean = costs.macs(space.sample_codes(1000, np.random.default_rng([0, 7]))).mean()
    return float((1 + BACKWARD) * (ends + max(0, children - 2) * mean))
