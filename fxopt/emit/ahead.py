"""Sampling with the host one step ahead of the GPU.

Whether all sequences have ended is known on the GPU. `transformers` asks after every token and
waits for the answer, so that the GPU idles while Python prepares the next step. Here the answer to
one step is read when the next one was launched, and the token too many is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fxopt.kernels.kv_attention.layout import parse

from .cache import Cache

# Those that call nobody and remember nothing from one step to the next.
_PLAIN = {
    *("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta"),
    *("RepetitionPenalty", "NoRepeatNGram", "NoBadWords", "SequenceBias", "InfNanRemove"),
    *("MinLength", "MinNewTokensLength", "ForcedBOSToken", "ForcedEOSToken"),
    *("SuppressTokens", "SuppressTokensAtBegin"),
}
PROCESSORS = tuple(
    kind
    for name in _PLAIN
    for ending in ("LogitsWarper", "LogitsProcessor")
    if (kind := getattr(logits_process, name + ending, None)) is not None
)


def runs_ahead(
    device: torch.device,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    config: Any,
    model_kwargs: Mapping[str, Any],
) -> bool:
    """Whether nobody but us would notice one step too many: no code of the caller is called, and
    nothing but tokens returned."""
    own = all(type(p) in PROCESSORS for p in processors)
    known = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in criteria)
    returned = config.return_dict_in_generate or getattr(config, "is_assistant", False)
    cache = model_kwargs.get("past_key_values")
    # when blocks of a cropped cache are packed next is known on the device alone
    cached = isinstance(cache, Cache) and model_kwargs["use_cache"] and not cache.cropped
    return waits(device) and cached and own and known and not returned


def waits(device: torch.device) -> bool:
    """Whether reading a number of the device waits for what was launched before."""
    return device.type == "cuda"


def sample(
    module: Any,
    ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """The tokens that `GenerationMixin._sample` returns, greedy or drawn; the cache and the random
    numbers are left as it leaves them."""
    cache: Cache = model_kwargs["past_key_values"]
    ended, drawn = _Ended(ids.device), _Drawn(ids.device, config.do_sample)
    formats = _formats(cache)
    unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    output = module._prefill(ids, config, model_kwargs, is_first_iteration=True)
    while True:
        model_kwargs = module._update_model_kwargs_for_generation(output, model_kwargs)
        logits = output.logits[:, -1].to(copy=True, dtype=torch.float32)
        del output  # of a prompt it may be large
        tokens = drawn(processors(ids, logits))
        if any(isinstance(c, EosTokenCriteria) for c in criteria):
            tokens = torch.where(unfinished, tokens, config._pad_token_tensor)
        ids = torch.cat([ids, tokens[:, None]], -1)
        unfinished = unfinished & ~criteria(ids, None)
        if ended(~unfinished.any()):
            cache.crop(-1)
            drawn.take_back()
            return ids[:, :-1]
        if criteria.max_length is not None and ids.shape[1] >= criteria.max_length:
            return ids
        length = cache.get_seq_length()
        if any(f.packed(length) < f.packed(length + 1) for f in formats) and ended.now():
            return ids  # a block that is packed cannot be taken back
        inputs = module.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
        output = module(**inputs, return_dict=True)


def _formats(cache: Cache) -> set[Any]:
    found = {
        fmt for layer in cache.layers for _, fmt in parse(layer.layout).resolve(layer.num_kv_heads)
    }
    return found - {None}


class _Ended:
    """Called with whether a step was the last, 0-d on the device: whether the one before was."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._flags = [torch.zeros((), dtype=torch.bool, pin_memory=cuda) for _ in range(2)]
        self._events = [torch.cuda.Event(blocking=True) if cuda else None for _ in range(2)]
        self._steps = 0

    def __call__(self, last: Tensor) -> bool:
        place = self._steps % 2
        self._flags[place].copy_(last, non_blocking=True)
        if event := self._events[place]:
            event.record(torch.cuda.current_stream(last.device))
        self._steps += 1
        return self._steps > 1 and self._read(1 - place)

    def now(self) -> bool:
        """Whether the newest step was the last."""
        return self._read((self._steps - 1) % 2)

    def _read(self, place: int) -> bool:
        if event := self._events[place]:
            event.synchronize()
        return bool(self._flags[place])


class _Drawn:
    """Tokens from scores; `take_back` leaves the random numbers as before the newest ones."""

    def __init__(self, device: torch.device, do_sample: bool) -> None:
        self._generator = torch.default_generator
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index]
        self._sample = do_sample
        self._before: Tensor | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        if not self._sample:
            return scores.argmax(-1)
        self._before = self._generator.get_state()
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1)

    def take_back(self) -> None:
        if self._before is not None:
            self._generator.set_state(self._before)
