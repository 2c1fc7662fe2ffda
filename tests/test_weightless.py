"""A model on the meta device is planned by sizes; the plan holds once the weights are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.fingerprint import structure_fingerprint
from fxopt.ir.errors import CaptureError, FxoptError

transformers = pytest.importorskip("transformers")
WORK = fxopt.Generate(batch=2, prompt=512, new_tokens=16)


def llama(layers: int = 2, device: str = "meta") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(device)


@pytest.fixture(scope="module")
def plan() -> fxopt.Plan:
    return fxopt.plan(llama(), fxopt.Budget(weights="55%", kv_cache="75%"), workload=WORK)


def predicted(plan: fxopt.Plan) -> dict[str, Any]:
    return {row.name: row.predicted for row in plan.totals}


def test_rows_hold_as_predicted_and_nothing_is_claimed_of_quality(plan: fxopt.Plan) -> None:
    rows = predicted(plan)
    assert rows["weights"] <= 0.55 * plan.baseline["weights"]
    assert rows["kv_cache"] <= 0.75 * plan.baseline["kv_cache"]
    assert rows.keys() == {"weights", "kv_cache"}
    assert all(row.measured is None for row in plan.totals)
    assert {d.rewrite for d in plan.rewritten} == {"linear.quantized", "kv_cache.blocks"}
    assert not plan.tensors
    assert any("made without weights" in note for note in plan.notes)
    refused = {r.rewrite: r.reason for r in plan.refusals if "o_proj" in r.key}
    assert "depends on the weights" in refused["linear.low_rank"]


def test_it_is_put_on_the_weights_and_takes_what_it_said(plan: fxopt.Plan) -> None:
    model = llama(device="cpu")
    assert plan.fingerprint_structure == structure_fingerprint(capture(model).graph)
    data = [torch.randint(0, 256, (1, 600)) for _ in range(3)]
    opt = fxopt.apply(model, plan, calibration=[{"input_ids": ids} for ids in data])
    rows = {row.name: row.measured for row in fxopt.verify(opt, model, data).rows}
    assert rows["weights"] == predicted(plan)["weights"]
    assert rows["kv_cache"] == pytest.approx(predicted(plan)["kv_cache"], rel=1e-3)
    assert 0 < rows["kl"] < 1e-2


def test_more_room_is_worth_less_rounding(plan: fxopt.Plan) -> None:
    wider = fxopt.solve(plan, fxopt.Budget(weights="90%", kv_cache="100%"))
    errors = [sum(d.error or 0.0 for d in p.decisions if d.rewritten) for p in (wider, plan)]
    assert errors[0] < errors[1]


@pytest.mark.slow
def test_many_equal_layers_are_decided_by_their_number() -> None:
    """Sixteen layers whose sites are all alike: a program without symmetries is solved at once."""
    made = fxopt.plan(llama(16), fxopt.Budget(weights="30%"), workload=WORK)
    wide = [d.label for d in made.decisions if "gate_proj" in d.key]
    assert wide == sorted(wide, key=wide.index)
    assert predicted(made)["weights"] <= 0.3 * made.baseline["weights"]


def test_temporaries_are_predicted_from_the_graph() -> None:
    made = fxopt.plan(llama(), fxopt.Budget(activations="80%"), workload=WORK)
    assert {d.rewrite for d in made.rewritten} == {"activation.chunked"}
    model = llama(device="cpu")
    opt = fxopt.apply(model, made)
    data = [torch.randint(0, 256, (1, 512)) for _ in range(3)]
    (row,) = (r for r in fxopt.verify(opt, model, data).rows if r.name == "activations")
    assert row.measured is not None
    assert row.before is not None
    assert row.measured < row.before
    # workspaces of ops are on neither side of the prediction
    fall = made.baseline["activations"] - predicted(made)["activations"]
    assert row.before - row.measured >= fall / 2 > 0


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(y.transpose(1, 2).flatten(2))


def test_masks_are_understood_and_seconds_predicted_for_the_device_of_the_inputs() -> None:
    x = torch.randn(1, 64, 128)
    bare = Plain().to("meta")
    assert structure_fingerprint(capture(bare, x.to("meta"), weights=False).graph) == (
        structure_fingerprint(capture(Plain(), x).graph)
    )
    made = fxopt.plan(bare, fxopt.Budget(latency="1.5x", weights="50%"), x)
    assert made.hardware["kind"] == "cpu"
    assert made.baseline["latency"] > 0
    assert predicted(made)["latency"] <= 1.5 * made.baseline["latency"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"budget": fxopt.Budget(kl=0.1)}, r"Budget.kl: the model is on the meta device"),
        ({"calibration": [torch.zeros(1, 8)]}, "calibration: the model is on the meta device"),
        ({"at": "model"}, "at='model': the model around it is run"),
        ({"recover": fxopt.Distill()}, "recover: there are no weights to train"),
    ],
)
def test_what_needs_weights_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(FxoptError, match=says):
        fxopt.plan(llama(), **{"budget": fxopt.Budget(weights="50%"), **arguments})


def test_a_module_cannot_be_made_of_shapes() -> None:
    with pytest.raises(CaptureError, match=r"meta device.*fxopt.plan alone needs none"):
        fxopt.optimize(llama(), fxopt.Budget(weights="50%"))
    half = llama(device="cpu")
    half.model.norm.to("meta")
    with pytest.raises(CaptureError, match=r"model.norm.weight is on the meta device"):
        fxopt.plan(half, fxopt.Budget(weights="50%"))
    stray = llama()
    stray.register_buffer("table", torch.zeros(3))
    with pytest.raises(CaptureError, match="table is on cpu, the parameters are on the meta"):
        fxopt.plan(stray, fxopt.Budget(weights="50%"))


def test_a_mixture_is_planned_without_its_experts() -> None:
    """What counts their tokens runs on the host all the same."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=96, moe_intermediate_size=96,
        num_experts=5, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval().to("meta")
    work = fxopt.Generate(batch=2, prompt=128, new_tokens=16)
    plan = fxopt.plan(model, fxopt.Budget(weights="30%"), workload=work)
    experts = {d.key: d for d in plan.rewritten if "experts" in d.key}
    assert {key.rpartition(".")[2] for key in experts} == {"experts#0", "experts#1"}
    assert {d.rewrite for d in experts.values()} == {"linear.quantized_experts"}
    errors = {d.label: d.error for d in experts.values()}
    assert set(errors) == {"int4", "int8"}, "of the widths 64 and 96"
    # rounding normal numbers to 4 and to 8 bits, whatever the number of experts
    assert 3e-3 < errors["int4"] < 2e-2
    assert 1e-5 < errors["int8"] < 1e-4
    assert predicted(plan)["weights"] <= 0.3 * plan.baseline["weights"]
