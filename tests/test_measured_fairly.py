"""The contract in awkward cases: like is measured with like, and nothing is certified unseen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.compiler import Compiler
from fxopt.decide.again import note_totals
from fxopt.decide.runs import Latency, calls
from fxopt.decide.verify import Timing
from fxopt.ir.errors import FxoptError, PlanError
from fxopt.ir.workload import Generate
from fxopt.request import resolve

transformers = pytest.importorskip("transformers")


def layers(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), *more, nn.Linear(128, 128))


def test_the_original_is_measured_in_evaluation_mode_and_left_in_its_own() -> None:
    model, data = layers(nn.Dropout(0.5)).train(), [torch.randn(4, 128) for _ in range(3)]
    model[2].eval()
    modes: list[bool] = []

    def metric(module: nn.Module) -> float:
        modes.append(module.training)
        return 0.0

    fxopt.optimize(
        model, fxopt.Budget(metric=metric, metric_drop=0.1, weights="60%"), data[0],
        calibration=data, rewrites=["linear.quantized"],
    )  # fmt: skip
    assert modes
    assert not any(modes)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


def test_one_logit_is_a_number_and_not_a_distribution() -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    data = [{"input_ids": torch.randint(61, (1, 12))} for _ in range(3)]
    with pytest.raises(FxoptError, match="no logits of two classes or more"):
        fxopt.optimize(model, fxopt.Budget(kl=0.01, weights="90%"), data[0], calibration=data)
    request = resolve(
        model, fxopt.Budget(weights="90%"), data[0], workload=None, calibration=data, keep=(),
        rewrites=None, at=None, seed=0, time_limit=None,
    )  # fmt: skip
    assert Compiler(request).quality.kind == "relative_error"


def test_a_full_sliding_window_is_decoded_again_and_again() -> None:
    config = transformers.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    work = Generate(batch=1, prompt=48, new_tokens=8)
    _, decode = dict(calls(model, work, {"input_ids": torch.randint(61, (1, 9))})).values()
    for _ in range(3):
        decode()


def test_where_verification_fails_the_model_as_it_is_still_counts() -> None:
    """Outputs of the part that is verified are far larger: what held on the other part fails."""
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).eval()
    with torch.no_grad():
        model[1].bias.fill_(10.0)
    scales = (1e-3, 1e-3, 1e-3, 1e-3, 100.0, 100.0)
    data = [torch.randn(1, 128) * scale for scale in scales]
    opt = fxopt.optimize(
        model, fxopt.Budget(relative_error=1e-3, minimize="memory"), data[0], calibration=data,
        rewrites=["linear.quantized"], time_limit=1.0,
    )  # fmt: skip
    assert all(row.excess <= 0 for row in opt.report.rows if row.limit is not None)
    assert (opt(data[-1]) - model(data[-1])).norm() <= 1e-3 * model(data[-1]).norm()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.q(x)) * torch.sigmoid(self.k(x))


@pytest.fixture(scope="module")
def planned() -> tuple[nn.Module, list[torch.Tensor], fxopt.Plan]:
    torch.manual_seed(2)
    model, data = Pair().eval(), [torch.randn(1, 64, 128) for _ in range(6)]
    rewrites = ["linear.low_rank_shared", "linear.quantized"]
    budget = fxopt.Budget(relative_error=0.9, weights="70%")
    return model, data, fxopt.plan(model, budget, data[0], calibration=data, rewrites=rewrites)


def test_a_linear_that_two_decisions_rewrite_is_named(planned: Any) -> None:
    model, data, plan = planned
    plan = plan.model_copy(deep=True)
    group = next(d for d in plan.decisions if d.members)
    alone = next(d for d in plan.decisions if d.key == "q")
    for decision, rewrite in ((group, "linear.low_rank_shared"), (alone, "linear.quantized")):
        labels = [other.label for other in decision.alternatives if other.rewrite == rewrite]
        if decision.rewrite != rewrite:
            decision.choose(rewrite, labels[0])
    with pytest.raises(PlanError, match=r"needs q as it was, but the decision for .* rewrites it"):
        fxopt.apply(model, plan, example_inputs=data[0], calibration=data)


@pytest.mark.parametrize(("whole", "scale"), [(-1e-4, 1.0), (0.0, 1.0)])
def test_no_measurement_makes_errors_free(planned: Any, whole: float, scale: float) -> None:
    _, _, plan = planned
    plan = plan.model_copy(deep=True)
    plan.error_scale = 1.0
    plan.totals = [
        replace(row, measured=whole) if row.name == "relative_error" else row for row in plan.totals
    ]
    note_totals(plan)
    assert plan.error_scale == scale


class Headed(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.body, self.shift = layers(), nn.Parameter(torch.tensor(shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shift


def test_scores_under_at_belong_to_the_whole_model() -> None:
    data = [torch.randn(2, 128) for _ in range(3)]

    def priors(shift: float) -> list[float]:
        torch.manual_seed(1)
        plan = fxopt.plan(
            Headed(shift).eval(), fxopt.Budget(relative_error=0.5, weights="60%"), data[0],
            calibration=data, rewrites=["linear.quantized"], at="body",
        )  # fmt: skip
        return [d.error or 0.0 for d in plan.rewritten]

    near, far = priors(0.0), priors(1000.0)
    assert near
    assert max(far, default=0.0) < 1e-2 * max(near)


class Segmented(nn.Module):
    """Logits [B, classes, H, W] of the points of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(x).unflatten(-1, (8, 4, 4))}


def test_an_image_s_points_are_told_apart_by_their_classes() -> None:
    model, data = Segmented().eval(), [torch.randn(2, 128) for _ in range(6)]
    opt = fxopt.optimize(
        model, fxopt.Budget(kl=0.05, weights="40%"), data[0], calibration=data,
        rewrites=["linear.quantized"],
    )  # fmt: skip
    rows = {row.name: row for row in opt.report.rows}
    verified = torch.cat(data[4:])
    p, q = (m(verified)["logits"].double().log_softmax(1) for m in (model, opt))
    assert rows["kl"].measured == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
    assert rows["kl"].measured > 0


def test_a_refused_budget_says_what_was_reached_as_people_write_it() -> None:
    data = [torch.randn(4, 128) for _ in range(3)]
    with pytest.raises(fxopt.BudgetError) as caught:
        fxopt.optimize(
            layers().eval(), fxopt.Budget(weights="1%", relative_error=0.5), data[0],
            calibration=data, rewrites=["linear.quantized"],
        )  # fmt: skip
    said = str(caught.value)
    assert "KiB, limit 1.29 KiB; weights goes no lower than " in said
    assert "with these rewrites; the nearest plan is in .best" in said
    assert said.endswith("Loosen weights, or allow more rewrites")


def test_errors_of_inputs_that_nobody_gave_are_called_that() -> None:
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=40)
    given: Any = {
        "workload": None, "calibration": None, "keep": (), "rewrites": None, "at": None,
        "seed": 0, "time_limit": None,
    }  # fmt: skip
    budget = fxopt.Budget(weights="60%")
    request = resolve(transformers.GPT2LMHeadModel(config).eval(), budget, None, **given)
    assert any("drawn at random" in note for note in request.calibration.notes)
    parts = [request.calibration.fit, request.calibration.choose, request.calibration.verify]
    assert [len(part) for part in parts] == [2, 2, 2]
    seen = [tuple(batch["input_ids"].flatten().tolist()) for part in parts for batch in part]
    assert len(set(seen)) == 6
    request = resolve(layers().eval(), budget, torch.randn(4, 128), **given)
    assert not any("drawn at random" in note for note in request.calibration.notes)


def test_a_latency_that_nothing_limits_is_said_beside_the_original_of_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine was four times as busy when the original was timed first."""
    busy = iter([4.0])

    def timed(*_: Any, **__: Any) -> Latency:
        load = next(busy, 1.0)
        return Latency(load * 1.0, load * 0.5, 0.5, {"forward": Timing(load, load * 0.5, 0.5)})

    monkeypatch.setattr("fxopt.measure.measure_latency", timed)
    data = [torch.randn(4, 128) for _ in range(3)]
    opt = fxopt.optimize(
        layers(), fxopt.Budget(relative_error=0.1, weights="60%"), data[0],
        calibration=data, rewrites=["linear.quantized"],
    )  # fmt: skip
    (row,) = [row for row in opt.report.rows if row.name == "latency"]
    assert (row.before, row.measured) == (4.0, 2.0)
    said = "with every site kept the rewritten module takes 2 s at most, the original 4 s"
    assert any(said in note for note in opt.report.notes)


def test_a_site_is_measured_on_more_than_one_sequence() -> None:
    """What only the second brings out is no less an error."""
    data = [torch.randn(8, 128) for _ in range(6)]
    request = resolve(
        layers(), fxopt.Budget(relative_error=0.1), data[0], workload=None, calibration=data,
        keep=(), rewrites=["linear.quantized"], at=None, seed=0, time_limit=None,
    )  # fmt: skip
    compiler = Compiler(request)
    column = next(c for columns in compiler.table().columns for c in columns if c.proposals)
    graph = compiler.realise(column.proposals).graph
    each = [compiler.choose_reference.measure(graph, batches=n).mean for n in (1, 2)]
    assert each[0] != each[1]
    assert compiler.measure_column(column).error == compiler.quality.additive(each[1])


def test_a_bound_over_the_limit_says_what_the_limit_is_of() -> None:
    model, data = layers().eval(), [torch.randn(4, 128) * (1 + i % 3) for i in range(9)]
    opt = fxopt.optimize(
        model, fxopt.Budget(relative_error=0.5, weights="60%"), data[0], calibration=data,
        rewrites=["linear.quantized"],
    )  # fmt: skip

    def bound(report: Any) -> str:
        return next(note for note in report.notes if "with 95% confidence" in note)

    assert bound(opt.report).endswith("sequences")
    mean = next(row.measured for row in opt.report.rows if row.name == "relative_error")
    opt.plan.budget = fxopt.Budget(relative_error=mean * (1 + 1e-6), weights="60%")
    said = bound(fxopt.verify(opt, model, data))
    assert said.endswith("sequences: over the limit, which is one of the mean measured")


def test_a_budget_for_a_model_that_no_rewrite_serves() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with pytest.raises(fxopt.BudgetError) as caught:
        fxopt.optimize(conv, fxopt.Budget(weights="50%"), torch.randn(2, 3, 8, 8))
    said = str(caught.value)
    assert "none of the rewrites serves a site of this model" in said
    assert said.endswith("Loosen weights")
