"""What `recover=` takes: how rewritten layers are trained after they were projected."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Distill:
    """Block-wise distillation: each rewritten block is trained to the outputs of the original's.

    A block is a decoder layer, an encoder layer, and so on: all below a module's first number
    (`model.layers.3`), or a layer that stands in none. One after another, with inputs as the
    rewritten blocks before it make them, the tensors that rewrites of its linear layers registered
    (factors, Monarch's blocks, pruned weights) take up to `steps` steps of Adam on
    ‖y − ŷ‖² / ‖y‖². Nothing else is trained, codes and their scales neither; no label is read.

    `learning_rate` is the largest step's size as a share of each tensor's root mean square; it is
    reached after a tenth of the steps and falls linearly to 0. A step sees `batch` sequences of
    the calibration's fit part, without the share `holdout` of them, on which a block is measured
    twenty times on the way: it keeps its best tensors, which are those of before where none is
    better, and ends when `patience` measurements in a row were no better. `seed` draws the
    sequences. ValueError names a field out of range.

    Papers: block reconstruction as in BRECQ, https://arxiv.org/abs/2102.05426; blocks distilled
    apart from each other as in Puzzle, https://arxiv.org/abs/2411.19146.
    """

    steps: int = 200
    learning_rate: float = 0.01
    batch: int = 4
    holdout: float = 0.25
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Distill.{name} must be an integer of at least 1, got {value!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"Distill.learning_rate must be above 0, got {self.learning_rate!r}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"Distill.holdout must lie between 0 and 1, got {self.holdout!r}")
