"""Hugging Face models compute attention through one op of ours while they are captured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

NAME = "fxopt"
# Registries and configs are global to the process.
LOCK = threading.RLock()

_library = torch.library.Library("fxopt_capture", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sinks, "
    "float scale, bool causal, int window, float softcap) -> Tensor"
)
_library.define("padding(Tensor mask) -> Tensor")
TRACED: Any = torch.ops.fxopt_capture.attention.default
PADDING: Any = torch.ops.fxopt_capture.padding.default


@torch.library.register_fake("fxopt_capture::attention", lib=_library)
def _traced_shape(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.register_fake("fxopt_capture::padding", lib=_library)
def _padding_shape(mask: Tensor) -> Tensor:
    return torch.empty_like(mask)


def _copy(mask: Tensor) -> Tensor:
    return mask.clone()


_library.impl("padding", _copy, "CompositeExplicitAutograd")


@dataclass(frozen=True)
class _Mask:
    """What a mask made by the mask function means; `tensor` keeps its id from being reused."""

    tensor: Tensor
    causal: bool
    window: int
    padded: bool


class _Recorder:
    """The pair of functions that transformers calls while a model is captured."""

    def __init__(self) -> None:
        self.masks: dict[int, _Mask] = {}

    def mask(self, **kwargs: Any) -> Tensor | None:
        """Returns the 2-D padding mask and remembers the rest; a general mask stays 4-D."""
        kind = _kind(kwargs["mask_function"])
        if kind is None:
            from transformers.masking_utils import sdpa_mask

            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return sdpa_mask(**kwargs)
        padding = kwargs.get("attention_mask")
        if padding is None:
            shape = (kwargs["batch_size"], kwargs["kv_length"])
            padding = torch.ones(shape, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        # A new tensor: masks of different kinds may share their padding.
        tensor = PADDING(padding)
        self.masks[id(tensor)] = _Mask(
            tensor, *kind, padded=kwargs.get("attention_mask") is not None
        )
        return tensor

    def attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window, mask, bias = sliding_window or 0, None, position_bias
        if attention_mask is not None:
            known = self.masks.get(id(attention_mask))
            if known is not None:
                causal, window = known.causal, known.window
                mask = attention_mask if known.padded else None
            elif attention_mask.dim() == 2:
                mask = attention_mask
            else:
                causal, window = False, 0
                bias = _as_bias(attention_mask, q.dtype, position_bias)
        scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = TRACED(q, k, v, mask, bias, s_aux, scale, bool(causal), window, softcap or 0.0)
        return out, None


def _as_bias(mask: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        mask = torch.where(mask, zero, float("-inf"))
    return mask if bias is None else mask + bias


def _kind(mask_function: Callable[..., Any]) -> tuple[bool, int] | None:
    """(causal, window) of a mask function, found by calling it; None for any other mask."""
    size = 64
    with _disable_current_modes():
        query, key = torch.arange(size)[:, None], torch.arange(size)[None, :]
        zero = torch.zeros((), dtype=torch.long)
        try:
            seen = mask_function(zero, zero, query, key).expand(size, size)
        except Exception:  # It reads a tensor of the traced model: it depends on data.
            return None
        if not isinstance(seen, torch.Tensor) or type(seen) is not Tensor:
            return None
        return _named(mask_function, seen)


def _named(mask_function: Callable[..., Any], seen: Tensor) -> tuple[bool, int] | None:
    size = seen.shape[0]
    distance = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    for causal in (True, False):
        base = distance >= 0 if causal else torch.ones_like(seen)
        if torch.equal(seen, base):
            window = _far_window(mask_function, causal)
            return None if window is None else (causal, window)
        reach = int(distance[seen].max()) + 1 if seen.any() else 0
        if reach > 0 and torch.equal(seen, base & (distance.abs() < reach)):
            return causal, reach
    return None


def _far_window(mask_function: Callable[..., Any], causal: bool) -> int | None:
    """The window of a mask that hides nothing nearby: 0 when there is none, None if unclear."""
    far = 1 << 40
    zero = torch.zeros((), dtype=torch.long)

    def sees(distance: int) -> bool:
        query = torch.tensor(far)
        near = bool(mask_function(zero, zero, query, query - distance))
        return near and (causal or bool(mask_function(zero, zero, query - distance, query)))

    if sees(far):
        return 0
    low, high = 1, far
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sees(middle) else (low, middle)
    # Masks that are no window may hide something near and show something far.
    return high if high >= 64 and not sees(high + 1) else None


@contextmanager
def semantic_attention(model: nn.Module) -> Generator[None, None, None]:
    """While inside, all attention of `model` that transformers dispatches calls our op.

    Registrations and every config in the module tree are as before afterwards, whatever happens.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    recorder = _Recorder()
    with LOCK, ExitStack() as stack:
        for interface, function in (
            (AttentionInterface, recorder.attention),
            (AttentionMaskInterface, recorder.mask),
        ):
            registered = interface._global_mapping  # pyright: ignore[reportPrivateUsage]
            stack.callback(_restore, registered, registered.get(NAME))
            interface.register(NAME, function)
        for config in configs_of(model):
            stack.callback(
                setattr, config, "_attn_implementation_internal", config._attn_implementation
            )
            config._attn_implementation_internal = NAME
        yield


def _restore(mapping: dict[str, Any], previous: Any) -> None:
    if previous is None:
        mapping.pop(NAME, None)
    else:
        mapping[NAME] = previous


def configs_of(model: nn.Module) -> list[Any]:
    """Every config object in the tree, each once: some models copy theirs for their parts."""
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())
