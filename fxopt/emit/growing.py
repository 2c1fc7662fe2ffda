"""A module's cache in the form that an export takes and returns: tensors that grow."""

from __future__ import annotations

from torch import Tensor

from ..kernels.kv_attention.layout import Blocks, functional_names, parse, split_state
from ..kernels.kv_attention.mutating import recent
from ..kernels.kv_attention.pages import stored
from .cache import Cache
from .program import Program


def grown_states(program: Program, cache: Cache) -> list[Tensor]:
    """Copies of the tensors of all layers as far as they are used, in the order of an export's
    slots. Nothing may have been cropped from the cache."""
    found: list[Tensor] = []
    for state, tensors in zip(program.states, cache.states, strict=True):
        layout = parse(state.layout)
        classes = split_state(layout, state.num_kv_heads, tensors)
        names = functional_names(layout, state.num_kv_heads)
        for (_, fmt, part), every in zip(classes, names, strict=True):
            found += [_grown(part, fmt, name, cache.length.value).clone() for name in every]
    return found


def _grown(part: dict[str, Tensor], fmt: Blocks | None, name: str, length: int) -> Tensor:
    if fmt is None:
        return part[name][:, :, :length]
    packed = fmt.packed(length)
    kind, _, side = name.rpartition("_")
    if kind == "sink":
        return part[name][:, :, : min(length, fmt.sink)]
    if kind == "recent":
        return recent(part, side, packed, length - fmt.sink)
    return stored(part, (name,), packed // fmt.group)[name]
