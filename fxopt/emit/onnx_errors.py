"""Why a module cannot be exported: what, at which site, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from .lowering import Lowered
from .program import Program


def why_no_generation(program: Program) -> str:
    """The reason that a module has no graph for prefill and decoding."""
    if program.reason:
        return program.reason
    if "decoder_input_ids" in program.inputs:
        return (
            "of an encoder-decoder model ONNX has the forward only; opt.generate generates from it"
        )
    if program.positions is not None and "logits" in program.output.get("keys", ()):
        return "it is a part of a model (at=), whose graph takes no cache"
    return "it is no causal language model"


def explain(
    lowered: Lowered, what: str, error: BaseException, exported: ExportedProgram | None = None
) -> str:
    """One message of a failed step, with the node that it failed at where that is known."""
    chain = list(_chain(error))
    cause = chain[-1]
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    first = (lines or [type(cause).__name__])[0][:300]
    text = "\n".join(map(str, chain))
    meta, name = _place(lowered, text, exported)
    where = f" at {meta['fqn']}" if meta.get("fqn") else ""
    op = f": {name}" if name else ""
    return (
        f"{lowered.program.name} cannot be {what}{where}{op}: {type(cause).__name__}: {first}; "
        f"nothing was written{_way_out(meta)}"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    yield error
    if error.__cause__ is not None:
        yield from _chain(error.__cause__)


def _place(
    lowered: Lowered, text: str, exported: ExportedProgram | None
) -> tuple[Mapping[str, Any], str]:
    """What is known of the node that failed, and the op that it calls."""
    if exported is None:
        node = lowered.running
        return (node.meta, str(node.target)) if node is not None else ({}, "")
    found = re.search(r"translating node %(\w+)", text)
    nodes = {node.name: node for node in exported.graph.nodes}
    node = nodes.get(found[1]) if found else None
    op = re.search(r"op='([\w.]+)'", text)
    name = op[1] if op else str(node.target) if node is not None else ""
    if node is None:
        node = next((n for n in nodes.values() if name and str(n.target).startswith(name)), None)
    return _written(node), name


def _written(node: fx.Node | None) -> Mapping[str, Any]:
    return {} if node is None else node.meta.get("custom", {})


def _way_out(meta: Mapping[str, Any]) -> str:
    if meta.get("fxopt"):
        return f". Leave {meta['fxopt']} out with rewrites=, or keep= {meta['site']}"
    return ""
