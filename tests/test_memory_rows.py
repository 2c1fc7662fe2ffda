"""Rows of peaks are served by the solver: large intermediates shrink where the budget asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.decide.verify import peak_live_bytes

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """An MLP sixteen times as wide as the rest: its hidden is the peak."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=96, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (4, 1024), generator=torch.Generator().manual_seed(1))


def optimise(model: nn.Module, ids: torch.Tensor, **rows: str) -> fxopt.OptimizedModule:
    return fxopt.optimize(
        model,
        fxopt.Budget(**rows),
        {"input_ids": ids[:1]},
        workload=fxopt.Forward(batch=1, length=1024),
        calibration=[{"input_ids": row[None]} for row in ids],
        rewrites=["activation.chunked"],
    )


def chunks(opt: fxopt.OptimizedModule) -> list[int]:
    return [d.parameters["chunk"] for d in opt.plan.decisions if d.rewrite == "activation.chunked"]


def test_activations_are_served_by_chunks(llama: nn.Module, ids: torch.Tensor) -> None:
    opt = optimise(llama, ids, activations="45%")
    assert len(chunks(opt)) == 3
    with torch.no_grad():
        before = peak_live_bytes(lambda: llama(ids[:1]), ids.device)
        after = peak_live_bytes(lambda: opt(ids[:1]), ids.device)
        torch.testing.assert_close(opt(ids[:1]).logits, llama(ids[:1]).logits)
    assert after <= 0.45 * before
    row = next(row for row in opt.report.rows if row.name == "activations")
    assert row.predicted is not None
    assert row.predicted == pytest.approx(after, rel=0.1)


def test_memory_counts_the_weights_beside_the_peak(llama: nn.Module, ids: torch.Tensor) -> None:
    weights = sum(p.nbytes for p in llama.parameters())
    opt = optimise(llama, ids, memory="55%")
    row = next(row for row in opt.report.rows if row.name == "memory")
    with torch.no_grad():
        peak = peak_live_bytes(lambda: opt(ids[:1]), ids.device)
    assert row.measured == pytest.approx(weights + peak, rel=0.02)
    assert chunks(opt)


@pytest.mark.slow
def test_what_no_chunk_can_serve_is_refused_by_name(llama: nn.Module, ids: torch.Tensor) -> None:
    with pytest.raises(fxopt.BudgetError, match="activations measured") as caught:
        optimise(llama, ids, activations="2%")
    assert caught.value.binding == "activations"


def test_a_cache_without_a_limit_is_compared_with_itself(
    llama: nn.Module, ids: torch.Tensor
) -> None:
    opt = fxopt.optimize(
        llama,
        fxopt.Budget(weights="100%"),
        {"input_ids": ids[:1]},
        workload=fxopt.Generate(batch=1, prompt=64, new_tokens=8),
        calibration=[{"input_ids": row[None, :80]} for row in ids],
        rewrites=["linear.quantized"],
    )
    row = next(row for row in opt.report.rows if row.name == "kv_cache")
    # float32: twice what a ratio of 16-bit K and V would refer to
    assert row.before == row.measured == 3 * 2 * 72 * 32 * 4
