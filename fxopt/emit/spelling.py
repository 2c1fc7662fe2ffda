"""How one op call of the graph is written in Python."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..ir.ops import ATTEND
from .facts import tensor_facts
from .targets import op_name

ATOM, POWER, NEGATION, PRODUCT, SUM, AND, COMPARISON = 9, 8, 7, 6, 5, 4, 2


@dataclass(frozen=True)
class Expr:
    """Text with the binding strength of its outermost operator."""

    text: str
    level: int = ATOM

    def at(self, level: int) -> str:
        return self.text if self.level >= level else f"({self.text})"


Reference = Callable[[fx.Node], Expr]

_INFIX = {
    "aten.add.Tensor": ("+", SUM),
    "aten.sub.Tensor": ("-", SUM),
    "aten.mul.Tensor": ("*", PRODUCT),
    "aten.div.Tensor": ("/", PRODUCT),
    "aten.matmul.default": ("@", PRODUCT),
    "aten.pow.Tensor_Scalar": ("**", POWER),
    "aten.pow.Tensor_Tensor": ("**", POWER),
    "aten.bitwise_and.Tensor": ("&", AND),
    "aten.eq.Tensor": ("==", COMPARISON),
    "aten.eq.Scalar": ("==", COMPARISON),
    "aten.ne.Tensor": ("!=", COMPARISON),
    "aten.ne.Scalar": ("!=", COMPARISON),
    "aten.lt.Tensor": ("<", COMPARISON),
    "aten.lt.Scalar": ("<", COMPARISON),
    "aten.le.Tensor": ("<=", COMPARISON),
    "aten.le.Scalar": ("<=", COMPARISON),
    "aten.gt.Tensor": (">", COMPARISON),
    "aten.gt.Scalar": (">", COMPARISON),
    "aten.ge.Tensor": (">=", COMPARISON),
    "aten.ge.Scalar": (">=", COMPARISON),
    operator.add: ("+", SUM),
    operator.sub: ("-", SUM),
    operator.mul: ("*", PRODUCT),
    operator.truediv: ("/", PRODUCT),
    operator.floordiv: ("//", PRODUCT),
    operator.mod: ("%", PRODUCT),
    operator.pow: ("**", POWER),
}
_SPREAD = {"view.default", "reshape.default", "expand.default", "permute.default", "repeat.default"}
_METHODS = {
    *_SPREAD,
    "transpose.int", "unsqueeze.default", "squeeze.dim", "contiguous.default", "flatten.using_ints",
    "to.dtype", "type_as.default", "mean.dim", "sum.dim_IntList", "cos.default", "sin.default",
    "tanh.default", "exp.default", "log.default", "rsqrt.default", "sqrt.default", "abs.default",
    "sigmoid.default", "softmax.int", "chunk.default", "split.Tensor", "gather.default",
    "masked_fill.Scalar", "cumsum.default", "argmax.default", "clamp.default", "clone.default",
    "unbind.int", "mean.default", "sum.default", "t.default",
    "copy_.default", "add_.Tensor", "square.default",
}  # fmt: skip
_FUNCTIONAL = {
    "linear.default", "silu.default", "relu.default", "gelu.default", "conv1d.default",
    "conv2d.default", "max_pool2d.default", "adaptive_avg_pool2d.default",
    "scaled_dot_product_attention.default", "dropout.default", "rms_norm.default",
}  # fmt: skip
_TORCH = {
    "cat.default", "stack.default", "where.self", "addmm.default", "bmm.default", "arange.default",
    "arange.start", "zeros.default", "ones.default", "full.default", "outer.default",
    "zeros_like.default", "ones_like.default", "maximum.default", "minimum.default",
}  # fmt: skip
_DEFAULTS = {"pin_memory": (False, None), "layout": (None, torch.strided)}
_MAX = 2**63 - 1
_SIMPLE = re.compile(r"-?[\w.]+$")


def spell(node: fx.Node, ref: Reference) -> Expr:
    """The expression that computes `node`; `ref` gives the expressions of its operands."""
    name, args = _key(node), node.args
    if name in _INFIX and not _extra(node):
        sign, level = _INFIX[name]
        left, right = literal(args[0], ref), literal(args[1], ref)
        tight = level + 1 if level in (POWER, COMPARISON) else level
        words = left.at(tight), right.at(level + 1 if level < POWER else NEGATION)
        simple = level == POWER and all(_SIMPLE.match(word) for word in words)
        return Expr((sign if simple else f" {sign} ").join(words), level)
    special = _SPECIAL.get(name)
    written = special(node, ref) if special else None
    if written is not None:
        return written
    short = name.removeprefix("aten.") if isinstance(name, str) else ""
    if short in _METHODS:
        spread = args[1] if short in _SPREAD and isinstance(args[1], (list, tuple)) else None
        rest = (*spread, *args[2:]) if spread is not None else args[1:]
        return Expr(f"{literal(args[0], ref).at(ATOM)}.{op_name(node)}({_call(rest, node, ref)})")
    if short in _FUNCTIONAL:
        return Expr(f"F.{op_name(node)}({_call(args, node, ref)})")
    if short in _TORCH:
        return Expr(f"torch.{op_name(node)}({_call(args, node, ref)})")
    return Expr(f"{_callee(node)}({_call(args, node, ref)})")


def literal(value: Any, ref: Reference) -> Expr:
    """A constant or operand as Python text."""
    if isinstance(value, fx.Node):
        return ref(value)
    if isinstance(value, (list, tuple)):
        items = ", ".join(literal(item, ref).text for item in value)
        if isinstance(value, list):
            return Expr(f"[{items}]")
        return Expr(f"({items},)" if len(value) == 1 else f"({items})")
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return Expr(f"slice({', '.join(literal(part, ref).text for part in parts)})")
    if isinstance(value, str):
        # JSON's escapes are Python's: whatever a saved graph holds stays one string.
        return Expr(json.dumps(value))
    if isinstance(value, bool) or value is None:
        return Expr(repr(value))
    if isinstance(value, (int, float)):
        text = repr(value) if math.isfinite(value) else f'float("{value}")'
        return Expr(text, NEGATION if text.startswith("-") else ATOM)
    if isinstance(value, torch.device):
        return Expr(f'torch.device("{value}")')
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return Expr(str(value))
    raise TypeError(f"an argument of type {type(value).__name__} has no spelling: {value!r}")


def _key(node: fx.Node) -> Any:
    target = node.target
    return str(target) if isinstance(target, OpOverload) else target


def _extra(node: fx.Node) -> bool:
    return bool(node.kwargs) or len(node.args) != 2


def _call(args: Any, node: fx.Node, ref: Reference) -> str:
    words = [literal(arg, ref).text for arg in args]
    for key, value in node.kwargs.items():
        if key in _DEFAULTS and value in _DEFAULTS[key]:
            continue
        words.append(f"{key}={literal(value, ref).text}")
    return ", ".join(words)


def _callee(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    return getattr(target, "__name__", str(target))


def _getitem(node: fx.Node, ref: Reference) -> Expr:
    return Expr(f"{literal(node.args[0], ref).at(ATOM)}[{literal(node.args[1], ref).text}]")


def _size(node: fx.Node, ref: Reference) -> Expr:
    return Expr(f"{literal(node.args[0], ref).at(ATOM)}.shape[{literal(node.args[1], ref).text}]")


def _attribute(node: fx.Node, ref: Reference) -> Expr | None:
    name = node.args[1]
    if not (isinstance(name, str) and name.isidentifier()):
        return None
    return Expr(f"{literal(node.args[0], ref).at(ATOM)}.{name}")


def _negative(node: fx.Node, ref: Reference) -> Expr:
    return Expr(f"-{literal(node.args[0], ref).at(NEGATION)}", NEGATION)


def _invert(node: fx.Node, ref: Reference) -> Expr:
    return Expr(f"~{literal(node.args[0], ref).at(NEGATION)}", NEGATION)


def _embedding(node: fx.Node, ref: Reference) -> Expr | None:
    weight, index, *rest = node.args
    if len(rest) > 1 or node.kwargs:
        return None
    words = [literal(index, ref).text, literal(weight, ref).text]
    if rest and rest[0] != -1:
        words.append(f"padding_idx={literal(rest[0], ref).text}")
    return Expr(f"F.embedding({', '.join(words)})")


def _layer_norm(node: fx.Node, ref: Reference) -> Expr:
    words = [literal(arg, ref).text for arg in node.args[:5]]
    return Expr(f"F.layer_norm({', '.join(words)})")


def _slice(node: fx.Node, ref: Reference) -> Expr | None:
    rank = _rank(node.args[0])
    dim, start, stop, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    if rank is None or not isinstance(dim, int) or node.kwargs:
        return None
    low = "" if start in (None, 0) else literal(start, ref).text
    high = "" if stop is None or (isinstance(stop, int) and stop >= _MAX) else literal(
        stop, ref).text  # fmt: skip
    part = f"{low}:{high}" + ("" if step == 1 else f":{literal(step, ref).text}")
    return Expr(f"{literal(node.args[0], ref).at(ATOM)}[{_position(part, dim, rank)}]")


def _select(node: fx.Node, ref: Reference) -> Expr | None:
    rank, dim = _rank(node.args[0]), node.args[1]
    if rank is None or not isinstance(dim, int):
        return None
    part = literal(node.args[2], ref).text
    return Expr(f"{literal(node.args[0], ref).at(ATOM)}[{_position(part, dim, rank)}]")


def _index(node: fx.Node, ref: Reference) -> Expr | None:
    indices: Any = node.args[1]
    if any(index is not None and not _rank(index) for index in indices):
        return None
    words = [":" if index is None else literal(index, ref).text for index in indices]
    return Expr(f"{literal(node.args[0], ref).at(ATOM)}[{', '.join(words)}]")


def _attend(node: fx.Node, ref: Reference) -> Expr:
    names = ("q", "k", "v", "mask", "bias", "sinks", "state", "start")
    positional = dict(zip(names, node.args, strict=False))
    words = [literal(positional.pop(name), ref).text for name in names[:3] if name in positional]
    given = {**positional, **node.kwargs}
    for name, value in given.items():
        frozen: Any = tuple(value) if isinstance(value, (list, tuple)) else value
        if frozen is None or frozen == ATTEND.parameters[name].default:
            continue
        words.append(f"{name}={literal(frozen, ref).text}")
    return Expr(f"attend({', '.join(words)})")


def _position(part: str, dim: int, rank: int) -> str:
    if dim in (-1, rank - 1) and rank > 2:
        return f"..., {part}"
    if dim < 0:
        dim += rank
    return ", ".join([":"] * dim + [part])


def _rank(value: Any) -> int | None:
    known = tensor_facts(value)
    return None if known is None else len(known.shape)


def _specials() -> dict[Any, Callable[[fx.Node, Reference], Expr | None]]:
    from ..ir.ops import attend

    return {
        attend: _attend,
        getattr: _attribute,
        operator.getitem: _getitem,
        operator.neg: _negative,
        "aten.sym_size.int": _size,
        "aten.neg.default": _negative,
        "aten.bitwise_not.default": _invert,
        "aten.embedding.default": _embedding,
        "aten.layer_norm.default": _layer_norm,
        "aten.slice.Tensor": _slice,
        "aten.select.int": _select,
        "aten.index.Tensor": _index,
    }


_SPECIAL = _specials()
