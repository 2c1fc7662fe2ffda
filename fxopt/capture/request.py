"""What a model is traced with: example inputs, which sizes vary, and what they mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..ir.errors import CaptureError
from ..ir.names import hint


@dataclass
class Request:
    """One call of a model to trace.

    `args` fills a variadic parameter, `kwargs` all others. `roles` says what an axis means:
    {"input_ids": ("batch", "length")}. `interface`: attention is traced as one op through
    transformers' interface. `decoder`: the call is made up to serve prefill and decoding, and
    `reason` says why not where that was asked for.
    """

    kwargs: dict[str, Any]
    args: tuple[Any, ...] = ()
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    interface: bool = False
    decoder: bool = False
    reason: str | None = None

    def dynamic_shapes(self, signature: inspect.Signature) -> dict[str, Any]:
        """The specification for export: all sizes vary, unless the forward fixes them."""
        kind: Any = Dim.DYNAMIC if self.decoder else Dim.AUTO
        shapes: dict[str, Any] = {}
        if self.args:
            shapes[variadic(signature)] = tuple(_dynamic(value, kind) for value in self.args)
        return shapes | {name: _dynamic(value, kind) for name, value in self.kwargs.items()}

    def split_further(self, signature: inspect.Signature) -> dict[str, Any]:
        """Take out what goes to the forward's `**kwargs`: export cannot describe it."""
        further = {n: v for n, v in self.kwargs.items() if n not in signature.parameters}
        for name, value in further.items():
            if isinstance(value, Tensor):
                raise CaptureError(
                    f"forward() has no argument {name!r}.{hint(name, signature.parameters)} A "
                    "tensor that goes to its **kwargs cannot be captured: give it a parameter."
                )
            del self.kwargs[name]
        return further


def variadic(signature: inspect.Signature) -> str:
    """The name of the `*args` parameter, empty where there is none."""
    kinds = {p.kind: name for name, p in signature.parameters.items()}
    return kinds.get(inspect.Parameter.VAR_POSITIONAL, "")


def input_names(spec: pytree.TreeSpec, signature: inspect.Signature) -> list[str]:
    """The argument behind each placeholder: `rest_0`, `rest_1` for a variadic `rest`."""
    args, kwargs = spec.child(0), spec.child(1)
    names = [f"{variadic(signature)}_{i}" for i in range(args.num_leaves)]
    for i, name in enumerate(kwargs.context):
        names += _leaf_names(name, kwargs.child(i))
    return names


def _leaf_names(name: str, spec: pytree.TreeSpec) -> list[str]:
    if spec.is_leaf():
        return [name]
    keys = spec.context if spec.type is dict else range(spec.num_children)
    parts = [_leaf_names(f"{name}_{key}", spec.child(i)) for i, key in enumerate(keys)]
    return [leaf for part in parts for leaf in part]


def flattened(name: str, value: Any) -> dict[str, Any]:
    """The tensors and constants in an argument by the name of their placeholder."""
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [flattened(f"{name}_{key}" if name else str(key), item) for key, item in items]
    return {leaf: item for part in parts for leaf, item in part.items()}


def _dynamic(value: Any, kind: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dynamic(item, kind) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_dynamic(item, kind) for item in value)
    return {i: kind for i in range(value.dim())} if isinstance(value, Tensor) else None


def bind(signature: inspect.Signature, example: Any, owner: str) -> Request:
    """The example inputs as a request: by name where the parameter has one."""
    args, kwargs = _split(example)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {owner}.forward{signature}: {error}. "
            "Give a tensor, a tuple in the order of the arguments, or a dict by name."
        ) from None
    request = Request({})
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            request.args = value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            request.kwargs |= value
        else:
            request.kwargs[name] = value
    if request.args and any(
        p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name in request.kwargs
        for name, p in signature.parameters.items()
    ):
        raise CaptureError(
            f"{owner}.forward mixes named and variadic arguments, which a graph cannot keep "
            "apart. Give the variadic ones names."
        )
    return request


def _split(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), {str(name): value for name, value in example.items()}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}


def enlarge(request: Request) -> None:
    """Export fixes a size of one, so batches of one become two, by repetition.

    Only when each input that has a batch has that size: others may be meant to broadcast. A
    sequence of one token becomes two tokens.
    """
    given = (request.args, request.kwargs)
    tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and t.dim()]
    single = {t.shape[0] for t in tensors} <= {0, 1}

    def grown(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        value = _twice(value, 0) if single else value
        tokens = value.dim() == 2 and not value.is_floating_point()
        return _twice(value, 1) if tokens and value.shape[1] < 2 else value

    request.args, request.kwargs = pytree.tree_map(grown, given)


def _twice(value: Tensor, dim: int) -> Tensor:
    if value.shape[dim] == 0:
        return value.new_zeros([2 if i == dim else s for i, s in enumerate(value.shape)])
    return torch.cat([value, value], dim)


def check_devices(model: nn.Module, request: Request) -> None:
    """Refuse inputs that lie on another device than the parameters."""
    devices = {p.device for p in model.parameters()}
    given = flattened("", request.kwargs) | flattened("argument", request.args)
    for name, value in given.items():
        if isinstance(value, Tensor) and devices and value.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            raise CaptureError(
                f"example input {name!r} is on {value.device}, the parameters of "
                f"{type(model).__name__} are on {where}. Move one to the other with .to()."
            )
