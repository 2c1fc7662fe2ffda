"""What rewrites share that save codes of a derivative in place of what it is a function of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Editor, Match, Refusal
from fxopt.ir.saved import MARK, Image
from fxopt.ir.site import Derivative, SavedInfo, Site
from fxopt.kernels.activation_function import code_bytes, derivative_codes, times_derivative
from fxopt.passes.activation.pieces import Pieces


def derivative(site: Site) -> Derivative | Refusal:
    """What alone reads a saved tensor, where that is the derivative of a function of each value."""
    if not isinstance(site.info, SavedInfo):
        return Refusal("not a tensor that is saved for the backward")
    if site.info.derivative is None:
        return Refusal("the backward reads it for more than the derivative of a function of each")
    return site.info.derivative


def smaller(match: Match, bits: int) -> bool:
    """Whether codes take fewer bytes than the tensor."""
    return _bytes(match, bits) < _info(match).bytes


def too_small(match: Match, bits: int) -> str | None:
    """Why not, if they do not."""
    if smaller(match, bits):
        return None
    return f"{_bytes(match, bits)} bytes of codes are no less than the {_info(match).bytes} of it"


def mark(match: Match, pieces: Pieces, editor: Editor) -> None:
    """Ask for codes in place of the tensor."""
    found: Derivative = match.extra["derivative"]
    editor.node(match.site).meta[MARK] = Image(
        derivative_codes,
        (pieces.borders, pieces.bits),
        times_derivative,
        (found.stride, pieces.levels, pieces.bits),
        pieces.error,
        replaces=True,
    )


def calls(match: Match, pieces: Pieces) -> list[OpCall]:
    """Making the codes, and the product that reads them."""
    found, info, bits = match.extra["derivative"], _info(match), pieces.bits
    borders, levels = list(pieces.borders), list(pieces.levels)
    packed, gradient = _bytes(match, bits), math.prod(found.shape) * found.dtype.itemsize

    def code(device: Any) -> Callable[[], Any]:
        x = torch.randn(info.shape, device=device).to(info.dtype)
        return lambda: derivative_codes(x, borders, bits)

    def product(device: Any) -> Callable[[], Any]:
        x = torch.randn(found.shape, device=device)
        y = _strided(found, found.gradient, device)
        codes = derivative_codes(x, borders, bits)
        return lambda: times_derivative(y, codes, found.stride, levels, bits)

    def key(dtype: torch.dtype) -> str:
        return f"b{bits}n{len(levels)}/{str(dtype).removeprefix('torch.')}{list(found.shape)}"

    lies = "" if found.gradient == found.stride else f"/{found.gradient}, {found.stride}"
    return [
        OpCall(
            "derivative_codes", f"derivative_codes/{key(info.dtype)}", 0.0, info.bytes, packed,
            run=code,
        ),
        OpCall(
            "times_derivative", f"times_derivative/{key(found.dtype)}{lies}", 0.0,
            packed + gradient, gradient, run=product,
        ),
    ]  # fmt: skip


def _strided(found: Derivative, stride: tuple[int, ...], device: Any) -> torch.Tensor:
    """Random numbers shaped like the gradient, which lie in memory as it does."""
    span = 1 + sum((n - 1) * s for n, s in zip(found.shape, stride, strict=True))
    flat = torch.randn(max(span, 0), device=device).to(found.dtype)
    return flat.as_strided(found.shape, stride)


def _info(match: Match) -> SavedInfo:
    assert isinstance(match.site.info, SavedInfo)
    return match.site.info


def _bytes(match: Match, bits: int) -> int:
    return code_bytes(math.prod(_info(match).shape), bits)
