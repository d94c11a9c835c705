"""int8 in torch: weighted layers that read numbers rounded as ONNX Runtime rounds them.

What a layer reads is rounded to 8 bits by the range that it was seen to have, its weights to 8 bits by output channel, symmetric
(Jacob et al. 2018, section 2; Krishnamoorthi 2018, section 3). A batch norm behind the layer scales whole channels, so it is the same
whether it was folded before. Sums, gates and activations stay in fp32: ONNX Runtime rounds them too, unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]
STEPS = 255
SMALLEST_RANGE = 1e-30
"""Of what a layer reads, where it read nothing but zeros."""


def weighted(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that are quantised, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, WEIGHTED)}


def rounded_weight(layer: nn.Module) -> Tensor:
    """A layer's weight, rounded to -127..127 steps by output channel."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    others = [dim for dim in range(weight.ndim) if dim != axis]
    step = weight.detach().abs().amax(others, keepdim=True).clamp_min(SMALLEST_RANGE) / 127
    return (weight.detach() / step).round().clamp(-127, 127) * step


def rounded(x: Tensor, low: float, high: float) -> Tensor:
    """Numbers rounded to 255 steps from `low` to `high`, 0 being one of them; what lies beyond becomes the end."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max(high - low, SMALLEST_RANGE) / STEPS
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, STEPS).sub(zero).mul(step)


class Simulation:
    """Hooks on the weighted layers of a network in evaluation mode: it observes ranges, then rounds. Weights are changed in place.

    Give a network of one's own: a copy, or one that is used for nothing else.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = weighted(network)
        self.ranges: dict[str, tuple[float, float]] = {}
        self._active: Collection[str] = ()
        self._observing = False
        self._exact = {name: layer.weight for name, layer in self.layers.items()}
        self._rounded: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Hook:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            (x,) = given
            if self._observing:
                low, high = (float(end) for end in torch.aminmax(x))
                known = self.ranges.get(name, (0.0, 0.0))
                self.ranges[name] = min(low, known[0]), max(high, known[1])
            return (rounded(x, *self.ranges[name]),) if name in self._active else None

        return hook

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Note the ranges of what layers read while the block runs."""
        self._observing = True
        try:
            yield
        finally:
            self._observing = False

    def begin_rounding(self, names: Iterable[str] | None = None) -> None:
        """Round in these layers (in all that ran while it observed) until `end_rounding`."""
        wanted = list(self.ranges if names is None else names)
        for name in wanted:
            if name not in self._rounded:
                self._rounded[name] = nn.Parameter(rounded_weight(self.layers[name]), requires_grad=False)
            self.layers[name].weight = self._rounded[name]
        self._active = set(wanted)

    def end_rounding(self) -> None:
        """Compute as before."""
        for name in self._active:
            self.layers[name].weight = self._exact[name]
        self._active = ()

    @contextmanager
    def rounding(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Round in these layers (in all) while the block runs. Their ranges must have been observed."""
        self.begin_rounding(names)
        try:
            yield
        finally:
            self.end_rounding()


def sensitivities(network: nn.Module, images: Tensor) -> list[tuple[str, float]]:
    """Layers of a network in evaluation mode, the most sensitive first: mean squared change of outputs where it alone is rounded.

    `network` is changed back in the end, but keeps hooks: give a copy.
    """
    simulation = Simulation(network)
    with torch.no_grad():
        with simulation.observing():
            exact = network(images)
        found = []
        for name in simulation.ranges:  # in the order in which they run
            with simulation.rounding([name]):
                found.append((name, float((network(images) - exact).square().mean())))
    return sorted(found, key=lambda each: -each[1])
