"""`at=`: running a model around its captured submodule. What is around is never captured."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from .capture import Captured
from .capture.huggingface import generates
from .capture.submodule import scratch, submodule, twin
from .decide.calibration import Batch
from .decide.recorder import Call
from .emit.module import OptimizedModule
from .hosted import ATTRIBUTES, OptimizedHost, around, takes_cache
from .ir.budget import Budget
from .ir.errors import FxoptError
from .ir.workload import Forward, Generate, Workload


class Host:
    """The model around the captured submodule `at`: runs it with something else in that place."""

    def __init__(self, model: nn.Module, at: str, captured: Captured, example: Batch) -> None:
        taken = [name for name in ATTRIBUTES if name in {*vars(model), *_children(model)}]
        if taken:
            raise FxoptError(
                f"at={at!r}: {type(model).__name__} has an attribute {taken[0]!r}, and so has "
                "the result of fxopt.optimize: rename it"
            )
        self.model, self.at = model, at
        self.part = submodule(model, at)
        self._captured, self._example = captured, example
        self._cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})

    def outputs(self, call: Call, batch: Batch) -> list[Tensor]:
        """The model's output tensors, `call` computing those of its submodule.

        Only the floating-point ones, unless there are none. Every run begins with the same buffers
        and random numbers; gradients flow from the submodule on where they are enabled.
        """
        return list(self._named(call, batch).values())

    def _named(self, call: Call, batch: Batch) -> dict[str, Tensor]:
        recording = torch.is_grad_enabled()
        whole = scratch(self.model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(recording):
                outputs = call(self._captured.arguments(*args, **kwargs))
                # what is around may write to them
                outputs = [o.clone() if isinstance(o, Tensor) else o for o in outputs]
            return self._captured.output.build(outputs)

        stand_in: Any = whole.get_submodule(self.at)
        stand_in.forward = forward
        with self._seeded():
            found = _tensors(whole(**batch))
        floating = {name: t for name, t in found.items() if t.is_floating_point()}
        if not found:
            raise FxoptError(
                f"at={self.at!r}: {type(self.model).__name__} returns no tensor to compare; give "
                "a metric (Budget(metric=..., metric_drop=...))"
            )
        return floating or found

    @contextmanager
    def _seeded(self) -> Generator[None]:
        with torch.random.fork_rng(self._cuda):
            torch.default_generator.manual_seed(0)
            for index in self._cuda:
                torch.cuda.default_generators[index].manual_seed(0)
            yield

    def inner(self, call: Call, batch: Batch, positions: Tensor | None = None) -> list[Tensor]:
        """The submodule's own outputs, of its last call; `positions` count in the model's."""
        del positions
        found: list[Sequence[Any]] = [[torch.zeros(1)]]

        def kept(arguments: list[Any]) -> Sequence[Any]:
            found.append(call(arguments))
            return found[-1]

        self.outputs(kept, batch)
        tensors = [o for o in found[-1] if isinstance(o, Tensor)]
        return [o for o in tensors if o.is_floating_point()] or tensors

    @cached_property
    def names(self) -> list[str]:
        """Where each of `outputs` stands in what the model returns: "logits", "states.0", ""."""
        with torch.no_grad():
            return list(self._named(self._original, self._example))

    def _original(self, arguments: list[Any]) -> Sequence[Any]:
        return self._captured.graph.forward(*arguments)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The submodule's graph inputs by name, as the example makes them."""
        seen: list[list[Any]] = []
        with torch.no_grad():
            self.outputs(lambda arguments: seen.append(arguments) or self._original(arguments),
                         self._example)  # fmt: skip
        placeholders = self._captured.graph.graph.find_nodes(op="placeholder")
        return dict(zip((str(n.target) for n in placeholders), seen[0], strict=True))

    def differentiable(self, output: int) -> bool:
        """Whether the model's output number `output` has a gradient by its submodule's."""
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        def call(arguments: list[Any]) -> list[Any]:
            with torch.no_grad():
                outputs = self._original(arguments)
            return [leaf(value) for value in outputs]

        with torch.enable_grad():
            total = self.outputs(call, self._example)[output].sum()
        if not total.requires_grad or not leaves:
            return False
        gradients: Any = torch.autograd.grad(total, leaves, allow_unused=True)
        return any(gradient is not None for gradient in gradients)

    def workload(self, workload: Workload) -> Workload:
        """The workload as the submodule sees it: its rows and tokens for those of the model."""
        seen = next((v for v in self.inputs.values() if isinstance(v, Tensor) and v.ndim), None)
        given = next((v for v in self._example.values() if isinstance(v, Tensor) and v.ndim), None)
        if seen is None or given is None or not isinstance(workload, Forward):
            return workload
        rows = max(seen.shape[0], 1)
        width = seen.shape[-1] if seen.is_floating_point() and seen.ndim > 1 else 1
        times = (workload.batch or given.shape[0]) / max(given.shape[0], 1)
        length = max(1, seen.numel() // max(rows * width, 1))
        return Forward(batch=max(1, round(rows * times)), length=length)

    def around(self, module: OptimizedModule) -> OptimizedHost:
        """The model with `module` in the place of its submodule; the original stays as it is."""
        return around(self.model, self.at, module)

    def holding(self, graph: nn.Module) -> nn.Module:
        """The tensors of `graph` and of the model around it."""
        return twin(self.model, {id(self.part): graph})

    def check(self, module: OptimizedModule) -> None:
        """Run the model with `module` in place: FxoptError where it needs more than a forward."""
        try:
            with torch.no_grad(), self._seeded():
                scratch(self.around(module))(**self._example)
        except FxoptError:
            raise
        except Exception as error:
            raise FxoptError(
                f"at={self.at!r}: {type(self.model).__name__} cannot run with the rewritten "
                f"{type(self.part).__name__} in place ({type(error).__name__}: {error}). Name a "
                "submodule that the model only calls, without reaching into it"
            ) from error

    def notes(self) -> list[str]:
        """What the report says of a rewritten submodule."""
        notes = [
            f"only {self.at!r} was rewritten, and names of sites start there; save() writes that "
            "submodule, and fxopt.load(folder, model) puts it into the model again"
        ]
        if takes_cache(self.part):
            slow = ", and generate computes the whole sequence for each token"
            notes.append(
                f"{self.at!r} was rewritten without its KV cache: the model runs with "
                f"use_cache=False{slow if generates(self.model) else ''}"
            )
        return notes


def refuse_cache(at: str, budget: Budget, workload: Workload) -> None:
    """FxoptError where `at=` is asked for what needs the whole model."""
    if "kv_cache" in budget.cost_rows or isinstance(workload, Generate):
        raise FxoptError(
            f"at={at!r}: a KV cache cannot be passed through the model around a submodule, so "
            "kv_cache rows and fxopt.Generate take the whole model (leave at= out). With at= use "
            "workload=fxopt.Forward() and the rows weights, memory, latency and quality"
        )


def uncached(model: nn.Module, at: str, example: Batch) -> Batch:
    """The example for a model whose submodule `at` loses its KV cache: both run without one."""
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return (
        {**example, "use_cache": False} if takes and takes_cache(submodule(model, at)) else example
    )


def _children(module: nn.Module) -> set[str]:
    return {n for n, _ in (*module.named_children(), *module.named_parameters(recurse=False),
                           *module.named_buffers(recurse=False))}  # fmt: skip


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in what a model returned, by where they stand."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", range(len(cast("list[Any]", value))))
        items = zip(names, cast("list[Any]", value), strict=True)
    elif is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    else:
        return {}
    parts = [_tensors(item, f"{name}.{key}".strip(".")) for key, item in items]
    return {key: tensor for part in parts for key, tensor in part.items()}
