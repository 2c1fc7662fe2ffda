"""`torch.compile(model, backend="fxopt")`: exact rewrites for models that export cannot take.

Dynamo hands over one graph after another, breaks between them included, and none says what the
whole model returns. So nothing is priced, searched or verified here: what is rewritten is what
needs no budget, attention in any spelling (`attend`) and root-mean-square norms. The rest of each
graph, and every graph that is not rewritten, is compiled by `options={"then": ...}`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo import list_backends, lookup_backend
from torch._dynamo.backends.registry import register_backend
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from .capture.attention import SOFTMAX, match_attention
from .capture.inplace import without_overwriting
from .emit.norms import fuse_norms
from .emit.registry import register_ops
from .emit.targets import is_legal, mutates
from .ir.budget import Budget
from .ir.errors import FxoptError
from .ir.ops import attend
from .ir.units import so_many

logger = logging.getLogger("fxopt")
aten = torch.ops.aten

NAME = "fxopt"


class NotRewrittenError(Exception):
    """Why a graph is left as it is."""


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend: `gm` rewritten where that is exact, compiled by what comes after.

    options: `then` is the backend that compiles the result, "inductor" unless told ("eager" runs
    it as it is). FxoptError for rows of a budget, which `fxopt.optimize` serves. Graphs of a
    training step, under autocast, or with writes to their inputs are handed on unchanged; the
    reason is logged.
    """
    then = _then(options, mode)
    try:
        gm = _rewritten(gm)
    except NotRewrittenError as why:
        calls = so_many(_calls(gm), "call")
        logger.info("torch.compile: a graph of %s is left as it is: %s", calls, why)
    return then(gm, list(example_inputs))


def _then(options: Mapping[str, Any] | None, mode: str | None) -> Callable[..., Any]:
    given = dict(options or {})
    then = given.pop("then", "inductor")
    rows = sorted(set(given) & set(Budget.model_fields))
    if rows:
        raise FxoptError(
            f"torch.compile options: {', '.join(rows)}: the backend makes exact rewrites only and "
            "measures none; call fxopt.optimize(model, fxopt.Budget(...)) for a budget"
        )
    if given or mode is not None:
        raise FxoptError(
            f"torch.compile: the backend fxopt takes no {', '.join(sorted(given)) or 'mode'}; "
            "its one option is then, the backend that compiles the result"
        )
    return cast(Callable[..., Any], lookup_backend(then) if isinstance(then, str) else then)


def _rewritten(gm: fx.GraphModule) -> fx.GraphModule:
    examples = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    fakes = [value for value in examples if isinstance(value, FakeTensor)]
    if not fakes:
        raise NotRewrittenError("it takes no tensors")
    if torch.is_grad_enabled() and any(fake.requires_grad for fake in fakes):
        raise NotRewrittenError("it is part of a training step; use torch.no_grad() for inference")
    if any(torch.is_autocast_enabled(fake.device.type) for fake in fakes):
        raise NotRewrittenError("autocast decides its dtypes; convert the model instead")
    register_ops()
    traced = _traced(gm, examples, fakes[0].fake_mode)
    before = _outputs(traced)
    _rewrite(traced)
    mode = FakeTensorProp(traced, fakes[0].fake_mode)
    after = pytree.tree_leaves(_tried(lambda: mode.propagate_dont_convert_inputs(*examples)))
    if [_layout(value) for value in after] != before:
        raise NotRewrittenError("its results would lie differently in memory")
    return traced


def _traced(gm: fx.GraphModule, examples: Sequence[Any], mode: Any) -> fx.GraphModule:
    """`gm` in ATen calls as export writes them; NotRewrittenError for what has no such form."""
    with mode:
        traced = _tried(lambda: make_fx(gm, pre_dispatch=True)(*examples))
    without_overwriting(traced.graph)
    for node in traced.graph.nodes:
        if node.op == "call_function" and not is_legal(node.target):
            raise NotRewrittenError(f"it calls {getattr(node.target, '__name__', node.target)}")
        if mutates(node):
            raise NotRewrittenError(f"it overwrites a tensor in place ({node.target})")
        if node.op == "get_attr" and isinstance(getattr(traced, str(node.target)), FakeTensor):
            raise NotRewrittenError(f"the value of its constant {node.target} is not known")
    return traced


def _tried(call: Callable[[], Any]) -> Any:
    """`call()`; torch names no class for what its tracers cannot do."""
    try:
        return call()
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise NotRewrittenError(f"{type(error).__name__}: {first}") from error


def _rewrite(traced: fx.GraphModule) -> None:
    graph = traced.graph
    for node in graph.find_nodes(op="call_function", target=aten.dropout.default):
        if node.args[2:] == (False,):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    spelled_out = _softmaxes(graph)
    match_attention(traced)
    fuse_norms(graph)
    graph.eliminate_dead_code()
    found = graph.find_nodes(op="call_function", target=attend)
    hidden = any(call.kwargs.get("causal") and call.kwargs.get("mask") for call in found)
    if hidden and _softmaxes(graph) < spelled_out:
        # A softmax over nothing but equally large negative scores is their average.
        raise NotRewrittenError("a padded query may see no key: attend returns 0, the model not")
    norms = len(graph.find_nodes(op="call_function", target=aten.rms_norm.default))
    if not found and not norms:
        raise NotRewrittenError("it holds nothing to rewrite")
    traced.recompile()
    logger.info(
        "torch.compile: rewrote %s and %s, each as one call",
        so_many(len(found), "attention"),
        so_many(norms, "norm"),
    )


def _softmaxes(graph: fx.Graph) -> int:
    return sum(node.target in SOFTMAX for node in graph.nodes)


def _calls(gm: fx.GraphModule) -> int:
    return sum(node.op.startswith("call") for node in gm.graph.nodes)


def _outputs(gm: fx.GraphModule) -> list[Any]:
    leaves = pytree.tree_leaves(gm.graph.output_node().args[0])
    return [_layout(leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf) for leaf in leaves]


def _layout(value: Any) -> Any:
    """What later graphs rely on; as text, for comparing symbols would constrain them."""
    if not isinstance(value, Tensor):
        return str(value)
    return str((value.dtype, tuple(value.shape), value.stride()))


if NAME not in list_backends(exclude_tags=()):
    # Installed, it is found by its entry point.
    register_backend(backend, name=NAME)
