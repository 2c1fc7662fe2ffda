"""Causal language models: one graph, all of Hugging Face `generate`, packed caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from ..ir.errors import FxoptError
from .ahead import runs_ahead, sample
from .binding import fill_text_inputs
from .cache import Cache, usable
from .module import OptimizedModule
from .steps import Steps, replayable

# Tokens beyond the prompt that a cache made by a plain call has room for.
ROOM = 256


class OptimizedForCausalLM(GenerationMixin, OptimizedModule):
    """A rewritten causal language model with `generate`.

    It holds no request state: the cache is made by `generate` with the capacity it needs, by a
    call with `use_cache=True`, or by `make_cache`, and is passed as `past_key_values`. Threads
    that generate at the same time share nothing but the weights.

    On a GPU the decoding steps of a cache are replayed as a CUDA graph, without gradients and
    autocast; `cuda_graphs = False` runs each as it is.
    """

    cuda_graphs = True
    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    hf_quantizer = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits for `input_ids` [batch, length], as the original computes them.

        attention_mask [batch, cached + length], nonzero where a token is no padding. With
        `use_cache=True` or `past_key_values` the result carries the `fxopt.Cache`, to which the
        new tokens were appended. `labels` adds the original's loss.
        """
        if input_ids is None:
            raise TypeError("forward() missing argument 'input_ids', which the graph reads")
        loss_arguments = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        inputs = self._bind((), kwargs)
        inputs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "logits_to_keep": logits_to_keep,
        }
        cache = self._cache_for(past_key_values, use_cache, input_ids, attention_mask)
        start = None if cache is None else cache.start
        past = 0 if cache is None else cache.get_seq_length()
        fill_text_inputs(inputs, self.program.positions, past, start)
        output = self._build_output(self._outputs(inputs, cache))
        if cache is not None:
            cache.advance(input_ids.shape[1])
        found = {"loss": self._loss(output, labels, loss_arguments), "past_key_values": cache}
        found = {name: value for name, value in found.items() if value is not None}
        if found:
            loss = {"loss": found.pop("loss")} if "loss" in found else {}
            output = type(output)(**loss, **dict(output.items()), **found)
        return output.to_tuple() if return_dict is False else output

    def _outputs(self, inputs: dict[str, Any], cache: Cache | None) -> tuple[Any, ...]:
        if cache is None:
            return self.run_flat(inputs)
        if self.cuda_graphs and replayable(inputs["input_ids"], self._states):
            # Lengths are read on the device: as numbers they would be those of the first replay.
            held = {"past": cache.states, "start": cache.start}
            return self._steps(lambda given: self.run_flat({**given, **held}), inputs, cache)
        # With the length, not `start` alone, no layer waits for the device to learn it.
        return self.run_flat(inputs | {"past": cache.states, "start": cache.length})

    @cached_property
    def _steps(self) -> Steps:
        return Steps()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._steps.forget()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._steps.forget()  # `assign=True` brings other tensors
        return super().load_state_dict(*args, **kwargs)

    def make_cache(self, batch: int, capacity: int, *, pool_tokens: int | None = None) -> Cache:
        """An empty cache of `capacity` tokens for `batch` sequences, on the module's device.

        With `pool_tokens` the packed blocks of all sequences lie on pages of one pool, enough for
        so many tokens together, padding not counted; a call that would need more is refused
        before it is made. FxoptError where the plan packs nothing.
        """
        specs = [(s.num_kv_heads, s.head_dim, s.value_dim, s.layout) for s in self._states]
        dtype = self._states[0].dtype
        return Cache.allocate(specs, batch, capacity, dtype, self.device, pool_tokens=pool_tokens)

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def get_input_embeddings(self) -> nn.Module:
        """The module of the original that embeds `input_ids`."""
        return self._module_reading("input_ids")

    def _module_reading(self, name: str) -> nn.Module:
        waiting = [n for n in self.graph.find_nodes(op="placeholder") if n.target == name]
        for node in waiting:
            for user in node.users:
                weight = user.args[0] if user.args else None
                if getattr(weight, "op", "") == "get_attr":
                    owner = str(weight.target).rpartition(".")[0]  # pyright: ignore
                    return self.get_submodule(owner)
                waiting += [user] if weight is node else []  # a view, as GPT-2 takes
        raise FxoptError(f"{self.program.name}: no embedding reads {name}")

    def _cache_for(
        self, cache: Any, use_cache: bool | None, ids: Tensor, mask: Tensor | None
    ) -> Cache | None:
        if cache is None:
            if not use_cache:
                return None
            return self.make_cache(ids.shape[0], ids.shape[1] + ROOM)
        layouts = [state.layout for state in self._states]
        return usable(cache, self.program.name, layouts, ids.shape[1], mask)

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
        if isinstance(cache, Cache):
            cache.reserve(capacity)
            return
        if cache is None and generation_config.use_cache:
            rows = max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs["past_key_values"] = self.make_cache(batch_size * rows, capacity)

    def _sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy and multinomial decoding, on a GPU with Python one step ahead where it may be."""
        given = (logits_processor, stopping_criteria, generation_config)
        alone = not (synced_gpus or streamer)
        if alone and runs_ahead(input_ids.device, *given, model_kwargs):
            return sample(self, input_ids, *given, model_kwargs)
        inherited: Any = super()._sample  # pyright: ignore[reportAttributeAccessIssue]
        return inherited(input_ids, *given, synced_gpus, streamer, **model_kwargs)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The call of `generate` that reads the prompt, or what of it is not in the cache yet:
        `generate` tells by the length of the mask, so that this call still needs it."""
        prefill: Any = super()._prefill  # pyright: ignore[reportAttributeAccessIssue]
        output = prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.all():
            # It only grows by ones: asked once here, no step has to ask or to apply it.
            del model_kwargs["attention_mask"]
        return output

    def _loss(
        self, output: Any, labels: Tensor | None, arguments: Mapping[str, Any]
    ) -> Tensor | None:
        if labels is None:
            return None
        config = self.config.get_text_config()
        return self._loss_function(
            logits=output.logits, labels=labels, vocab_size=config.vocab_size, **arguments
        )

    @cached_property
    def _loss_function(self) -> Callable[..., Tensor]:
        from transformers.loss import loss_utils

        known: dict[str, Any] = loss_utils.LOSS_MAPPING
        kind = getattr(self.config, "loss_type", None) or "ForCausalLM"
        if kind not in known:
            raise FxoptError(
                f"labels: the config asks for the loss {kind!r}, which transformers does not "
                "have; compute the loss from the logits"
            )
        return known[kind]
