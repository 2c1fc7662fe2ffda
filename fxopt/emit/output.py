"""Rebuilding the object that the original forward returned, without trusting a saved folder."""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Builder = Callable[[Sequence[Any]], Any]


class Output(OrderedDict[str, Any]):
    """A result whose class is not installed here: items by name, as attributes, by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(value for value in self.values() if value is not None)


def builder(spec: Mapping[str, Any]) -> Builder:
    """A function from the flat outputs of a graph to the output that `spec` describes.

    `spec` is the plain data of `OutputSpec.to_json`. Of classes only transformers' `ModelOutput`
    dataclasses are imported; others are used when their module is loaded already.
    """
    return _builder(spec, 0)[0]


def _builder(spec: Mapping[str, Any], start: int) -> tuple[Builder, int]:
    kind = spec["kind"]
    if kind == "leaf":
        return (lambda values: values[start]), start + 1
    if kind == "constant":
        return (lambda values: spec.get("value")), start
    parts: list[Builder] = []
    for child in spec.get("children", ()):
        part, start = _builder(child, start)
        parts.append(part)
    if kind == "list":
        return (lambda values: [part(values) for part in parts]), start
    if kind == "tuple":
        return (lambda values: tuple([part(values) for part in parts])), start
    named = list(zip(spec["keys"], parts, strict=True))
    cls = dict if kind == "dict" else output_class(spec["type"])
    return (lambda values: cls(**{name: part(values) for name, part in named})), start


def output_class(path: str) -> Callable[..., Any]:
    """The class at `path` if it may be used, else `Output`."""
    module, _, name = path.rpartition(".")
    if path.startswith("transformers."):
        try:
            from transformers.utils.generic import ModelOutput

            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            return Output
        return found if isinstance(found, type) and issubclass(found, ModelOutput) else Output
    found: Any = getattr(sys.modules.get(module), name, None)
    is_plain = hasattr(found, "__dataclass_fields__") or hasattr(found, "_fields")
    return found if isinstance(found, type) and is_plain else Output
