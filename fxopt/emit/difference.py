"""How far two tensors are apart."""

from __future__ import annotations

from torch import Tensor


def difference(wanted: Tensor, found: Tensor) -> float:
    """Largest |wanted - found| in units of max(1, largest |wanted|); infinite where shapes or
    dtypes differ, or one alone is not finite."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    wanted, found = wanted.double(), found.double()
    same = (wanted == found) | (wanted.isnan() & found.isnan())
    if bool(same.all()):
        return 0.0
    finite = wanted[wanted.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    gap = (wanted - found)[~same].abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(gap.max()) / scale
