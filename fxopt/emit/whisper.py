"""Whisper: its own `generate`, with language and task tokens, timestamps and long recordings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from ..ir.errors import FxoptError
from .facts import tensor_facts
from .phases import ENCODED, MASK
from .program import Program
from .seq2seq import OptimizedForSeq2SeqLM

FEATURES = "input_features"


class OptimizedForWhisper(  # pyright: ignore[reportIncompatibleMethodOverride]
    WhisperGenerationMixin, OptimizedForSeq2SeqLM
):
    """A rewritten Whisper model with the `generate` of the original."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(program, tensors)
        # `generate` computes how many frames a position of the encoder stands for.
        stride = program.sizes[FEATURES][-1] // _positions(self.parts.decoder)
        encoder: Any = self.get_submodule("model.encoder")
        encoder.conv1.__dict__["stride"], encoder.conv2.__dict__["stride"] = (1,), (stride,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, which reads no attention_mask in evaluation. A decoder's padding moves
        positions, which is refused."""
        kwargs.pop("attention_mask", None)
        mask = kwargs.get(MASK)
        if mask is not None and not mask.all():
            raise FxoptError(
                f"{MASK}: padded prompts (condition_on_prev_tokens with a batch) number their "
                "tokens apart, which the captured decoder does not; generate one recording a call"
            )
        return super().forward(*args, **kwargs)


def whisper_class(program: Program) -> type[OptimizedForSeq2SeqLM]:
    """The class for a Whisper program: its own `generate` asks for the convolutions by name."""
    convolutions = {"model.encoder.conv1", "model.encoder.conv2"}
    whole = FEATURES in program.sizes and convolutions <= set(program.tree.modules)
    return OptimizedForWhisper if whole else OptimizedForSeq2SeqLM


def _positions(decoder: Program) -> int:
    """How many positions the encoder's result has."""
    nodes = decoder.graph.find_nodes(op="placeholder")
    known = tensor_facts(next(node for node in nodes if node.target == ENCODED))
    assert known is not None
    assert isinstance(known.shape[1], int)
    return known.shape[1]
