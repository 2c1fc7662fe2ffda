"""Steps with logits and without: the choice between them, its plan, and what a caller sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.training import measure
from fxopt.training.module import Inputs
from fxopt.training.search import StepPlan
from fxopt.training.variants import _suffices  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("whole", "without", "logits"),
    [
        ((90, 0.0), (50, 0.0), True),
        ((90, 1.02), (50, 1.0), True),  # within the margin
        ((90, 1.2), (50, 1.0), False),
        ((110, 0.0), (50, 9.0), False),
        ((90, 9.0), (110, 0.0), True),
        ((120, 0.0), (110, 9.0), False),  # neither keeps the limit: the smaller
        ((110, 9.0), (120, 0.0), True),
    ],
)
def test_what_logits_are_given_up_for(
    whole: tuple[int, float], without: tuple[int, float], logits: bool
) -> None:
    first, second = (StepPlan({}, frozenset(), *facts) for facts in (whole, without))
    assert _suffices(first, second, 100.0, 0.05) is logits


Example = tuple[nn.Module, Inputs]


WORK = fxopt.Train(batch=2, seq=96)


def llama() -> Example:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=2048, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(2048, (2, 96))
    return transformers.LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}


def gpt2() -> Example:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=2048, n_positions=128, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(2048, (2, 96))
    labels = ids.clone()
    labels[0, :50] = -100
    return transformers.GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_tight_budget_takes_the_logits(make: Callable[[], Example], tmp_path: Path) -> None:
    model, inputs = make()
    opt = fxopt.optimize(model, fxopt.Budget(activations="60%"), inputs, workload=WORK)
    rows = {row.name: row for row in opt.plan.totals}
    assert opt.report.kept
    assert rows["activations"].predicted == pytest.approx(rows["activations"].measured, rel=0.01)
    decision = opt.plan.find("lm_head.logits")
    assert decision.rewrite == "activation.cut_cross_entropy"
    assert "not stored" in decision.reason
    assert {a.rewrite for a in decision.alternatives} >= {"keep"}
    assert any("lm_head.logits: the step returns None" in note for note in opt.plan.notes)
    assert "activation.cut_cross_entropy" in str(opt.plan)
    output = opt(**inputs)
    assert output.logits is None
    output.loss.backward()

    stored = fxopt.Plan.load(opt.plan.save(tmp_path / "plan.json"))
    again = fxopt.apply(model, stored, example_inputs=inputs)
    assert again.plan.find("lm_head.logits").parameters == decision.parameters
    assert measure.peak(again, inputs) == measure.peak(opt, inputs)
    mine, theirs = measure.outcome(opt, inputs), measure.outcome(again, inputs)
    assert mine.difference(theirs) == ("", 0.0)
    eager = measure.outcome(model, inputs)
    assert eager.outputs - mine.outputs == {"output logits"}
    name, off = eager.without({"output logits"}).difference(mine)
    assert 0 < off < 1e-5, name


def test_logits_are_there_where_no_loss_wants_them() -> None:
    model, inputs = llama()
    opt = fxopt.optimize(
        model, fxopt.Budget(activations="60%"), inputs, workload=WORK,
        rewrites=["activation.cut_cross_entropy"],
    )  # fmt: skip
    short = {name: value[:, :20] for name, value in inputs.items()}
    assert opt(**short).logits is None  # as the first: a smaller batch does not bring them back
    with torch.no_grad():
        assert opt(**inputs).logits.shape == (2, 96, 2048)
    del short["labels"]
    output = opt(**short)
    assert output.logits.shape == (2, 20, 2048)
    output.logits.sum().backward()


def test_a_loose_budget_keeps_bits_and_logits() -> None:
    model, inputs = llama()
    plan = fxopt.plan(model, fxopt.Budget(activations="100%"), inputs, workload=WORK)
    decision = plan.find("lm_head.logits")
    assert not plan.rewritten
    assert "budget holds without it" in decision.reason
    assert decision.cost.temporary_bytes == 2 * 96 * 2048 * 4
    (offer,) = decision.alternatives
    assert (offer.rewrite, offer.label) == ("activation.cut_cross_entropy", "rows64")


def test_keep_and_rewrites_name_it() -> None:
    model, inputs = llama()
    budget = fxopt.Budget(activations="85%")
    kept = fxopt.plan(model, budget, inputs, workload=WORK, keep=["lm_head.logits"])
    assert kept.find("lm_head.logits").locked
    recompute = ["activation.recompute"]
    without = fxopt.plan(model, budget, inputs, workload=WORK, rewrites=recompute)
    for plan in (kept, without):
        assert {d.rewrite for d in plan.rewritten} == {"activation.recompute"}
    alone = fxopt.plan(
        model, budget, inputs, workload=WORK, rewrites=["activation.cut_cross_entropy"],
        keep=["log_softmax", "model.norm.mul"],
    )  # fmt: skip
    assert [d.key for d in alone.rewritten] == ["lm_head.logits"]
    with pytest.raises(fxopt.PlanError, match=r"lm_head.logit.*Did you mean"):
        fxopt.plan(model, budget, inputs, workload=WORK, keep=["lm_head.logit"])


def test_short_steps_and_losses_outside_are_refused_with_reasons() -> None:
    model, inputs = llama()
    short = {name: value[:, :50] for name, value in inputs.items()}
    budget = fxopt.Budget(activations="100%")
    plan = fxopt.plan(model, budget, short, workload=fxopt.Train(2, 50))
    reasons = {r.key: r.reason for r in plan.refusals}
    assert (
        reasons["lm_head.logits"] == "the loss has 100 rows; the smallest chunk, 64, pays from 128"
    )
    del short["labels"]
    plan = fxopt.plan(model, budget, short, workload=fxopt.Train(2, 50))
    reasons = {r.key: r.reason for r in plan.refusals}
    assert "pass labels=" in reasons["lm_head.logits"]
    assert "lm_head.logits" not in {d.key for d in plan.decisions}


class Wide(nn.Module):
    """Enough rows for two chunk sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 300)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(x).tanh()), labels)


def test_smaller_budgets_bring_smaller_peaks_and_chunks() -> None:
    inputs = {"x": torch.randn(600, 4), "labels": torch.randint(300, (600,))}
    peaks: list[float] = []
    chunks: list[Any] = []
    for share in (1.1, 0.9, 0.5, 0.3, 0.2, 0.1):
        budget = fxopt.Budget(activations=f"{share:.0%}")
        plan = fxopt.plan(Wide().train(), budget, inputs, workload=fxopt.Train(600, 4))
        peaks.append({row.name: row for row in plan.totals}["activations"].predicted)
        chunks.append(plan.find("head.logits").parameters.get("chunk"))
    assert peaks == sorted(peaks, reverse=True)
    assert chunks[0] is None
    assert chunks[-1] == 64
    assert peaks[-1] < 0.1 * peaks[0]


def test_rounded_tensors_beside_a_cut_head() -> None:
    """The gradients that wait for the backward are not among them."""
    model, inputs = llama()
    budget = fxopt.Budget(activations="11%", relative_error=0.05)
    wanted = ["activation.cut_cross_entropy", "activation.quantized_saved"]
    opt = fxopt.optimize(model, budget, inputs, workload=WORK, rewrites=wanted)
    chosen = {d.rewrite for d in opt.plan.rewritten}
    assert chosen == set(wanted)
    assert opt.report.kept
    reasons = {r.key: r.reason for r in opt.plan.refusals}
    assert "holds gradients" in reasons["cut_cross_entropy_sum.2"]


@pytest.mark.gpu
def test_on_the_device() -> None:
    """The allocator's statistic has the library's workspaces in it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=50257, max_position_embeddings=1024, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    ids = torch.randint(50257, (4, 1024), device="cuda")
    inputs = {"input_ids": ids, "labels": ids}
    work = fxopt.Train(batch=4, seq=1024)
    opt = fxopt.optimize(model, fxopt.Budget(activations="50%"), inputs, workload=work)
    rows = {row.name: row for row in opt.plan.totals}
    assert opt.plan.find("lm_head.logits").rewritten
    assert rows["activations"].predicted == pytest.approx(rows["activations"].measured, rel=0.1)
    assert opt(**inputs).logits is None


class Peaked(nn.Module):
    """Of 2000 classes 100 are likely, as a trained model's few are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 31), nn.Linear(31, 2000, bias=False)
        with torch.no_grad():
            self.head.weight[:100].normal_(0.0, 0.6)
            self.head.weight[100:].normal_(0.0, 0.02)
            self.head.weight[100:, 0] = -4.0
            self.body.bias[0] = 1.5

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(x)), labels)


FILTERED = ["activation.cut_cross_entropy", "activation.filtered_cross_entropy"]


def peaked_step(error: float, rewrites: list[str] = FILTERED) -> tuple[Example, fxopt.Plan]:
    model = Peaked()
    inputs = {"x": torch.randn(400, 16), "labels": torch.randint(100, (400,))}
    opt: Any = fxopt.optimize(
        model,
        fxopt.Budget(activations="30%", relative_error=error),
        inputs,
        workload=fxopt.Train(batch=400, seq=16),
        rewrites=rewrites,
    )
    mine, eager = measure.outcome(opt, inputs), measure.outcome(model, inputs)
    row = {r.name: r for r in opt.plan.totals}["relative_error"]
    assert row.measured == pytest.approx(eager.gradient_error(mine), abs=1e-6)
    assert eager.difference(mine, gradients=False)[1] < 1e-5  # the loss is exact
    return (model, inputs), opt.plan


def test_small_gradients_are_left_out_where_asked_for_and_allowed(tmp_path: Path) -> None:
    (model, inputs), plan = peaked_step(0.05)
    head = plan.find("head.logits")
    assert head.rewrite == "activation.filtered_cross_entropy"
    assert head.parameters["filter_eps"] == 2.0**-12
    assert "below 0.00024" in head.reason
    assert head.error == pytest.approx(2.0**-6)
    row = {r.name: r for r in plan.totals}["relative_error"]
    assert 1e-5 < row.measured < 0.05
    assert row.predicted == pytest.approx(2.0**-6, rel=0.01)
    assert any("leaves out small gradients" in note for note in plan.notes)
    stored = fxopt.Plan.load(plan.save(tmp_path / "plan.json"))
    again = fxopt.apply(model, stored, example_inputs=inputs)
    assert again.plan.find("head.logits").parameters == head.parameters
    once_more = measure.outcome(model, inputs).gradient_error(measure.outcome(again, inputs))
    assert once_more == pytest.approx(row.measured, rel=1e-3)


def test_small_gradients_stay_where_the_error_row_is_tighter() -> None:
    _, plan = peaked_step(0.01)
    assert plan.find("head.logits").rewrite == "activation.cut_cross_entropy"
    assert not plan.find("head.logits").error


def test_small_gradients_need_a_row_of_their_error() -> None:
    model, inputs = Peaked(), {"x": torch.randn(400, 16), "labels": torch.zeros(400).long()}
    with pytest.raises(fxopt.FxoptError, match=r"filtered_cross_entropy.*relative_error"):
        fxopt.optimize(
            model,
            fxopt.Budget(activations="30%"),
            inputs,
            workload=fxopt.Train(batch=400, seq=16),
            rewrites=FILTERED[1:],
        )
