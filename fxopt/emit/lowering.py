"""A module's graph in operators that other tools know: what ONNX export traces.

Each fxopt op stands as its traceable reference. For generation the attention nodes take their
cache and return it longer; the graph is the same otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.proxy import GraphAppendingTracer
from torch.fx.traceback import annotate

from ..ir.errors import ExportError
from ..ir.ops import arguments_of_attend, attend
from .attributes import attribute
from .contrib import Target, causal_attentions, packed_products
from .epilogues import separate
from .frames import state_index
from .program import Program, State
from .registry import references
from .targets import bare_name, mutates, root

Kind = Literal["forward", "generate"]
GROUPED = ("_grouped_mm", "grouped_mm_fallback")
"""Products of experts: torch's, and transformers' for dtypes that torch compiles none of."""


@dataclass(frozen=True)
class Slot:
    """One tensor of the cache of one attention."""

    layer: int
    name: str

    @property
    def past(self) -> str:
        return f"past.{self.layer}.{self.name}"

    @property
    def present(self) -> str:
        return f"present.{self.layer}.{self.name}"


class Lowered(nn.Module):
    """Runs a program node by node, positionally: `inputs` names the arguments in order.

    The result is the graph's outputs, and with "generate" the present state of every slot.
    While they are traced, nodes are annotated with their module and what rewrite made them;
    for the target "ort" some are traced as operators of onnxruntime, and `notes` says why others
    are not. After a call `appended` has k and v of each attention that keeps a cache, and `running`
    is the node that failed, if one did.
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        kind: Kind,
        dtype: torch.dtype,
        target: Target = "portable",
    ) -> None:
        super().__init__()
        self.program, self.kind, self.dtype = program, kind, dtype
        self.graph = inlined(program.graph)
        self.references = references()
        check_lowers(self.graph, self.references)
        cast = {key: _cast(value, dtype) for key, value in tensors.items()}
        program.tree.with_tensors(cast).fill(self, lambda module, entry: nn.Module)
        self.halves = {t.dtype for t in tensors.values() if t.dtype in _HALVES} - {dtype}
        self.appended: dict[int, tuple[Tensor, Tensor]] = {}
        self.running: fx.Node | None = None
        self.contrib: dict[fx.Node, list[str]] = {}
        self.grouped: set[fx.Node] = set()
        self.notes: list[str] = []
        if target == "ort":
            decodes = kind == "generate"
            self.contrib, notes = packed_products(self.graph, self, decodes)
            self.grouped, more = causal_attentions(self.graph, dtype, decodes)
            self.notes = notes + more

    @cached_property
    def inputs(self) -> list[str]:
        """Names of the tensors that a call takes."""
        skip = {"past", "start", "logits_to_keep"} if self.program.positions else set[str]()
        names = [name for name in self.program.placeholders if name not in skip]
        return names + [slot.past for slot in self.slots]

    @cached_property
    def slots(self) -> list[Slot]:
        """The tensors of the cache, layer by layer."""
        if self.kind == "forward":
            return []
        return [
            Slot(layer, name)
            for layer, state in enumerate(self.program.states)
            for name in state_names(state)
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        if "logits_to_keep" in self.program.placeholders and "logits_to_keep" not in given:
            ids = given["input_ids"]
            given["logits_to_keep"] = torch.arange(ids.shape[1], device=ids.device)
        present: dict[int, Sequence[Tensor]] = {}
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                self.running = None
                flat = [state for layer in sorted(present) for state in present[layer]]
                return (*fx.map_arg(node.args[0], values.__getitem__), *flat)
            self.running = node
            with annotate(_provenance(node)):
                values[node] = self._run(node, values, given, present)
        raise AssertionError("a graph ends with its output")

    def _run(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        given: Mapping[str, Any],
        present: dict[int, Sequence[Tensor]],
    ) -> Any:
        if node.op == "placeholder":
            return given.get(str(node.target))
        if node.op == "get_attr":
            return attribute(self, str(node.target))
        layer = state_index(node)
        if layer is not None:
            return [given[s.past] for s in self.slots if s.layer == layer] or None
        arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = self._convert(arguments)
        if node.target is attend:
            return self._attend(node, args, kwargs, present)
        if node in self.contrib and torch.compiler.is_exporting():
            return self._contrib(node, args)
        return self._traceable(node.target)(*args, **kwargs)

    def _traceable(self, target: Any) -> Any:
        """What computes the same as `target` in operators that an exporter knows."""
        if not isinstance(target, OpOverload):
            return target
        if target.namespace == "fxopt":
            return self.references[bare_name(target)]
        if bare_name(target) in GROUPED:
            from ..kernels.quantized_experts import grouped_mm

            return grouped_mm
        return target

    def _contrib(self, node: fx.Node, args: Sequence[Any]) -> Tensor:
        from ..kernels.quantized_linear.onnx import matmul_nbits

        codes, scales, zeros = (attribute(self, name) for name in self.contrib[node])
        return matmul_nbits(args[0], codes, scales, zeros, args[4])

    def _attend(
        self, node: fx.Node, args: Any, kwargs: Any, present: dict[int, Sequence[Tensor]]
    ) -> Tensor:
        from ..kernels.attention.onnx import attention_onnx
        from ..kernels.attention.ort import grouped_query_attention
        from ..kernels.kv_attention import cached_attention_functional

        call = arguments_of_attend(*args, **kwargs)
        state, layout = call.pop("state"), call.pop("layout")
        call.pop("start")
        if node in self.grouped and torch.compiler.is_exporting():
            return grouped_query_attention(call)
        if not state:
            return attention_onnx(**call)
        q, k, v, *_ = (call.pop(name) for name in (*"qkv", "grid", "near", "dilation"))
        source: Any = node.kwargs["state"]
        out, present[source.args[1]] = cached_attention_functional(
            q, k, v, state, **call, layout=layout, attention=attention_onnx
        )
        if not torch.compiler.is_exporting():
            self.appended[source.args[1]] = (k, v)
        return out

    def _convert(self, value: Any) -> Any:
        """Half precisions that are written into the graph become the wanted dtype."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._convert(item) for item in value)
        if isinstance(value, dict):
            return {name: self._convert(item) for name, item in value.items()}
        return self.dtype if isinstance(value, torch.dtype) and value in self.halves else value


_HALVES = (torch.bfloat16, torch.float16)


def inlined(graph: fx.Graph) -> fx.Graph:
    """A copy in which the programs of `fxopt::chunked` stand as nodes, for all rows at once, and
    what follows a product as calls of its own."""
    from ..kernels.chunked import run

    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    separate(copied)
    tracer = GraphAppendingTracer(copied)
    for node in list(copied.find_nodes(op="call_function", target=torch.ops.fxopt.chunked.default)):
        x, tensors, text, _ = node.args
        before = set(copied.nodes)
        with copied.inserting_before(node):
            values: Any = [fx.Proxy(value, tracer) for value in (x, *tensors)]
            whole: Any = run(text, values[0], values[1:])
        node.replace_all_uses_with(whole.node)
        for new in set(copied.nodes) - before:
            new.meta = dict(node.meta)
        copied.erase_node(node)
    return copied


def check_lowers(graph: fx.Graph, known: Mapping[str, Any]) -> None:
    """ExportError for the first node that cannot be traced: an fxopt op without a traceable
    reference, or a call that changes a tensor of the module."""
    for node in graph.nodes:
        _check_keeps_tensors(node)
        target = node.target
        if not isinstance(target, OpOverload) or target.namespace != "fxopt":
            continue
        if bare_name(target) not in known:
            raise ExportError(
                f"{node.meta.get('fqn') or node.name}: fxopt::{bare_name(target)} has no reference "
                f"that can be traced (rewrite: {node.meta.get('fxopt') or 'none'}); nothing was "
                "written. Leave that rewrite out with rewrites=, or keep= the site"
            )


def _check_keeps_tensors(node: fx.Node) -> None:
    changed = root(node.args[0]) if mutates(node) else None
    if changed is not None and changed.op == "get_attr":
        raise ExportError(
            f"the forward changes {changed.target} ({node.target}), and an ONNX file holds no "
            "tensor that a call changes; nothing was written. Let the forward take it as an input "
            "and return it"
        )


def state_names(state: State) -> list[str]:
    """Names of the tensors of one attention's growing state; classes of heads are numbered."""
    from ..kernels.kv_attention.layout import functional_names, parse

    classes = functional_names(parse(state.layout), state.num_kv_heads)
    if len(classes) == 1:
        return classes[0]
    return [f"{name}.{index}" for index, names in enumerate(classes) for name in names]


def empty_states(lowered: Lowered, batch: int) -> list[Tensor]:
    """A past of length 0 for every slot."""
    from ..kernels.kv_attention.layout import empty_past, parse

    found: list[Tensor] = []
    for state in lowered.program.states if lowered.kind == "generate" else ():
        dtype = lowered.dtype if state.dtype in lowered.halves else state.dtype
        found += empty_past(
            parse(state.layout), batch, state.num_kv_heads, state.head_dim, state.value_dim, dtype
        )
    return found


def _provenance(node: fx.Node) -> dict[str, str]:
    """What `annotate` writes into the trace."""
    meta = {name: str(node.meta.get(name) or "") for name in ("fqn", "fxopt", "site")}
    return meta if node.op == "call_function" else {}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    plain = value.detach().cpu()
    if value.dtype in _HALVES:
        plain = plain.to(dtype)
    is_parameter = isinstance(value, nn.Parameter)
    return nn.Parameter(plain, requires_grad=False) if is_parameter else plain
