"""An error that calibration could not see is said to be unseen."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxopt
from fxopt.coverage import _sampled, _Walk
from fxopt.ir.ops import attend, attend_as_decoded
from fxopt.kernels.kv_attention.layout import Blocks

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


def walked(prompt: int, *inputs: Tensor, **options: Any) -> dict[tuple[str, int], float]:
    """The share on packed tokens of an attention."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("q", "k", "v", "mask", "bias", "sinks")]
    graph.output(graph.call_function(attend, tuple(nodes), {"scale": 0.3, **options}))
    walk = _Walk(fx.GraphModule(torch.nn.Module(), graph), prompt)
    walk.run_flat([*inputs, *[None] * (6 - len(inputs))])
    return walk.packed


@pytest.mark.parametrize("top", ["", "+t96", "+t128/30"])
def test_packed_shares_are_of_what_decoded_tokens_read(top: str) -> None:
    """Beside decoding through a cache whose values are 1 where it is packed."""
    fmt, length, prompt = Blocks(8, 8, 32, 32, 4), 400, 330
    q, k = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (6, 3))
    mask, sinks = torch.ones(2, length), torch.randn(6, dtype=torch.float64)
    mask[1, :50] = 0
    options: dict[str, Any] = {"window": [0, 0, 64], "sink_tokens": [2], "causal": True}
    layout = f"0,2:{fmt}|1:{fmt}{top}"
    found = walked(prompt, q, k, k, mask, None, sinks, **options, layout=layout)
    expected = torch.zeros(3, dtype=torch.float64)
    sampled = [*_sampled(prompt, length)]
    for row in sampled:
        marks = torch.zeros_like(k)
        marks[:, :, fmt.sink :][:, :, : fmt.packed(row)] = 1
        out = attend_as_decoded(
            *(x[:, :, : row + 1] for x in (q, k, marks)), mask[:, : row + 1], None, sinks,
            prompt=prompt, scale=0.3, **options, layout=layout,
        )  # fmt: skip
        expected += out[:, row, :, 0].unflatten(1, (3, 2)).mean((0, 2)) / len(sampled)
    # keys of 8 bits are nearly what they stand for
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=2e-3)
    assert len(found) == 3
    dense = walked(prompt, q, k, k, mask, None, sinks, **options, layout=str(fmt))
    whole, read = (shares["attend", 1] for shares in (dense, found))
    assert read < whole - 0.05 if top else read == pytest.approx(whole)


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
