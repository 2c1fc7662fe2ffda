"""Hugging Face encoders, vision models and encoder-decoder models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from fxopt.capture import Captured, capture
from fxopt.ir.site import GroupInfo, LinearInfo

WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**WIDTHS, "vocab_size": 97}
CLIP_TEXT: dict[str, Any] = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
VISION: dict[str, Any] = {**WIDTHS, "image_size": 16, "patch_size": 4}
WHISPER: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "vocab_size": 97, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
Inputs = dict[str, Tensor]


def text(batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(3, 97, (batch, length))}


def image(batch: int, _: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


def both(batch: int, length: int) -> Inputs:
    return {**text(batch, length), **image(batch + 1, length)}


def translation(batch: int, length: int) -> Inputs:
    return {**text(batch, length), "decoder_input_ids": text(batch, length + 2)["input_ids"]}


def speech(batch: int, length: int) -> Inputs:
    ids = text(batch, length)["input_ids"]
    return {"input_features": torch.randn(batch, 8, 40), "decoder_input_ids": ids}


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    attentions: int
    linears: int
    tied: int = 0
    causal: int = 0
    cross: int = 0
    bias: int = 0


CASES = {
    "bert": Case(lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), text, 2, 14, tied=1),
    "roberta": Case(
        lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(**TEXT, max_position_embeddings=66)
        ),
        text, 2, 14,
    ),
    "vit": Case(lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), image, 2, 14),
    "clip": Case(
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION)),
        both, 4, 27, causal=2,
    ),
    "clip_text": Case(
        lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)), text, 2, 12, causal=2
    ),
    "clip_vision": Case(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), image, 2, 13),
    "t5": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=97)
        ),
        translation, 6, 33, tied=1, causal=2, cross=2, bias=4,
    ),
    "whisper": Case(
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        speech, 6, 33, tied=1, causal=2, cross=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    case: Case
    model: nn.Module
    captured: Captured


@pytest.fixture(scope="module", params=list(CASES))
def trial(request: pytest.FixtureRequest) -> Trial:
    torch.manual_seed(0)
    case = CASES[request.param]
    model = case.build().eval()
    return Trial(case, model, capture(model))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 40), (2, 7)])
def test_equals_the_model(trial: Trial, assert_same: Any, batch: int, length: int) -> None:
    inputs = trial.case.inputs(batch, length)
    assert_same(trial.captured, trial.model, inputs)


def test_padding_is_respected(trial: Trial, assert_same: Any) -> None:
    inputs = trial.case.inputs(3, 17)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, 12:], mask[1, 3:] = 0, 0
    name = {"input_ids": "attention_mask", "input_features": "decoder_attention_mask"}
    masks = {name[given]: mask for given in inputs if given in name}
    assert set(masks) <= set(trial.captured.inputs)
    assert_same(trial.captured, trial.model, {**inputs, **masks}, seen=mask.bool())


def test_sites(trial: Trial) -> None:
    case, sites = trial.case, trial.captured.sites
    count = Counter(site.family for site in sites)
    assert count["attention"] == 4 * case.attentions
    steps = trial.captured.encoder_decoder
    assert count["kv_cache"] == 4 * (case.causal + case.cross) * steps
    linears = [s for s in sites if isinstance(s.info, LinearInfo)]
    tied = [s for s in sites if isinstance(s.info, GroupInfo) and s.info.kind == "tied"]
    assert len(linears) + len(tied) == case.linears
    assert len(tied) == case.tied
    assert all(s.blocked is None for s in (*linears, *tied))
    attention = [s.info for s in sites if s.family == "attention"][::4]
    assert sum(info.causal for info in attention) == case.causal
    assert sum(info.cross for info in attention) == case.cross
    assert sum(info.has_bias for info in attention) == case.bias


def test_decoders_run_in_steps_with_a_cache(trial: Trial) -> None:
    captured = trial.captured
    assert captured.encoder_decoder == trial.model.config.is_encoder_decoder
    assert not captured.causal_lm
    assert captured.reason is None
    cached = [s.info.cached for s in captured.sites if s.family == "attention"]
    kinds = [n.meta.get("cache") for n in captured.attentions]
    assert sum(cached) == 4 * sum(kind is not None for kind in kinds)
    if captured.encoder_decoder:
        assert kinds == [None, None, "self", "cross", "self", "cross"]
        assert captured.source == (20 if "input_features" in captured.inputs else None)


def test_sites_know_on_which_side_they_are(trial: Trial) -> None:
    linears = [s for s in trial.captured.sites if isinstance(s.info, LinearInfo)]
    sides = {s.key: s.side for s in linears}
    once = {key for key, side in sides.items() if side == "encoder"}
    kv = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
    if trial.captured.encoder_decoder:
        assert once == {k for k in sides if k.startswith(("encoder.", "model.encoder.")) or
                        k.endswith(kv)}  # fmt: skip
        assert len(once) == 16
    else:
        assert not once


def test_a_forward_alone_has_no_cache() -> None:
    model = CASES["t5"].build().eval()
    captured = capture(model, CASES["t5"].inputs(2, 9), generate=False)
    assert not captured.encoder_decoder
    assert not any(site.family == "kv_cache" for site in captured.sites)


def test_image_sizes_are_reported_as_fixed() -> None:
    model = hf.ViTModel(hf.ViTConfig(**VISION)).eval()
    captured = capture(model, {"pixel_values": torch.randn(1, 3, 16, 16)})
    assert captured.static_dims == (
        "pixel_values dim 1 = 3",
        "pixel_values dim 2 = 16",
        "pixel_values dim 3 = 16",
    )
