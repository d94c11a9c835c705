"""TensorBoard's curves of a run, drawn from its log: `metrics.jsonl` is the truth, these files can be made again from it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supernet import durable
from supernet.errors import InputError


class Board:
    """Writes `RUN/tensorboard/`. Raises `InputError` where TensorBoard is not installed."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs TensorBoard: pip install 'nestling[tensorboard]'") from error
        self.run = run
        self._make: Any = SummaryWriter
        self._writer: Any = None
        self._step = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Add what was just written to the log: learning_rate, gradient_norm, images_per_s, loss/ROLE, top1/ROLE, validation/ROLE.

        At first, and when the run went back, all of the log is drawn anew: old curves would stay beside the new ones.
        """
        if self._writer is None or line["step"] <= self._step:
            self.close()
            folder = self.run / "tensorboard"
            shutil.rmtree(folder, ignore_errors=True)
            self._writer = self._make(str(folder))
            for earlier in durable.read_lines(self.run / "metrics.jsonl"):
                self._draw(earlier)
        else:
            self._draw(line)
        self._step = line["step"]

    def _draw(self, line: Mapping[str, Any]) -> None:
        flat = {name: line.get(name) for name in ("learning_rate", "gradient_norm", "images_per_s", "skipped")}
        for role, measured in line.get("children", {}).items():
            flat |= {f"{name}/{role}": value for name, value in measured.items()}
        flat |= {f"validation/{role}": value for role, value in line.get("validation", {}).items()}
        for name, value in flat.items():
            if value is not None:
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is waiting to be written."""
        if self._writer is not None:
            self._writer.close()
