"""What a caller may leave out: example inputs from a config, the workload from the budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .decide.calibration import Batch
from .ir.budget import Budget
from .ir.errors import FxoptError
from .ir.workload import LENGTHY, Forward, Generate, Several, Train, Workload

SEQUENCES, LONGEST = 6, 512
"""What is drawn to calibrate with where nobody gave any: two sequences for each part."""


def default_inputs(model: nn.Module, example_inputs: Any, workload: Any = None) -> Any:
    """The example inputs, or random ones that a Hugging Face config describes, as long as the
    workload asks for."""
    if example_inputs is not None:
        return example_inputs
    return _drawn(model, *_asked(workload), seed=0)


def default_calibration(model: nn.Module, workload: Workload) -> Batch:
    """Random sequences as long as those that the workload ends with, up to `LONGEST` tokens."""
    each = [part for _, part in workload.parts] if isinstance(workload, Several) else [workload]
    tokens = max(w.prompt + w.new_tokens if isinstance(w, Generate) else _asked(w)[1] for w in each)
    return _drawn(model, SEQUENCES, min(tokens, LONGEST), seed=1)


def _drawn(model: nn.Module, rows: int, length: int, *, seed: int) -> Batch:
    """`rows` random sequences of at most `length` tokens, or images, as the model's config says."""
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    vocab = getattr(config, "vocab_size", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids" and isinstance(vocab, int):
        longest = getattr(config, "max_position_embeddings", 128) or 128
        shape = (rows, min(length, longest))
        decodes = getattr(config, "is_encoder_decoder", False)
        names = ["input_ids", *(["decoder_input_ids"] if decodes else [])]
        return {n: torch.randint(vocab, shape, generator=generator).to(device) for n in names}
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", 0)
    if name == "input_features" and isinstance(bins, int) and isinstance(vocab, int):
        dtype = next(p.dtype for p in model.parameters())
        features = torch.randn(rows, bins, 2 * frames, generator=generator).to(device, dtype)
        ids = torch.randint(vocab, (rows, 32), generator=generator).to(device)
        return {"input_features": features, "decoder_input_ids": ids}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if name == "pixel_values" and isinstance(size, int):
        pixels = torch.randn(rows, channels, size, size, generator=generator)
        dtype = next(p.dtype for p in model.parameters())
        return {"pixel_values": pixels.to(device, dtype)}
    raise FxoptError(
        f"example_inputs: {type(model).__name__} has no config that says what it takes; "
        "pass a tensor, a tuple or a dict of arguments"
    )


def _asked(workload: Any) -> tuple[int, int]:
    """Rows and tokens of random inputs. Prompts, and batches that no gradient sees, are made of
    any example by repeating it (`decide.runs`)."""
    if isinstance(workload, Train):
        return workload.batch, workload.seq
    length = workload.length if isinstance(workload, Forward) else None
    return 2, length or 128


def default_workload(budget: Budget, example: Batch) -> Workload:
    """`Generate` when the budget speaks of the KV cache, `Train` when only of activations."""
    rows = set(budget.cost_rows)
    batch, length = sizes_of(example)
    if "kv_cache" in rows:
        return Generate(batch=batch, prompt=length or 1, new_tokens=128)
    if rows == {"activations"} and budget.quality is None:
        return Train(batch=batch, seq=length or 1)
    return Forward(batch=batch, length=length)


def sizes_of(example: Batch) -> tuple[int, int | None]:
    """Batch and length of the first tensor; images and videos have no length."""
    first = next((v for v in example.values() if isinstance(v, Tensor)), None)
    shape = (1, 1) if first is None else (*first.shape, 1, 1)
    return shape[0], None if first is not None and first.dim() > LENGTHY else shape[1]
