"""An error that calibration could not see is said to be unseen."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import fx

import fxopt
from fxopt.coverage import _Walk
from fxopt.ir.ops import attend

hf = pytest.importorskip("transformers")


def llama() -> Any:
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


def optimised(length: int) -> Any:
    data = [{"input_ids": torch.randint(1, 97, (1, length))} for _ in range(4)]
    return fxopt.optimize(
        llama(),
        fxopt.Budget(kl=0.5, kv_cache="120%"),
        data[0],
        workload=fxopt.Generate(batch=1, prompt=400, new_tokens=100),
        calibration=data,
        rewrites=["kv_cache.blocks"],
    )


@pytest.mark.slow
def test_short_calibration_is_no_proof_of_a_packed_cache(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "fxopt"):
        opt = optimised(48)
    assert opt.plan.rewritten
    (said,) = (note for note in opt.report.notes if "packed tokens" in note)
    assert said.startswith("calibration: 0.0% of the attention")
    assert "at most 48 tokens" in said
    assert said in caplog.messages


@pytest.mark.slow
def test_the_share_of_attention_on_packed_tokens_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fxopt"):
        opt = optimised(420)
    (said,) = (note for note in opt.report.notes if "packed tokens" in note)
    share = float(said.removeprefix("kv_cache: ").partition("%")[0]) / 100
    # with random weights attention is nearly even: half to nearly all of the past is packed
    assert 0.4 < share < 0.95
    assert not [m for m in caplog.messages if "packed tokens" in m]


@pytest.mark.slow
def test_short_calibration_is_no_proof_of_kept_tiles() -> None:
    data = [{"input_ids": torch.randint(1, 97, (1, 48))} for _ in range(4)]
    model = llama()
    model.config.max_position_embeddings = 4096
    opt = fxopt.optimize(
        model,
        fxopt.Budget(kl=0.5),
        data[0],
        workload=fxopt.Generate(batch=1, prompt=3400, new_tokens=2),
        calibration=data,
        rewrites=["attention.block_topk"],
    )
    heads = len(opt.plan.rewritten)
    assert heads
    said = f"calibration: {heads} of {heads} heads with a window or a share of tiles were measured"
    assert any(note.startswith(said) for note in opt.report.notes)


@pytest.mark.parametrize("layout", ["exact+t96", "k4v4g32r8s4+t64"])
def test_calibration_that_leaves_no_tile_out_is_noticed(layout: str) -> None:
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    graph.output(graph.call_function(attend, tuple(inputs), {"scale": 0.3, "layout": layout}))
    module = fx.GraphModule(torch.nn.Module(), graph)
    for length, left in ((100, False), (300, True)):
        walk = _Walk(module, length - 20)
        walk.run_flat([torch.randn(1, heads, length, 8) for heads in (4, 2, 2)])
        assert list(walk.left.values()) == [left, left]


def test_calibration_that_a_corrected_window_hides_nothing_of_is_noticed() -> None:
    """The last rows of a prompt see all keys then; the other head has the window alone."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    options = {"scale": 0.3, "causal": True, "window": (256,), "sink_tokens": (16,)}
    options["delta"] = (300, 300, 0, 0)
    graph.output(graph.call_function(attend, tuple(inputs), options))
    module = fx.GraphModule(torch.nn.Module(), graph)
    for length, left in ((270, [False, False]), (500, [False, True]), (520, [True, True])):
        walk = _Walk(module, 0)
        walk.run_flat([torch.randn(1, heads, length, 8) for heads in (4, 2, 2)])
        assert list(walk.left.values()) == left


def test_p99_is_reported() -> None:
    assert any(note.startswith("kl: 99% of ") for note in optimised(220).report.notes)
