"""Registering fxopt's own ops."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

KERNELS = "fxopt.kernels"


@lru_cache(maxsize=1)
def register_ops() -> None:
    """Import every `kernels/<op>/op.py`, which registers `torch.ops.fxopt.<op>`."""
    for folder in _folders():
        importlib.import_module(f"{KERNELS}.{folder}.op")


def references() -> dict[str, object]:
    """The traceable form of each op, by its name: the `REFERENCE` of its folder."""
    found: dict[str, object] = {}
    for folder in _folders():
        package: Any = importlib.import_module(f"{KERNELS}.{folder}")
        if hasattr(package, "REFERENCE"):
            found[folder] = package.REFERENCE
    return found


def _folders() -> list[str]:
    package: Any = importlib.import_module(KERNELS)
    return sorted(
        file.parent.name for root in package.__path__ for file in Path(root).glob("*/op.py")
    )
