"""Encoder-decoder models: the encoder runs once, `generate` runs the decoder over its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from ..ir.errors import FxoptError
from .cache import Cache, usable
from .generation import ROOM
from .module import OptimizedModule
from .phases import ENCODED, MASK, Parts, Phase, split
from .program import Program

IDS = "decoder_input_ids"


class OptimizedForSeq2SeqLM(GenerationMixin, OptimizedModule):
    """A rewritten encoder-decoder model with `generate`.

    For each prompt the encoder runs once, and so do the projections of its result to the keys and
    values that cross-attention reads: they are stored in the `fxopt.Cache` beside those of the
    generated tokens. Where `program.reason` says that the decoder cannot run in steps there is no
    cache, and each step runs the decoder over all tokens so far.
    """

    base_model_prefix = ""
    _is_stateful = False
    hf_quantizer = None

    def __init__(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(program, tensors)
        parts = split(program)
        assert parts is not None
        self._parts = parts
        self._phases: dict[str, Phase] = {}
        encoder = self._modules.get("encoder")
        if encoder is not None:
            # `generate` asks a child of this name for its input's.
            encoder.__dict__["main_input_name"] = self.main_input_name

    @property
    def main_input_name(self) -> str:
        """The input that the encoder reads."""
        return self.program.inputs[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; with `encoder_outputs` the encoder does not run again.

        With `use_cache=True` or `past_key_values` the result carries the `fxopt.Cache`, to which
        `decoder_input_ids` [batch, new tokens] were appended; what cross-attention reads of the
        encoder is stored by the first such call and taken from the cache by the others.
        decoder_attention_mask [batch, cached + new tokens].
        """
        encoded, cache = kwargs.pop("encoder_outputs", None), kwargs.pop("past_key_values", None)
        use_cache = bool(kwargs.pop("use_cache", None)) and self.parts.step is not None
        if encoded is None and cache is None and not use_cache:
            return super().forward(*args, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        inputs = self._bind(args, kwargs)
        if encoded is None:
            encoded = self.get_encoder()(**inputs)
        inputs[ENCODED] = encoded[0]
        if cache is not None or use_cache:
            output = self._step(inputs, self._cache_for(cache, inputs[IDS], inputs.get(MASK)))
        else:
            output = self._build_output(self.phase("decoder")(inputs))
        return output.to_tuple() if return_dict is False else output

    def _step(self, inputs: dict[str, Any], cache: Cache) -> Any:
        ids, step = inputs[IDS], self.phase("step")
        if not cache.filled:
            cache.fill(self.phase("cross")(inputs), inputs.get("attention_mask"))
        batch, length = ids.shape
        total = cache.get_seq_length() + length
        mask = inputs.get(MASK)
        if mask is not None and mask.shape[1] != total:
            raise FxoptError(
                f"{MASK}: it has {mask.shape[1]} columns, and {total - length} cached plus "
                f"{length} new tokens need {total}"
            )
        if mask is None and step.counts_by_mask:
            inputs[MASK] = ids.new_ones(batch, total)
        inputs["positions"] = torch.arange(length, device=ids.device) + cache.start
        inputs |= {"past": cache.states, "start": cache.length}
        output = self._build_output(step(inputs))
        cache.advance(length)
        return type(output)(**dict(output.items()), past_key_values=cache)

    def make_cache(self, batch: int, capacity: int, *, pool_tokens: int | None = None) -> Cache:
        """An empty cache of `capacity` generated tokens for `batch` sequences, on the module's
        device; what cross-attention reads is stored in it by the first call.

        With `pool_tokens` the packed blocks of what is generated lie on pages of one pool, enough
        for so many tokens of all sequences together. FxoptError where nothing of it is packed.
        """
        if self.parts.step is None:
            raise FxoptError(
                f"{self.program.name}: the optimised module has no cache: {self.program.reason}"
            )
        specs = [(s.num_kv_heads, s.head_dim, s.value_dim, s.layout) for s in self._states]
        cross = [i for i, state in enumerate(self._states) if state.cross]
        dtype = self._states[0].dtype
        return Cache.allocate(
            specs, batch, capacity, dtype, self.device, cross=cross, pool_tokens=pool_tokens
        )

    def _cache_for(self, cache: Any, ids: Tensor, mask: Tensor | None) -> Cache:
        if cache is None:
            return self.make_cache(ids.shape[0], ids.shape[1] + ROOM)
        layouts = [state.layout for state in self._states]
        return usable(cache, self.program.name, layouts, ids.shape[1], mask)

    @property
    def parts(self) -> Parts:
        """The programs that generation runs apart."""
        return self._parts

    def phase(self, name: str) -> Phase:
        """A part by its name in `parts` as generated code of its own, over the same tensors."""
        if name not in self._phases:
            program = getattr(self.parts, name)
            self._phases[name] = Phase(program, self.program.tree.collect(self))
        return self._phases[name]

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate` calls once for each prompt."""
        return Encoder(self.phase("encoder"))

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """The one place where `generate` knows how long the sequences can become."""
        capacity = max_cache_length + 1
        cache = model_kwargs.get("past_key_values")
        if self.parts.step is None:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif isinstance(cache, Cache):
            cache.reserve(capacity)
        elif cache is None and generation_config.use_cache:
            rows = max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs["past_key_values"] = self.make_cache(batch_size * rows, capacity)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedForSeq2SeqLM:
        self._phases = {}
        super()._apply(fn, recurse)
        return self


class Encoder:
    """The encoder phase under the interface that `generate` expects of an encoder."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def forward(self, **kwargs: Any) -> BaseModelOutput:
        (hidden,) = self.phase(kwargs)
        return BaseModelOutput(last_hidden_state=hidden)  # pyright: ignore[reportArgumentType]

    __call__ = forward
