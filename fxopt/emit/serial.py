"""A program as JSON text and back. Reading runs nothing: names are looked up in allow-lists."""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..ir.errors import FxoptError
from .facts import Facts, facts
from .program import Argument, Program
from .registry import register_ops
from .targets import find_target, target_name
from .tree import CONTAINERS, Entry, Tree

VERSION = 1
_META = ("fqn", "op", "fxopt", "site", "cache", "positions")
ATTRIBUTES = ("device", "dtype", "shape")
_NAMED = ("dtype", "layout", "memory_format")


def to_text(program: Program, *, indent: int | None = None) -> str:
    """The program as JSON."""
    data = {
        "version": VERSION,
        "name": program.name,
        "inputs": list(program.inputs),
        "optional": sorted(program.optional),
        "arguments": [list(argument) for argument in program.arguments],
        "constants": dict(program.constants),
        "sizes": {name: list(sizes) for name, sizes in program.sizes.items()},
        "output": program.output,
        "causal_lm": program.causal_lm,
        "positions": program.positions,
        "reason": program.reason,
        "modules": {name: _entry(entry) for name, entry in program.tree.modules.items()},
        "nodes": [_node(node) for node in program.graph.nodes],
    }
    return json.dumps(data, indent=indent, ensure_ascii=False)


def from_text(text: str) -> Program:
    """The inverse of `to_text`. FxoptError when the text is not a program that may be run."""
    try:
        data = json.loads(text)
        if data["version"] != VERSION:
            raise FxoptError(
                f"graph.json: version {data['version']} was written by another fxopt; this one "
                f"reads version {VERSION}"
            )
        return _program(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FxoptError(
            f"graph.json: not a graph that fxopt wrote ({type(error).__name__}: {error}); save "
            "the module again"
        ) from error


def _program(data: dict[str, Any]) -> Program:
    register_ops()
    return Program(
        name=str(data["name"]),
        graph=_graph(data["nodes"]),
        tree=Tree({name: _read_entry(entry) for name, entry in data["modules"].items()}, {}),
        inputs=tuple(data["inputs"]),
        optional=frozenset(data["optional"]),
        arguments=tuple(Argument(*fields) for fields in data["arguments"]),
        output=data["output"],
        causal_lm=bool(data["causal_lm"]),
        positions=data["positions"],
        reason=data["reason"],
        constants=data["constants"],
        sizes=data["sizes"],
    )


def _entry(entry: Entry) -> dict[str, Any]:
    found = dataclasses.asdict(entry)
    found["transient"] = sorted(entry.transient)
    return {name: value for name, value in found.items() if value}


def _read_entry(data: dict[str, Any]) -> Entry:
    if not data["cls"].isidentifier() or keyword.iskeyword(data["cls"]):
        raise ValueError(f"{data['cls']!r} is no class name")
    if data.get("base", "Module") not in ("Module", *CONTAINERS):
        raise ValueError(f"{data['base']!r} is no kind of module")
    fields: dict[str, Any] = {**data, "transient": set(data.get("transient", ()))}
    return Entry(**fields)


def _node(node: fx.Node) -> dict[str, Any]:
    data: dict[str, Any] = {"op": node.op, "name": node.name, "target": target_name(node.target)}
    if node.args:
        data["args"] = [encode(arg) for arg in node.args]
    if node.kwargs:
        data["kwargs"] = {name: encode(value) for name, value in node.kwargs.items()}
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    if stack and node.op != "placeholder":
        data["stack"] = [[key, path] for key, (path, _) in stack.items()]
    meta = {name: node.meta[name] for name in _META if node.meta.get(name)}
    if meta:
        data["meta"] = meta
    known = facts(node)
    if isinstance(known, Facts):
        data["value"] = [_short(known.dtype), list(known.shape)]
    elif known is not None:
        data["value"] = known
    return data


def _graph(items: list[dict[str, Any]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for data in items:
        kind = data["op"]
        if kind not in ("placeholder", "get_attr", "call_function", "output"):
            raise ValueError(f"a node of kind {kind!r}")
        called = kind == "call_function"
        # Names of parameters are looked up in the tree; those of inputs become source.
        read = str if kind == "get_attr" else find_target if called else _identifier
        target = read(data["target"])
        args = tuple(decode(arg, nodes) for arg in data.get("args", ()))
        kwargs = {
            _identifier(name): decode(value, nodes)
            for name, value in data.get("kwargs", {}).items()
        }
        if target is getattr and args[1] not in ATTRIBUTES:
            raise ValueError(f"the attribute {args[1]!r} is not one that graphs read")
        node = graph.create_node(kind, target, args, kwargs, name=_identifier(data["name"]))
        nodes[data["name"]] = node
        node.meta = dict(data.get("meta", {}))
        node.meta["nn_module_stack"] = {key: (path, "") for key, path in data.get("stack", ())}
        node.meta["facts"] = _facts(data.get("value"))
    graph.lint()
    return graph


def _identifier(name: str) -> str:
    """A name that becomes part of generated source, so nothing else may pass."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is no name")
    return name


def _facts(data: Any) -> Facts | str | int | None:
    if isinstance(data, list):
        return Facts(_torch_name("dtype", data[0]), tuple(data[1]))
    return data


def encode(value: Any) -> Any:
    """An argument of a node as plain data; what JSON lacks is a dict with one key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind in _NAMED:
        if isinstance(value, getattr(torch, kind)):
            return {kind: _short(value)}
    raise FxoptError(f"the graph holds a {type(value).__name__}, which cannot be saved: {value!r}")


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of `encode`."""
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    (kind, value), *rest = data.items()
    if rest:
        raise ValueError(f"an argument of several kinds: {sorted(data)}")
    if kind == "node":
        return nodes[value]
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in value)
    if kind == "slice":
        return slice(*(decode(part, nodes) for part in value))
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device(value)
    if kind in _NAMED:
        return _torch_name(kind, value)
    raise ValueError(f"an argument of unknown kind {kind!r}")


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _torch_name(kind: str, name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, getattr(torch, kind)):
        raise ValueError(f"{name!r} is no torch.{kind}")
    return found
