"""Experts of a mixture, stacked in one weight: one decision a projection."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.compiler import Compiler
from fxopt.decide.recover import recover
from fxopt.decide.shrinkage import intensity, shrunk
from fxopt.ir.rewrite import Refusal
from fxopt.ir.site import ExpertsInfo
from fxopt.kernels.quantized_linear import dequantize
from fxopt.passes.baseline import baseline_calls
from fxopt.passes.linear.quantized_experts import QuantizedExperts
from fxopt.request import resolve

hf = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


def mixtral() -> Any:
    config = hf.MixtralConfig(
        **SIZES, intermediate_size=96, num_local_experts=5, num_experts_per_tok=2
    )
    return hf.MixtralForCausalLM(config).eval()


def qwen() -> Any:
    config = hf.Qwen3MoeConfig(
        **SIZES, intermediate_size=96, moe_intermediate_size=128, num_experts=6,
        num_experts_per_tok=3, decoder_sparse_step=1,
    )  # fmt: skip
    return hf.Qwen3MoeForCausalLM(config).eval()


def text(length: int = 24) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 97, (1, length))}


def compiled(model: nn.Module, *rewrites: str) -> Compiler:
    data = [text() for _ in range(6)]
    request = resolve(
        model, fxopt.Budget(weights="50%"), data[0], workload=None, calibration=data, keep=(),
        rewrites=rewrites or ("linear.quantized_experts",), at=None, seed=0, time_limit=None,
    )  # fmt: skip
    return Compiler(request)


def restored(tensors: Any, parameters: Any) -> Tensor:
    codes = zip(*(tensors[name] for name in ("packed", "scale", "zero")), strict=True)
    each = [dequantize(*one, parameters["bits"], parameters["group_size"]) for one in codes]
    return torch.stack(each)


def experts_of(compiler: Compiler) -> dict[str, Any]:
    return {s.key: s for s in compiler.sites if isinstance(s.info, ExpertsInfo)}


@pytest.mark.parametrize(
    ("build", "sizes"),
    [(mixtral, [(5, 2, 64, 192), (5, 2, 96, 64)]), (qwen, [(6, 3, 64, 256), (6, 3, 128, 64)])],
)
def test_sites(build: Any, sizes: list[tuple[int, ...]]) -> None:
    found = [s.info for s in capture(build()).sites if isinstance(s.info, ExpertsInfo)]
    assert [(i.count, i.chosen, i.in_features, i.out_features) for i in found] == sizes
    assert [i.weight.rpartition(".")[2] for i in found] == ["gate_up_proj", "down_proj"]


def test_statistics_are_of_the_rows_of_all_experts() -> None:
    model = mixtral()
    compiler = compiled(model)
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        for batch in compiler.request.calibration.fit:
            model(**batch)
    x = torch.cat([rows.repeat_interleave(2, 0) for rows, _ in seen]).double()
    recorded = compiler.statistics.at(experts_of(compiler)["model.layers.0.mlp.experts#0"])
    moments = x.T @ x / len(x)
    made = shrunk(moments, intensity(moments, len(x)))
    torch.testing.assert_close(recorded.gram, made, rtol=1e-4, atol=1e-5)
    assert recorded.exact().shape == recorded.gradients.shape
    assert len(recorded.inputs["expert"]) == len(recorded.inputs["x"])
    # every row is a token's, and goes to one of the experts that were chosen for it
    tokens, chosen = torch.cat([t for t, _ in seen]), torch.cat([c for _, c in seen])
    for row, expert in zip(recorded.inputs["x"][:20], recorded.inputs["expert"][:20], strict=True):
        near = (tokens - row).norm(dim=-1).argmin()
        assert expert in chosen[near]


@pytest.mark.parametrize("build", [mixtral, qwen])
def test_the_graph_computes_with_the_codes(build: Any) -> None:
    compiler = compiled(build())
    ids = text(31)
    for key, site in experts_of(compiler).items():
        found = compiler.proposals.by_site["linear", key]
        assert [p.candidate.parameters["bits"] for p in found] in ([8, 4], [8, 4, 4], [8])
        for proposal in found:
            tensors = compiler.preparer(proposal)
            model = copy.deepcopy(compiler.request.model)
            weight = restored(tensors, proposal.candidate.parameters)
            model.get_parameter(site.info.weight).data = weight
            graph = compiler.realise([proposal]).graph
            with torch.no_grad():
                made = compiler.captured.arguments(**ids, logits_to_keep=torch.arange(31))
                torch.testing.assert_close(graph(*made)[0], model(**ids).logits)
            assert site.info.weight not in dict(graph.named_parameters())
            recorded = compiler.statistics.at(site)
            emulated = proposal.rewrite.emulate(
                proposal.match, proposal.candidate, tensors, recorded.inputs
            )
            rows = zip(recorded.inputs["x"], recorded.inputs["expert"], strict=True)
            exact = torch.stack([weight[expert] @ row for row, expert in rows])
            torch.testing.assert_close(emulated, exact, rtol=1e-4, atol=1e-5)


def test_prices_add_up() -> None:
    compiler = compiled(qwen())
    scenario = compiler.scenarios[0]
    for key, site in experts_of(compiler).items():
        (kept,) = baseline_calls(site, scenario)
        info, rows = site.info, 3 * scenario.batch * scenario.queries
        assert kept.weight_bytes == 4 * info.count * info.in_features * info.out_features
        assert kept.flops == 2 * rows * info.in_features * info.out_features
        for proposal in compiler.proposals.by_site["linear", key]:
            (call,) = proposal.rewrite.lower(proposal.match, proposal.candidate, scenario)
            stored = sum(t.nbytes for t in compiler.preparer(proposal).values())
            assert call.weight_bytes == stored
            for one in (kept, call):
                assert one.run is not None
                assert one.run(torch.device("cpu"))().shape == (rows, info.out_features)


@pytest.mark.parametrize("build", [mixtral, qwen])
def test_optimized_generates_and_is_saved(build: Any, tmp_path: Path) -> None:
    model, data = build(), [text() for _ in range(4)]
    opt = fxopt.optimize(
        model, fxopt.Budget(weights="50%"), data[0], calibration=data,
        workload=fxopt.Generate(batch=1, prompt=20, new_tokens=4),
        rewrites=["linear.quantized_experts"],
    )  # fmt: skip
    assert {d.rewrite for d in opt.plan.rewritten} == {"linear.quantized_experts"}
    assert len(opt.plan.rewritten) == 2
    row = next(row for row in opt.report.rows if row.name == "weights")
    assert row.measured == row.predicted
    ids = text(9)["input_ids"]
    with torch.no_grad():
        y, exact = opt(input_ids=ids).logits, model(input_ids=ids).logits
    assert (y - exact).norm() < 0.1 * exact.norm()
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert torch.equal(loaded(input_ids=ids).logits, y)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = opt.generate(input_ids=ids, **how)
    for step in range(9, tokens.shape[1]):
        assert tokens[0, step] == opt(input_ids=tokens[:, :step]).logits[0, -1].argmax()


class Transposed(nn.Module):
    """Weights [experts, in, out], as some models store them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 64, 80) / 8)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, offsets)


def test_weights_that_are_stored_transposed() -> None:
    pytest.importorskip("transformers.integrations.moe")
    x, offsets = torch.randn(12, 64), torch.tensor([5, 5, 12], dtype=torch.int32)
    model = Transposed().eval()
    opt = fxopt.optimize(
        model, fxopt.Budget(weights="30%"), {"x": x, "offsets": offsets},
        calibration=[{"x": torch.randn(12, 64), "offsets": offsets} for _ in range(3)],
        rewrites=["linear.quantized_experts"],
    )  # fmt: skip
    assert len(opt.plan.rewritten) == 1
    with torch.no_grad():
        assert (opt(x, offsets) - model(x, offsets)).norm() < 0.1 * model(x, offsets).norm()


def test_refusals() -> None:
    other = compiled(mixtral(), "linear.quantized").proposals
    ((_, reason),) = other.refused["linear", "model.layers.0.mlp.experts#0"]
    assert reason == (
        "mixture experts: the weights of 5 experts are stacked in "
        "model.layers.0.mlp.experts.gate_up_proj, and no rewrite of this call serves them together"
    )
    site = experts_of(compiled(mixtral()))["model.layers.0.mlp.experts#1"]
    refused = QuantizedExperts(bits=(4,)).match(site)
    assert isinstance(refused, Refusal)
    assert "no group size of (64, 128) divides the 96 input features" in refused.reason


def test_recovery_leaves_them() -> None:
    compiler = compiled(mixtral(), "linear.quantized_experts", "linear.quantized")
    chosen = [found[0] for found in compiler.proposals.by_site.values() if found]
    graph = compiler.captured.graph
    recovery = recover(
        graph, graph, chosen, compiler.request.calibration.fit,
        compiler._run,  # pyright: ignore[reportPrivateUsage]
        compiler.quality, compiler.statistics, compiler.preparer,
    )  # fmt: skip
    assert recovery.errors
    assert not any("experts" in key for key in recovery.errors)
