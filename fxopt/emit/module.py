"""The rewritten model as a module: the original's signature, names and output class."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import FxoptError
from .binding import Binding, fill_text_inputs, without_idle_masks
from .editor import GraphEditor
from .epilogues import fuse_epilogues
from .gates import fuse_gates
from .norms import fuse_norms
from .output import builder
from .program import CapturedModel, Program, edited_tree, program
from .registry import register_ops
from .residuals import fuse_residuals
from .rotary import fuse_both, fuse_rotary
from .source import generate
from .surface import HuggingFaceSurface
from .tree import CONTAINERS

logger = logging.getLogger("fxopt")

INTERNAL = ("program", "_bind", "_build_output", "_source", "_run", "_container", "_states")
ATTRIBUTES = ("plan", "report", "config", "generation_config", "editor")


class OptimizedModule(HuggingFaceSurface, nn.Module):
    """A rewritten model. Parameters that no rewrite replaced are the original's own objects.

    It is called like the original and returns what the original returned. `plan` and `report`
    say what was decided and measured; `source` is the code that runs. It can be copied, pickled,
    compiled (`torch.compile(fullgraph=True)`) and moved to another device; its dtype is part of
    its code.
    """

    plan: Any
    report: Any
    config: Any
    generation_config: Any
    editor: GraphEditor | None

    def __init__(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.plan = self.report = self.config = self.generation_config = self.editor = None
        register_ops()
        self.program = program
        self._states = program.states
        self._bind = Binding(program)
        self._build_output = builder(program.output)
        self._source = generate(program.graph, program.tree, reserved_names(type(self)))
        pick = self._source.load()
        program.tree.with_tensors(tensors).fill(self, pick)
        self._run = pick("", program.tree.modules[""]).forward
        self._container = CONTAINERS.get(program.tree.modules[""].base)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the original forward."""
        kwargs = dict(kwargs)
        return_dict = kwargs.pop("return_dict", None)
        inputs = self._bind(args, kwargs)
        if self.program.positions is not None:
            fill_text_inputs(inputs, self.program.positions, 0, None)
        output = self._build_output(self.run_flat(inputs))
        return output.to_tuple() if return_dict is False else output

    def run_flat(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """The graph's outputs for its inputs by name; no cache unless `past` is among them."""
        if self.program.causal_lm and "past" not in inputs:
            inputs = {**inputs, "past": [None] * len(self._states)}
        inputs = without_idle_masks(inputs, self.program.optional)
        return self._run(self, *self._bind.values(inputs))

    @property
    def graph(self) -> fx.Graph:
        """The graph that the source was generated from."""
        return self.program.graph

    @property
    def source(self) -> str:
        """The generated Python source of all classes."""
        return self._source.text

    @property
    def classes(self) -> Mapping[str, str]:
        """The generated class of each module that has one, by qualified name ("": the model)."""
        return self._source.classes

    @property
    def __signature__(self) -> inspect.Signature:
        return self.program.signature

    @property
    def device(self) -> torch.device:
        first = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        tensors = chain(self.parameters(), self.buffers())
        floating = (t.dtype for t in tensors if t.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def save(self, path: str | Path) -> None:
        """Write a folder that `fxopt.load` reads: graph, tensors, plan, configs and source."""
        from .save import save

        save(self, path)

    def export_onnx(self, path: str | Path, **options: Any) -> Any:
        """Write an ONNX file and compare it with this module; see `emit.onnx.export_onnx`."""
        from .onnx import export_onnx

        return export_onnx(self, path, **options)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Only `OptimizedForCausalLM` generates; here the error says why this model does not."""
        why = self.program.reason or "it is no causal language model"
        raise FxoptError(f"{self.program.name}: the optimised module has no generate: {why}")

    def train(self, mode: bool = True) -> OptimizedModule:
        if mode and not self.training:
            logger.info(
                "%s was captured in evaluation mode: dropout stays off and batch statistics stay "
                "as they are while the optimised module trains",
                self.program.name,
            )
        super().train(mode)
        return self

    def __getitem__(self, index: Any) -> Any:
        """Children of a model that is itself a container, as generated code reads them."""
        if self._container is None:
            raise TypeError(f"{self.program.name} is not a container")
        return list(self._modules.values())[index]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModule:
        before = self.device
        for dtype in {t.dtype for t in chain(self.parameters(), self.buffers())}:
            changed = fn(torch.empty(0, dtype=dtype, device=before))
            if changed.dtype != dtype:
                raise FxoptError(
                    f"{self.program.name}: the optimised module computes in {dtype}, which is "
                    f"part of its code; convert the model to {changed.dtype} and optimise that"
                )
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        if self.device != before and self.report is not None:
            note = f"moved from {before} to {self.device}: not measured there"
            self.report.notes.append(note)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        from .serial import to_text

        state = {name: getattr(self, name) for name in ATTRIBUTES if name != "editor"}
        tensors = self.program.tree.collect(self)
        return _restore, (type(self), to_text(self.program), tensors, state, self.training)


def _restore(
    cls: type[OptimizedModule],
    text: str,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    training: bool,
) -> OptimizedModule:
    """The inverse of `__reduce_ex__`: copies and unpickled modules."""
    from .serial import from_text

    module = cls(from_text(text), tensors)
    for name, value in state.items():
        setattr(module, name, value)
    return module.train(training)


def reserved_names(cls: type[OptimizedModule]) -> frozenset[str]:
    """Names of the root that a child of the original may not be read by."""
    return frozenset({*dir(cls), *ATTRIBUTES, *INTERNAL} - set(dir(nn.Module)))


def module_class(program: Program, config: Any) -> type[OptimizedModule]:
    """The class whose `generate` serves the model; `OptimizedModule` if there is none."""
    if config is None or not find_spec("transformers"):
        return OptimizedModule
    from .pretrained import register

    register()
    if program.causal_lm:
        from .generation import OptimizedForCausalLM

        return OptimizedForCausalLM
    names = program.inputs
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        from .phases import split
        from .seq2seq import OptimizedForSeq2SeqLM

        if split(program) is not None:
            if config.model_type != "whisper":
                return OptimizedForSeq2SeqLM
            from .whisper import whisper_class

            return whisper_class(program)
    return OptimizedModule


def emit(
    captured: CapturedModel,
    editor: GraphEditor,
    model: nn.Module,
    constants: Mapping[str, Any] | None = None,
) -> OptimizedModule:
    """The module of an edited graph over the tensors of `model`.

    `constants` are further arguments that the graph was captured with: a call may repeat them.
    """
    tree, graph = edited_tree(model, captured.graph, editor.graph)
    fuse_norms(graph)
    fuse_residuals(graph)
    fuse_rotary(graph)
    fuse_both(graph)
    fuse_gates(graph)
    fuse_epilogues(graph)
    name = type(model).__name__
    config = getattr(model, "config", None)
    made = program(captured, graph, tree, name, {**captured.constants, **(constants or {})})
    module = module_class(made, config)(made, tree.tensors)
    module.config = config
    module.generation_config = getattr(model, "generation_config", None)
    module.editor = editor
    return module.eval()
