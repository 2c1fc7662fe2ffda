"""Small encoder-decoder models with random weights, and their caches in given layouts."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import emit

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Keys and values of generated tokens, and of the encoder's.
OWN, CROSS = "k4v2g32r0s0", "0,3:k2v4g32r0s0|1,2:exact"


def make(name, layers=2):
    torch.manual_seed(0)
    if name == "t5":
        config = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=layers,
                          num_heads=4, decoder_start_token_id=0)  # fmt: skip
        return T5ForConditionalGeneration(config).eval()
    each = {"layers": layers, "ffn_dim": 48, "attention_heads": 4}
    sizes = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in each.items()}
    shared = {"vocab_size": 61, "d_model": 32, "decoder_start_token_id": 2, **SPECIAL, **sizes}
    if name == "bart":
        config = BartConfig(max_position_embeddings=256, forced_eos_token_id=None, **shared)
        return BartForConditionalGeneration(config).eval()
    config = WhisperConfig(
        num_mel_bins=8, max_source_positions=80, max_target_positions=64, **shared
    )
    model = WhisperForConditionalGeneration(config).eval()
    known = {
        "no_timestamps_token_id": 50, "is_multilingual": True, "prev_sot_token_id": 49,
        "lang_to_id": {"<|en|>": 45, "<|de|>": 46}, "max_initial_timestamp_index": 5,
        "task_to_id": {"transcribe": 47, "translate": 48}, "max_length": 40,
        "begin_suppress_tokens": [8], "_from_model_config": False,
    }  # fmt: skip
    for option, value in known.items():
        setattr(model.generation_config, option, value)
    return model


def example(model):
    ids = torch.randint(3, 61, (2, 11))
    if isinstance(model, WhisperForConditionalGeneration):
        return {"input_features": torch.randn(2, 8, 160), "decoder_input_ids": ids[:, :7]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": ids[:, :7]}  # fmt: skip


def packed(model, own=OWN, cross=CROSS):
    """The model with its caches stored by these layouts, and the editor that says so."""
    captured = capture(model, example(model))
    editor = GraphEditor(captured)
    with editor.applying("kv_cache.blocks"):
        for site in captured.sites:
            if site.family == "kv_cache" and site.head == 0:
                editor.update(site, layout=cross if site.info.cross else own)
    editor.finish()
    return emit(captured, editor, model), editor


def padded(length=9):
    ids = torch.randint(3, 61, (3, length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return ids * mask, mask
