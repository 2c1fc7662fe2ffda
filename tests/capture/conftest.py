"""What the tests of capture share: an error bound that nobody invented."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt.kernels.attention.op  # noqa: F401
from fxopt.capture import Captured

Compare = Callable[..., None]


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


@pytest.fixture(scope="session")
def assert_same() -> Compare:
    """The captured graph is as near to the model in float64 as the model itself is.

    `seen` [batch, length] restricts the comparison to tokens that are not padding.
    """

    def compare(
        captured: Captured, model: nn.Module, inputs: dict[str, Any], seen: Tensor | None = None
    ) -> None:
        exact = copy.deepcopy(model).double()
        if hasattr(exact, "set_experts_implementation"):
            # Grouped products have no kernel for float64.
            exact.set_experts_implementation("eager")
        with torch.no_grad():
            got = captured.run(**inputs)
            want = model(**inputs)
            reference = exact(**{name: _double(value) for name, value in inputs.items()})
        assert type(got) is type(want)
        leaves = captured.output.leaves_of
        for a, b, c in zip(leaves(got), leaves(want), leaves(reference), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            if seen is not None and a.shape[:2] == seen.shape:
                a, b, c = a[seen], b[seen], c[seen]
            own = (b.double() - c).abs().max().item() if a.numel() else 0.0
            error = (a.double() - c).abs().max().item() if a.numel() else 0.0
            scale = c.abs().max().item() if a.numel() else 0.0
            assert error <= 4 * own + 8 * torch.finfo(b.dtype).eps * scale

    return compare
