"""How the flat outputs of a graph make the object that the original forward returned."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils import _pytree as pytree

from ..ir.errors import CaptureError

Kind = Literal["leaf", "constant", "tuple", "list", "dict", "class"]


@dataclass(frozen=True)
class OutputSpec:
    """One level of the output; leaves take the graph's outputs from left to right.

    "class" is a `ModelOutput` dataclass or a named tuple, made from keywords; `type` is its
    path, `package.module.Class`. "constant" holds `value`: None, a bool or a number.
    """

    kind: Kind
    keys: tuple[str, ...] = ()
    children: tuple[OutputSpec, ...] = ()
    type: str = ""
    value: bool | int | float | str | None = None

    @property
    def leaves(self) -> int:
        """How many outputs of the graph this level takes."""
        return int(self.kind == "leaf") + sum(child.leaves for child in self.children)

    def leaf_names(self) -> list[str]:
        """The name of each output of the graph, outermost key first: "logits", "states.0"."""
        names: list[str] = []
        for i, child in enumerate(self.children):
            key = self.keys[i] if self.keys else str(i)
            names += [f"{key}.{name}" if name else key for name in child.leaf_names()]
        return [""] if self.kind == "leaf" else names

    def leaves_of(self, output: Any) -> list[Any]:
        """The inverse of `build`: what stands in `output` where the graph's outputs go."""
        if self.kind in ("leaf", "constant"):
            return [output] if self.kind == "leaf" else []
        parts = [output[key] for key in self.keys] if self._keyed(output) else list(output)
        pairs = zip(self.children, parts, strict=True)
        return [leaf for child, part in pairs for leaf in child.leaves_of(part)]

    def _keyed(self, output: Any) -> bool:
        return bool(self.keys) and not isinstance(output, tuple)

    def build(self, outputs: Sequence[Any]) -> Any:
        """The original output object around `outputs`, the tensors that the graph returned."""
        return self._build(iter(outputs))

    def _build(self, outputs: Iterator[Any]) -> Any:
        if self.kind == "leaf":
            return next(outputs)
        if self.kind == "constant":
            return self.value
        items = [child._build(outputs) for child in self.children]
        if self.kind in ("tuple", "list"):
            return items if self.kind == "list" else tuple(items)
        named = dict(zip(self.keys, items, strict=True))
        return named if self.kind == "dict" else _find(self.type)(**named)

    def to_json(self) -> dict[str, Any]:
        """Plain data: only what is not the default."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.keys:
            data["keys"] = list(self.keys)
        if self.children:
            data["children"] = [child.to_json() for child in self.children]
        if self.type:
            data["type"] = self.type
        if self.kind == "constant":
            data["value"] = self.value
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OutputSpec:
        """The inverse of `to_json`."""
        return cls(
            data["kind"],
            tuple(data.get("keys", ())),
            tuple(cls.from_json(child) for child in data.get("children", ())),
            data.get("type", ""),
            data.get("value"),
        )


def output_spec(spec: pytree.TreeSpec, values: Sequence[Any]) -> OutputSpec:
    """Translate torch's tree of the outputs; `values` are its leaves, constants among them."""
    return _translate(spec, iter(values))


def _translate(spec: pytree.TreeSpec, values: Iterator[Any]) -> OutputSpec:
    if spec.is_leaf():
        value = next(values)
        if value is None or isinstance(value, bool | int | float | str):
            return OutputSpec("constant", value=value)
        return OutputSpec("leaf")
    children = tuple(_translate(spec.child(i), values) for i in range(spec.num_children))
    if spec.type in (tuple, list):
        return OutputSpec("tuple" if spec.type is tuple else "list", children=children)
    if spec.type in (dict, OrderedDict):
        return OutputSpec("dict", tuple(spec.context), children)
    keys = getattr(spec.type, "_fields", spec.context)
    if hasattr(spec.context, "_fields"):
        return OutputSpec("class", spec.context._fields, children, _path(spec.context))
    if isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys):
        return OutputSpec("class", tuple(keys), children, _path(spec.type))
    raise CaptureError(
        f"The model returns {_path(spec.type)}, which fxopt cannot rebuild from its parts. "
        "Return a tensor, a tuple, a dict, or a transformers ModelOutput."
    )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
