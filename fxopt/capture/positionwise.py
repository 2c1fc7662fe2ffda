"""Whether tokens meet nowhere but in attention, found by running the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir.ops import attend

LENGTH, CHANGED, CUT = 10, 4, 5
# Both pieces are of one size, so that they are rounded alike.

EXACT, ROUNDINGS = 1e-3, 32
"""Results of equal sizes agree to `EXACT`; of others to so many times the dtype's precision."""


class WithoutAttention(fx.Interpreter):
    """Runs a graph with attention replaced by a function of each token alone."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not attend:
            return super().call_function(target, args, kwargs)
        q, k, v = args[:3]
        group = q.shape[1] // k.shape[1]
        mixed = v + k.mean(-1, keepdim=True) + k[..., :1]
        mixed = 0.5 * mixed.repeat_interleave(group, 1) + q.mean(-1, keepdim=True) + q[..., :1]
        return mixed.transpose(1, 2).contiguous()


def why_not_positionwise(graph: fx.GraphModule, vocabulary: int) -> str | None:
    """None if each token's result depends, attention apart, on that token and its position.

    Tried twice: changing one token changes the result of no other, and two pieces of a sequence,
    with their positions, give what the whole gives.
    """
    device = _device(graph)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (2, LENGTH), generator=generator).to(device)
    positions = torch.arange(LENGTH, device=device).repeat(2, 1)
    whole = _run(graph, ids, positions)
    other = ids.clone()
    other[0, CHANGED] = (other[0, CHANGED] + 1) % vocabulary
    changed = _apart(whole, _run(graph, other, positions)) > EXACT
    changed[0, CHANGED] = False
    if changed.any():
        row, position = (int(i) for i in changed.nonzero()[0])
        return (
            "tokens meet outside attention: changing the token at position "
            f"{CHANGED} of sequence 0 changes the result at position {position} of sequence {row}"
        )
    pieces = [_run(graph, ids[:, s], positions[:, s]) for s in (slice(CUT), slice(CUT, None))]
    first, second = _apart(whole, torch.cat(pieces, 1)).amax(0).split(CUT)
    # What begins where the whole begins differs by rounding alone: other sizes, other sums.
    rounding = first.max().item()
    if rounding > max(EXACT, ROUNDINGS * _eps(graph)) or second.max() > max(EXACT, 4 * rounding):
        return (
            "the result of a token depends on where its piece of the sequence begins, so the "
            "model does not take all positions from position_ids"
        )
    return None


def _device(graph: fx.GraphModule) -> torch.device:
    return next((p.device for p in graph.parameters()), torch.device("cpu"))


def _run(graph: fx.GraphModule, ids: Tensor, positions: Tensor) -> Tensor:
    given = {
        "input_ids": ids,
        "position_ids": positions,
        "logits_to_keep": torch.arange(ids.shape[1], device=ids.device),
    }
    names = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
    values = [given.get(name) for name in names]
    outputs = WithoutAttention(graph).run(*values, enable_io_processing=False)
    return outputs[0].double()


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """[batch, length]: by how much results differ, as a share of the largest."""
    return (a - b).abs().amax(-1) / a.abs().amax().clamp(min=1e-30)


def _eps(graph: fx.GraphModule) -> float:
    dtypes = {p.dtype for p in graph.parameters() if p.dtype.is_floating_point}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
