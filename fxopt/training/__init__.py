"""The training step under a byte budget: capture, saved tensors, choice, emission.

`optimize`, `plan` and `apply` are what the package's public functions of those names call for an
`fxopt.Train` workload.
"""

from __future__ import annotations

from .module import TrainingModule
from .optimize import apply, optimize, plan

__all__ = ["TrainingModule", "apply", "optimize", "plan"]
