"""Forward, loss and backward of a module as one graph, by AOTAutograd without Dynamo.

What the graph computes is what eager autograd computes, op for op: the few ops that PyTorch's
tracer replaces by others are put back (`eager_dropout`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx, nn
from torch._functorch import config
from torch._functorch.aot_autograd import (
    aot_compile_joint_with_descriptors,
    aot_export_joint_with_descriptors,
)
from torch.fx import traceback
from torch.fx.traceback import annotate
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ..ir.errors import CaptureError
from ..ir.site import Site
from ..passes.activation.cut_cross_entropy import LOSS, scale_in_place
from .heads import Cut, Heads
from .huggingface import value_free_masks
from .random import eager_dropout

MODULE = "fxopt_module"

Partition = Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]]


class Compiler(Protocol):
    """Makes a function of one half of a step, which takes its arguments in a list."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]: ...


@dataclass
class Joint:
    """One training step of a model on inputs of fixed shapes.

    `graph` has all forward nodes before all backward nodes; each placeholder and each output has
    a descriptor of PyTorch's (`meta["desc"]`). `loss` says that gradients start from the scalar
    named `loss` alone. `heads` are the logits of losses, as sites.
    """

    graph: fx.GraphModule
    loss: bool
    heads: list[Site]
    build: Callable[[Partition, Compiler], Callable[..., Any]]


@contextmanager
def joint(model: nn.Module, inputs: Mapping[str, Any], cut: Cut | None = None) -> Generator[Joint]:
    """Trace one step of `model(**inputs)` in the modes that its modules are in.

    Heads whose keys are in `cut` have their loss computed without logits, as it says.
    `Joint.build` works inside the context only. CaptureError when the step cannot be traced:
    values decide what is run, say, or an input that needs a gradient is changed in place.
    """
    tensors = {n: v for n, v in inputs.items() if _holds_tensor(v)}
    step = _Step(model, {n: v for n, v in inputs.items() if n not in tensors}, cut or {})
    with ExitStack() as stack:
        try:
            with _module_names(model), value_free_masks(inputs):
                traced = aot_export_joint_with_descriptors(stack, step, (), tensors)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__}: the training step cannot be traced as one graph: "
                f"{_first_line(error)}. Values that decide what runs are the usual reason; "
                "optimise the submodules around them, and set each in its place"
            ) from error
        graph = traced.graph_module
        if not any(str(n.target).startswith("tangents") for n in graph.graph.nodes):
            raise CaptureError(
                f"{type(model).__name__}: no output needs a gradient, so there is no training "
                "step; are all parameters frozen, or is the model called under no_grad?"
            )
        eager_dropout(graph.graph)
        scale_in_place(graph.graph)

        def build(partition: Partition, compiler: Compiler) -> Callable[..., Any]:
            def parts(
                gm: fx.GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any
            ) -> tuple[fx.GraphModule, fx.GraphModule]:
                return partition(gm, num_fwd_outputs)

            # No saved tensor is written over, so that the graph may be kept (retain_graph).
            state = traced._aot_state  # pyright: ignore[reportPrivateUsage]
            state.fw_metadata.bw_donated_idxs = []
            with config.patch(donated_buffer=False):
                run = aot_compile_joint_with_descriptors(
                    traced, partition_fn=parts, fw_compiler=compiler, bw_compiler=compiler
                )
            # Descriptors name tensors as `_Step` holds them; looked up at each call, so that
            # moved or replaced tensors are found.
            names = [n.removeprefix("model.") for n in (*traced.params_spec, *traced.buffers_spec)]
            given = list(tensors)
            return lambda held, arguments: run(
                *(held[n] for n in names), **{n: arguments[n] for n in given}
            )

        yield Joint(graph, step.loss, step.heads, build)


class _Step(nn.Module):
    """The model; where it returns a scalar `loss`, only that one carries a gradient.

    Gradients of the other outputs would have to exist as zeros: those of the logits are as large
    as the logits.
    """

    def __init__(self, model: nn.Module, constants: Mapping[str, Any], cut: Cut) -> None:
        super().__init__()
        self.model = model
        self.constants = constants
        self.cut = cut
        self.loss = False
        self.heads: list[Site] = []

    def forward(self, **tensors: Any) -> Any:
        with Heads(self.cut, LOSS, _present_module) as heads:
            output = self.model(**tensors, **self.constants)
        loss = scalar_loss(output)
        self.loss = loss is not None
        output = heads.without_logits(output, self.loss)
        self.heads = heads.sites
        if loss is None:
            return output
        return pytree.tree_map_only(Tensor, lambda t: t if t is loss else t.detach(), output)


def scalar_loss(output: Any) -> Tensor | None:
    """The `loss` of a mapping or of an object that has one, if it is a scalar with a gradient."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor) and found.dim() == 0 and found.requires_grad:
        return found
    return None


def module_of(node: fx.Node) -> str:
    """Qualified name of the module whose forward made a forward node; "" for the model."""
    return node.meta.get("custom", {}).get(MODULE, "")


def _present_module() -> str:
    """The qualified name of the module whose forward runs, while a step is traced."""
    return traceback.get_current_meta().get("custom", {}).get(MODULE, "")


@contextmanager
def _module_names(model: nn.Module) -> Generator[None]:
    """Nodes traced meanwhile know the module they come from."""
    open_: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            context = annotate({MODULE: name})
            context.__enter__()
            open_.append(context)

        return hook

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
