"""Token-wise programs as text: calls, each naming its result, separated by semicolons.

    a = aten.linear(x, t0); b = aten.silu(a); c = aten.linear(x, t1);
    d = aten.mul.Tensor(b, c); e = aten.linear(d, t2)

`x` is the input, `t0`, `t1`, ... are the tensors handed in beside it; the last call makes the
result. Ops without an overload mean "default". Arguments are names, numbers, strings, lists,
None and dtypes ("torch.bfloat16").
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

NAMESPACES = ("aten", "fxopt")


@dataclass(frozen=True)
class Step:
    """`result = target(*args, **kwargs)`; arguments are still syntax."""

    result: str
    target: str
    args: tuple[ast.expr, ...]
    kwargs: Mapping[str, ast.expr]


@functools.lru_cache(maxsize=256)
def parse(text: str) -> tuple[Step, ...]:
    """The steps of a program; ValueError for anything but named calls."""
    try:
        return tuple(_step(statement) for statement in ast.parse(text).body)
    except SyntaxError as error:
        raise ValueError(f"chunked: the program does not parse: {error}") from error


def run(text: str, x: Tensor, tensors: Sequence[Tensor], *, inline: bool = False) -> Tensor:
    """Run a program; `inline` calls the references of fxopt ops, for exporters."""
    values: dict[str, Any] = {"x": x, **{f"t{i}": tensor for i, tensor in enumerate(tensors)}}
    result: Any = x
    for step in parse(text):
        args = [_value(argument, values) for argument in step.args]
        kwargs = {name: _value(argument, values) for name, argument in step.kwargs.items()}
        result = values[step.result] = resolve(step.target, inline)(*args, **kwargs)
    return result


def resolve(target: str, inline: bool = False) -> Callable[..., Any]:
    """The op named "namespace.op[.overload]", or `getitem`; ValueError for any other name."""
    if target == "getitem":
        return operator.getitem
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    op = None
    if namespace in NAMESPACES:
        packet = getattr(getattr(torch.ops, namespace), name, None)
        op = getattr(packet, overload or "default", None)
    # The text may come from a file: nothing but a registered op is ever called.
    if not isinstance(op, OpOverload):
        raise ValueError(f"chunked: {target!r} is no op of {' or '.join(NAMESPACES)}")
    if namespace == "fxopt" and inline:
        return import_module(f"fxopt.kernels.{name}").REFERENCE
    return op


def _step(statement: ast.stmt) -> Step:
    if (
        not isinstance(statement, ast.Assign)
        or len(statement.targets) > 1
        or not isinstance(statement.targets[0], ast.Name)
        or not isinstance(statement.value, ast.Call)
    ):
        raise ValueError(f"chunked: not a call with a name: {ast.unparse(statement)!r}")
    call = statement.value
    kwargs = {str(keyword.arg): keyword.value for keyword in call.keywords}
    return Step(statement.targets[0].id, ast.unparse(call.func), tuple(call.args), kwargs)


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element, values) for element in node.elts]
    if isinstance(node, ast.Attribute):
        dtype = getattr(torch, node.attr, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"chunked: {ast.unparse(node)!r} is no dtype")
        return dtype
    return ast.literal_eval(node)
