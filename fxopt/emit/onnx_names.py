"""Names in an ONNX file: dimensions, and on each node what rewrite made it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch.export import ExportedProgram


def rename_dimensions(model: Any) -> None:
    """Symbols become "batch", "length" and `<input>_<dimension>`, wherever they occur."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for index, dim in enumerate(value.shape):
            text = str(getattr(dim, "value", dim))
            if text.isidentifier() and text not in names:
                names[text] = _dimension(value.name, index, len(value.shape), set(names.values()))
    every = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or "(?!)")
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = _renamed(value.shape, lambda s: every.sub(lambda m: names[m[0]], s))


def _renamed(shape: Any, rename: Callable[[str], str]) -> Any:
    """A copy of a shape: values share theirs with each other and with constants."""
    import onnx_ir as ir

    sizes = [dim if isinstance(dim, int) else dim.value for dim in shape]
    return ir.Shape([rename(size) if isinstance(size, str) else size for size in sizes])


def _dimension(name: str, index: int, rank: int, taken: set[str]) -> str:
    if index == 0 and "batch" not in taken:
        return "batch"
    if name == "input_ids" and index == 1:
        return "length"
    if name == "attention_mask" and index == 1:
        return "total_length"
    if not name.startswith("past."):
        return f"{name.replace('.', '_')}_{index}"
    # A packed block has one dimension more than a token.
    _, layer, tensor, *head_class = name.split(".")
    side = tensor.partition("_")[0]
    kind = side if side in ("sink", "recent") else "blocks" if rank == 5 else "past"
    return next(n for n in (kind, "_".join([kind, layer, *head_class])) if n not in taken)


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def write_provenance(written: Any, exported: ExportedProgram) -> None:
    """`ai.fxopt.rewrite` and `ai.fxopt.site` on every node that a rewrite made."""
    programs = [exported, getattr(written, "exported_program", None)]
    origin = {
        node.name: node.meta["custom"]
        for source in programs
        for node in (source.graph.nodes if source is not None else ())
        if node.meta.get("custom", {}).get("fxopt")
    }
    for node in written.model.graph:
        # Traces of source files tell of the machine that exported.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        made = origin.get(scopes[-1]) if scopes else None
        if made is not None:
            node.metadata_props["ai.fxopt.rewrite"] = made["fxopt"]
            node.metadata_props["ai.fxopt.site"] = made["site"]
