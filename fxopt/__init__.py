"""fxopt: a compiler for PyTorch models that keeps a budget.

Importing the package is cheap: the public names below are loaded at their first use, so neither
triton nor transformers nor onnx is imported by `import fxopt`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxopt.api import apply, frontier, load, optimize, plan, solve, verify
    from fxopt.emit.cache import Cache
    from fxopt.ir.budget import Budget
    from fxopt.ir.distill import Distill
    from fxopt.ir.errors import BudgetError, CaptureError, FxoptError, PlanError
    from fxopt.ir.plan import Plan
    from fxopt.ir.workload import Forward, Generate, Train

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetError",
    "Cache",
    "CaptureError",
    "Distill",
    "Forward",
    "FxoptError",
    "Generate",
    "Plan",
    "PlanError",
    "Train",
    "apply",
    "frontier",
    "load",
    "optimize",
    "plan",
    "solve",
    "verify",
]

_PUBLIC = {
    "Budget": "fxopt.ir.budget:Budget",
    "BudgetError": "fxopt.ir.errors:BudgetError",
    "Cache": "fxopt.emit.cache:Cache",
    "CaptureError": "fxopt.ir.errors:CaptureError",
    "Distill": "fxopt.ir.distill:Distill",
    "Forward": "fxopt.ir.workload:Forward",
    "FxoptError": "fxopt.ir.errors:FxoptError",
    "Generate": "fxopt.ir.workload:Generate",
    "Plan": "fxopt.ir.plan:Plan",
    "PlanError": "fxopt.ir.errors:PlanError",
    "Train": "fxopt.ir.workload:Train",
    "apply": "fxopt.api:apply",
    "frontier": "fxopt.api:frontier",
    "load": "fxopt.api:load",
    "optimize": "fxopt.api:optimize",
    "plan": "fxopt.api:plan",
    "solve": "fxopt.api:solve",
    "verify": "fxopt.api:verify",
}

for _link in ("passes", "kernels", "cost_models"):
    if not os.path.isdir(os.path.join(os.path.dirname(__file__), _link)):
        raise ImportError(
            f"fxopt/{_link} is not a folder: this checkout lost its symbolic links; "
            "run `git config core.symlinks true` and `git checkout -- fxopt`"
        )
del _link


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
