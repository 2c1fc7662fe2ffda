"""Root-mean-square norms as one call: CUDA runs it as one kernel, spelled out they are eight.

Only what stays the same to the bit on a CPU is joined: half precision is rounded before the
weight, as the original does, so its multiplication remains a call of its own there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from .facts import tensor_facts
from .targets import is_quiet

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)
HALVES = (torch.bfloat16, torch.float16)


class _Norm(NamedTuple):
    """`result` is what norms `x` over its last dimension, of `size`."""

    result: fx.Node
    x: fx.Node
    weight: fx.Node | None
    size: int
    epsilon: float


def fuse_norms(graph: fx.Graph) -> None:
    """Write x * rsqrt(mean(x²) + epsilon), and its weight if that has x's dtype, as `rms_norm`."""
    for root in graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        norm = _match(root)
        # The call reads x in the place of its result.
        if norm is None or not is_quiet(min(norm.x.users), norm.result):
            continue
        arguments = (norm.x, [norm.size], norm.weight, norm.epsilon)
        put(graph, norm.result, aten.rms_norm.default, arguments)


def _match(root: fx.Node) -> _Norm | None:
    added: Any = root.args[0]
    if not _is(added, aten.add.Tensor) or not isinstance(added.args[1], float):
        return None
    mean: Any = added.args[0]
    squares: Any = mean.args[0] if _is(mean, aten.mean.dim) else None
    wide = _squared(squares)
    scaled = _only_user(root, aten.mul.Tensor)
    if wide is None or scaled is None or any(len(n.users) > 1 for n in (added, mean, squares)):
        return None
    known = tensor_facts(wide)
    if known is None or known.dtype not in (torch.float32, torch.float64):
        return None
    last, size = (-1, len(known.shape) - 1), known.shape[-1]
    if mean.args[1:] not in [([dim], True) for dim in last] or not isinstance(size, int):
        return None
    narrow = wide.args[0] if _is(wide, *_CASTS) else None
    if _other(scaled, root) not in (wide, narrow):
        return None
    return _with_ends(scaled, wide, narrow, size, added.args[1])


def _with_ends(
    scaled: fx.Node, wide: fx.Node, narrow: fx.Node | None, size: int, epsilon: float
) -> _Norm:
    """The norm with what stands around it: casts from and to half precision, or the weight."""
    before, after = tensor_facts(narrow), _only_user(scaled, *_CASTS)
    rounded = None if after is None else tensor_facts(after)
    if before is not None and before.dtype in HALVES:
        if after is not None and rounded is not None and rounded.dtype == before.dtype:
            assert narrow is not None
            return _Norm(after, narrow, None, size, epsilon)
        return _Norm(scaled, wide, None, size, epsilon)
    product, known = _only_user(scaled, aten.mul.Tensor), tensor_facts(wide)
    weight = None if product is None else _other(product, scaled)
    given = tensor_facts(weight)
    if product is None or known is None or given != (known.dtype, (size,)):
        return _Norm(scaled, wide, None, size, epsilon)
    return _Norm(product, wide, weight, size, epsilon)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _squared(node: Any) -> Any:
    """y of y ** 2, however that is written."""
    if _is(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if _is(node, aten.mul.Tensor) and node.args[0] is node.args[1]:
        return node.args[0]
    return node.args[0] if _is(node, aten.square.default) else None


def _only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if _is(user, *targets) else None


def _other(product: fx.Node, factor: fx.Node) -> Any:
    return product.args[1] if product.args[0] is factor else product.args[0]


def put(graph: fx.Graph, old: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    """Let one call stand for `old` and for what only `old` read."""
    with graph.inserting_before(old):
        new = graph.call_function(target, arguments)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    erase(graph, old)


def erase(graph: fx.Graph, node: fx.Node) -> None:
    """Drop a call that nothing reads any more, and what only it read."""
    if node.users or node.op != "call_function":
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        erase(graph, source)
