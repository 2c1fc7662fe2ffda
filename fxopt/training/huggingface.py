"""Hugging Face masks while a step is traced: what decides them must not be values.

Eager code looks at the values of masks and positions to leave a mask out. Traced, that look is
an error, so it is answered without values: positions that the model counts itself are never
packed, and a mask that the caller gives is applied.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_LOCK = threading.RLock()
_MASKS = "transformers.masking_utils"


@contextmanager
def value_free_masks(inputs: Mapping[str, Any]) -> Generator[None]:
    """Inside, mask construction reads no values; without transformers nothing happens."""
    masks: Any = sys.modules.get(_MASKS)
    if masks is None:
        yield
        return
    with _LOCK:
        tracing, packed = masks.is_tracing, masks.find_packed_sequence_indices
        masks.is_tracing = lambda tensor=None: isinstance(tensor, Tensor) or tracing(tensor)
        if inputs.get("position_ids") is None:
            masks.find_packed_sequence_indices = lambda position_ids: None
        try:
            yield
        finally:
            masks.is_tracing, masks.find_packed_sequence_indices = tracing, packed


def without_idle_mask(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` without an `attention_mask` of ones, which Hugging Face leaves out as well."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and hasattr(model, "config") and bool(mask.all()):
        return {name: value for name, value in inputs.items() if name != "attention_mask"}
    return inputs


def without_cache(
    model: nn.Module, inputs: dict[str, Any], parameters: Collection[str]
) -> dict[str, Any]:
    """`inputs` with `use_cache=False` where the model would return a KV cache unasked."""
    if "use_cache" in parameters and getattr(getattr(model, "config", None), "use_cache", False):
        return {"use_cache": False, **inputs}
    return inputs
