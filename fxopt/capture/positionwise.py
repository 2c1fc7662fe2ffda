"""Whether tokens meet nowhere but in attention, found by running the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.ops import attend
from .evaluate import runs_on

LINEAR, EMBEDDING = torch.ops.aten.linear.default, torch.ops.aten.embedding.default
HISTOGRAM = torch.ops.aten.histc.default

LENGTH, CHANGED, CUT = 10, 4, 5
# Both pieces are of one size, so that they are rounded alike.

EXACT, ROUNDINGS = 1e-3, 32
"""Results of equal sizes agree to `EXACT`; of others to so many times the dtype's precision."""
FLIPS = 4
"""So many times the dtype's precision, or another piece's difference, is what rounding explains."""


class Tokenwise(fx.Interpreter):
    """Runs a graph with functions of each token alone in the places of attention and of what is
    position-wise whatever its weights are.

    Attention mixes the channels of a token. Linears and embeddings become cheap functions of the
    same sizes: what is left rounds alike however many tokens there are, where a library's product
    of matrices in half precision does not. So a graph on the meta device is run as well.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._given: set[fx.Node] = set()
        """What depends on the inputs."""
        for node in graph.graph.nodes:
            if node.op == "placeholder" or not self._given.isdisjoint(node.all_input_nodes):
                self._given.add(node)

    def run_node(self, n: fx.Node) -> Any:
        # A weight that is made of tokens is where they meet.
        places: dict[Any, int] = {LINEAR: 1, EMBEDDING: 0}
        place = places.get(n.target)
        if place is not None and n.args[place] in self._given:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return super().call_function(n.target, *self._runnable(args, kwargs))
        return super().run_node(n)

    def _runnable(self, args: Any, kwargs: Any) -> Any:
        given = pytree.tree_map_only(Tensor, _with_values, (args, kwargs))
        return pytree.tree_map_only(torch.device, runs_on, given)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is attend:
            return _attended(*args[:3])
        if target is LINEAR:
            return _mixed(args[0], args[1].shape[0])
        if target is EMBEDDING:
            return _spread(args[1], args[0])
        args, kwargs = self._runnable(args, kwargs)
        if target is HISTOGRAM and not args[0].is_floating_point():
            # what counts the tokens of experts was traced for devices that count integers
            return target(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return super().call_function(target, args, kwargs)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, Dv] of each token's own query, key and value."""
    group = q.shape[1] // k.shape[1]
    mixed = v + k.mean(-1, keepdim=True) + k[..., :1]
    mixed = 0.5 * mixed.repeat_interleave(group, 1) + q.mean(-1, keepdim=True) + q[..., :1]
    return mixed.transpose(1, 2).contiguous()


def _mixed(x: Tensor, out_features: int) -> Tensor:
    """[..., in] -> [..., out], each of the features and their mean in another share."""
    features = torch.arange(out_features, device=x.device)
    shares = torch.cos(features.float()).to(x.dtype)
    return shares * x[..., features % x.shape[-1]] + x.mean(-1, keepdim=True)


def _spread(ids: Tensor, table: Tensor) -> Tensor:
    """[...] -> [..., dim], another row for each id."""
    features = torch.arange(table.shape[1], device=ids.device)
    return torch.cos(0.7 * ids[..., None] + features).to(table.dtype)


def _with_values(tensor: Tensor) -> Tensor:
    """A parameter or buffer without values with some: a large one with equal rows."""
    if tensor.device.type != "meta":
        return tensor
    if not tensor.dtype.is_floating_point:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    row = 1 + 0.1 * torch.cos(torch.arange(tensor.shape[-1] if tensor.dim() else 1).float())
    return row.to(tensor.dtype).expand(tensor.shape) if tensor.dim() else row[0].to(tensor.dtype)


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
    rounding, eps = first.max().item(), _eps(graph)
    explained = FLIPS * max(rounding, eps)
    if rounding > max(EXACT, ROUNDINGS * eps) or second.max() > max(EXACT, explained):
        return (
            "the result of a token depends on where its piece of the sequence begins, so the "
            "model does not take all positions from position_ids"
        )
    return None


def _device(graph: fx.GraphModule) -> torch.device:
    return runs_on(next((p.device for p in graph.parameters()), torch.device("cpu")))


def _run(graph: fx.GraphModule, ids: Tensor, positions: Tensor) -> Tensor:
    given = {
        "input_ids": ids,
        "position_ids": positions,
        "logits_to_keep": torch.arange(ids.shape[1], device=ids.device),
    }
    names = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
    values = [given.get(name) for name in names]
    outputs = Tokenwise(graph).run(*values, enable_io_processing=False)
    return outputs[0].double()


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """[batch, length]: by how much results differ, as a share of the largest."""
    return (a - b).abs().amax(-1) / a.abs().amax().clamp(min=1e-30)


def _eps(graph: fx.GraphModule) -> float:
    dtypes = {p.dtype for p in graph.parameters() if p.dtype.is_floating_point}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
