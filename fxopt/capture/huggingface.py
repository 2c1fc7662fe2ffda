"""How Hugging Face models are called for the trace."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import CaptureError
from .request import Request, bind

# Distinct, at least 2, so that export neither fixes nor equates them.
BATCH, LENGTH, TOTAL, KEEP = 2, 11, 13, 3
CAUSAL_INPUTS = ("input_ids", "position_ids", "attention_mask", "logits_to_keep")
# Arguments of a text model's forward that the graph for generation accounts for.
SERVED = {*CAUSAL_INPUTS, "past_key_values", "use_cache", "return_dict"}


def is_huggingface(model: nn.Module) -> bool:
    """Whether the model is a transformers model (which then is imported already)."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def generates(model: nn.Module) -> bool:
    """Whether Hugging Face `generate` works on the model."""
    return is_huggingface(model) and bool(model.can_generate())  # pyright: ignore


def requests_for(
    model: Any, signature: inspect.Signature, example: Any, *, decoder: bool = True
) -> list[Request]:
    """The calls to trace, best first; the next is for when tracing one fails.

    With `decoder` the first is one graph for prefill and decoding, if the forward allows it; the
    last keeps the model's own attention, for models that do not use transformers' interface.
    """
    given = {} if example is None else _given(signature, example, type(model).__name__)
    reason: str | None = None
    requests: list[Request] = []
    weights = bool(given.get("output_attentions", model.config.output_attentions))
    if decoder and generates(model):
        reason = _not_causal(model, signature, given)
        if weights:
            reason = "output_attentions asks for attention weights, which no cheaper way computes"
        if reason is None:
            requests.append(_causal_request(model, signature))
            reason = "its attention does not go through transformers' attention interface"
    kwargs = given or _made_up(model, signature)
    _add_masks(kwargs, signature)
    if "use_cache" in signature.parameters:
        kwargs["use_cache"] = False
    for interface in (False,) if weights else (True, False):
        requests.append(Request(dict(kwargs), (), _roles(kwargs), interface, reason=reason))
    return requests


def _given(signature: inspect.Signature, example: Any, owner: str) -> dict[str, Any]:
    kwargs = bind(signature, example, owner).kwargs
    return {
        name: value
        for name, value in kwargs.items()
        if value is not None and name not in ("past_key_values", "use_cache")
    }


def _not_causal(model: Any, signature: inspect.Signature, given: dict[str, Any]) -> str | None:
    """Why one graph cannot serve prefill and decoding, or None if it may."""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder model: its forward is captured as a whole, without a cache"
    lacking = [n for n in ("input_ids", "position_ids", "attention_mask") if n not in
               signature.parameters]  # fmt: skip
    if lacking:
        return f"its forward has no argument {', '.join(lacking)}"
    others = [n for n, value in given.items() if n not in SERVED and isinstance(value, Tensor)]
    if others:
        return f"example_inputs give {', '.join(others)}, which decoding does not pass on"
    return None


def _causal_request(model: Any, signature: inspect.Signature) -> Request:
    device = next(model.parameters()).device
    kwargs: dict[str, Any] = {
        "input_ids": _tokens(model, (BATCH, LENGTH), device),
        "position_ids": torch.arange(LENGTH, device=device).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, TOTAL, dtype=torch.long, device=device),
    }
    roles: dict[str, tuple[str, ...]] = {
        "input_ids": ("batch", "length"),
        "position_ids": ("batch", "length"),
        "attention_mask": ("batch", "total"),
    }
    if "logits_to_keep" in signature.parameters:
        kwargs["logits_to_keep"] = torch.arange(KEEP, device=device)
        roles["logits_to_keep"] = ("keep",)
    if "use_cache" in signature.parameters:
        kwargs["use_cache"] = False
    return Request(kwargs, (), roles, interface=True, decoder=True)


def _tokens(model: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, shape, generator=generator).to(device)


def _made_up(model: Any, signature: inspect.Signature) -> dict[str, Any]:
    """Inputs from the config alone, for a call without example_inputs."""
    config, takes = model.config, signature.parameters
    first = next(model.parameters())
    made: dict[str, Any] = {}
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in takes and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (BATCH + 1, getattr(vision, "num_channels", 3), height, width)
        made["pixel_values"] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    elif "input_features" in takes and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        shape = (BATCH, config.num_mel_bins, frames)
        made["input_features"] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = {name: value.to(first.device, first.dtype) for name, value in made.items()}
    text = config.get_text_config()
    if "input_ids" in takes and hasattr(text, "vocab_size"):
        made["input_ids"] = _tokens(model, (BATCH, LENGTH), first.device)
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = _tokens(model, (BATCH, LENGTH - 4), first.device)
    if not made:
        raise CaptureError(
            f"fxopt cannot make inputs for {type(model).__name__}: its forward takes "
            f"{', '.join(takes)}. Give example_inputs."
        )
    return made


def _add_masks(kwargs: dict[str, Any], signature: inspect.Signature) -> None:
    """A graph traced with a padding mask also runs without one; the reverse does not hold."""
    pairs = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
    for ids, mask in pairs.items():
        tokens = kwargs.get(ids)
        if tokens is not None and mask in signature.parameters and mask not in kwargs:
            kwargs[mask] = torch.ones_like(tokens)


def _roles(kwargs: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    texts = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    return {
        name: ("batch", "length", "")[: value.dim()] if name in texts else ("batch",)
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.dim()
    }
