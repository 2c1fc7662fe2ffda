"""Whether the cache that onnxruntime returns is the module's.

Two runtimes compute keys and values that differ by float noise, and where that noise decides a
rounding, packed codes differ by a step. So what is exact is compared as outputs are, and what is
packed has to be one of those images that keys and values within a tolerance of the module's are
packed to: tokens that both were given lie at no distance, so their blocks are equal to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.errors import ExportError
from ..kernels.kv_attention.heads import block_mask, take
from ..kernels.kv_attention.layout import Blocks, parse, split_state
from ..kernels.kv_attention.packing import (
    FLOAT8,
    LARGEST,
    Bits,
    code_range,
    has_zero,
    round_down,
    round_up,
    unpack_codes,
)
from .difference import difference
from .program import State

SIDES = ("key", "value")
Part = Mapping[str, Tensor]


@dataclass
class Rounded:
    """How many values were rounded to integers or e4m3, and how many of them differently."""

    total: int = 0
    flipped: int = 0

    @property
    def share(self) -> float:
        return self.flipped / max(1, self.total)

    def count(self, wanted: Tensor, found: Tensor) -> None:
        self.total += found.numel()
        self.flipped += int((wanted != found).sum())


def compare_cache(
    name: str,
    state: State,
    tensors: Sequence[Sequence[Tensor]],
    new: tuple[Tensor, Tensor],
    mask: Tensor,
    tolerance: float,
    rounded: Rounded,
) -> float:
    """The difference of what is stored exactly; ExportError unless the packed images agree.

    `tensors` are past (given to both), the module's present and onnxruntime's present of one
    layer; `new` the module's keys and values of this call, `mask` [B, past + new].
    """
    layout = parse(state.layout)
    parts = (split_state(layout, state.num_kv_heads, t, growing=True) for t in tensors)
    worst = 0.0
    for (heads, fmt, past), (_, _, wanted), (_, _, found) in zip(*parts, strict=True):
        own = {side: take(x, heads, 1) for side, x in zip(SIDES, new, strict=True)}
        exact = _exact_names(past, fmt)
        worst = max(worst, *(difference(wanted[key], found[key]) for key in exact))
        for side in SIDES:
            if fmt is not None and side not in exact:
                block = _Block.of(fmt, side, past, own[side], mask, tolerance)
                block.compare(f"{name}.{side}", past, wanted, found, rounded)
    return worst


def _exact_names(part: Part, fmt: Blocks | None) -> set[str]:
    """Which tensors of a head class hold keys or values as they are."""
    if fmt is None:
        return set(part)
    return {
        name for name in part
        if name.startswith(("sink_", "recent_")) or (name in SIDES and fmt.bits(name) == 16)
    }  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """The blocks of one side that a call packs: bounds [B, h, blocks, group, D] of what they
    hold, equal for tokens of the past, and which tokens count."""

    side: str
    bits: Bits
    low: Tensor
    high: Tensor
    valid: Tensor | None

    @classmethod
    def of(
        cls, fmt: Blocks, side: str, past: Part, new: Tensor, mask: Tensor, tolerance: float
    ) -> _Block:
        old = past[side].shape[2]
        given = [past[name] for name in (f"sink_{side}", f"recent_{side}") if name in past]
        exact = torch.cat([*given, new], 2)
        slack = torch.zeros_like(exact)
        slack.narrow(2, exact.shape[2] - new.shape[2], new.shape[2]).fill_(
            tolerance * max(1.0, float(new.abs().max()) if new.numel() else 1.0)
        )
        length = mask.shape[1]
        fresh = fmt.packed(length) // fmt.group - old
        first = min(length, fmt.sink)
        shape = (*exact.shape[:2], fresh, fmt.group, exact.shape[3])
        low, high = (
            x.narrow(2, first, fresh * fmt.group).reshape(shape)
            for x in (exact - slack, exact + slack)
        )
        valid = block_mask(mask, first + old * fmt.group, fresh, fmt.group)
        return cls(side, fmt.bits(side), low, high, valid)

    def compare(self, name: str, past: Part, wanted: Part, found: Part, rounded: Rounded) -> None:
        """Count the codes that differ; ExportError where what was packed before changed, or
        what is packed now is no image of anything within the bounds."""
        old, zeroed = past[self.side].shape[2], has_zero(self.side, self.bits)
        names = (self.side, f"{self.side}_scale", *([f"{self.side}_zero"] if zeroed else []))
        for key in names:
            same = found[key].shape == wanted[key].shape
            if not same or bool((found[key][:, :, :old] != past[key]).any()):
                raise ExportError(f"{name}: onnxruntime changed blocks that were packed before")
        stored, *affine = (found[key][:, :, old:] for key in names)
        codes = unpack_codes(stored, self.side, self.bits)
        if not self.allows(codes.float(), *(x.float() for x in affine)):
            raise ExportError(
                f"{name}: onnxruntime packs other numbers than any {self.side}s within the "
                "tolerance of the module's give"
            )
        known = unpack_codes(wanted[self.side][:, :, old:], self.side, self.bits)
        rounded.count(known, codes)

    def allows(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> bool:
        """Each step of packing is monotonic, so bounds of what goes in bound what comes out."""
        zero = torch.zeros_like(scale) if zero is None else zero
        step = torch.where(scale > 0, scale, 1.0)
        bounds = [self._code((x - zero) / step) for x in (self.low, self.high)]
        if self.valid is not None:
            bounds = [torch.where(self.valid, bound, 0.0) for bound in bounds]
        zeros, scales = self._affine(zero)
        return all(
            bool(((low <= x) & (x <= high)).all())
            for x, (low, high) in ((zero, zeros), (scale, scales), (codes, bounds))
        )

    def _affine(self, zero: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Bounds of the zeros, and of the scales where `zero` is what was found."""
        least, most = ([self._extreme(x, sign) for x in (self.low, self.high)] for sign in (-1, 1))
        if self.bits != FLOAT8:
            levels = 2**self.bits - 1
            scales = [round_up(x / levels - zero / levels) for x in most]
            return [round_down(x) for x in least], scales
        away = [torch.maximum(most[i] - zero, zero - least[1 - i]) for i in range(2)]
        middle = [round_down(a / 2 + b / 2) for a, b in zip(least, most, strict=True)]
        zeros = middle if has_zero(self.side, self.bits) else [zero, zero]
        return zeros, [round_up(x / LARGEST) for x in away]

    def _code(self, x: Tensor) -> Tensor:
        x = x.clamp(*code_range(self.bits))
        return x.to(torch.float8_e4m3fn).float() if self.bits == FLOAT8 else x.round()

    def _extreme(self, x: Tensor, sign: int) -> Tensor:
        """The largest (or with -1 the smallest) token that counts; 0 where none does."""
        dim = 3 if self.side == "key" else 4
        if self.valid is None:
            return sign * (sign * x).amax(dim, keepdim=True)
        found = torch.where(self.valid, sign * x, -torch.inf).amax(dim, keepdim=True)
        return torch.where(found == -torch.inf, 0.0, sign * found)
