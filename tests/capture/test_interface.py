"""What transformers' mask functions mean is found by calling them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import masking_utils as masks

from fxopt.capture import capture
from fxopt.capture.interface import _kind


def blocks(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query // 4 == key // 4


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (masks.causal_mask_function, (True, 0)),
        (masks.bidirectional_mask_function, (False, 0)),
        (masks.sliding_window_causal_mask_function(8), (True, 8)),
        (masks.sliding_window_causal_mask_function(64), (True, 64)),
        (masks.sliding_window_causal_mask_function(5000), (True, 5000)),
        # Hugging Face counts the distance on both sides, `attend` the tokens up to it.
        (masks.sliding_window_bidirectional_mask_function(8), (False, 9)),
        (masks.sliding_window_bidirectional_mask_function(4096), (False, 4097)),
        (masks.chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.long)), None),
        (masks.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.long)), None),
        (blocks, None),
    ],
)
def test_kinds(function: Any, kind: tuple[bool, int] | None) -> None:
    assert _kind(function) == kind


def test_masks_that_read_data_are_not_named() -> None:
    packed = masks.packed_sequence_mask_function(torch.randint(2, (1, 64)))
    function = masks.and_masks(masks.causal_mask_function, packed)
    assert _kind(function) is None


def test_sinks_and_softcap_reach_the_call(assert_same: Any) -> None:
    widths = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
    }  # fmt: skip
    # Both drop a part of the attention under sdpa.
    capped = hf.Gemma2ForCausalLM(hf.Gemma2Config(**widths, attn_implementation="eager"))
    sunk = hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **widths, num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager"
        )
    )
    for model, softcap, sinks in ((capped, 50.0, False), (sunk, 0.0, True)):
        captured = capture(model.eval())
        infos = [s.info for s in captured.sites if s.family == "attention"][::2]
        assert [(i.softcap, i.has_sinks) for i in infos] == [(softcap, sinks)] * 2
        assert sorted(i.window for i in infos) == [0, 4]
        assert_same(captured, model, {"input_ids": torch.randint(97, (2, 11))})
