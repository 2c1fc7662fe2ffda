"""Arguments that `optimize` cannot take: one error, before anything runs, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.inputs import LONGEST, SEQUENCES, default_calibration, default_inputs
from fxopt.ir.errors import FxoptError
from fxopt.ir.workload import Several
from fxopt.request import resolve

hf = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96)).eval()


@pytest.fixture
def data() -> list[torch.Tensor]:
    return [torch.randn(1, 20, 96) for _ in range(6)]


BUDGET = fxopt.Budget(relative_error=0.1, weights="60%")


def wrapped(model: nn.Module) -> list[tuple[Any, str]]:
    return [
        (lambda x: x, "takes a torch.nn.Module, not function"),
        (torch.compile(model), r"pass model\._orig_mod"),
        (nn.DataParallel(model), r"pass model\.module"),
        (torch.jit.script(model), "ScriptModule"),
    ]


@pytest.mark.parametrize("which", range(4))
def test_what_is_no_plain_module(model: nn.Module, data: list[torch.Tensor], which: int) -> None:
    given, says = wrapped(model)[which]
    with pytest.raises(FxoptError, match=says):
        fxopt.optimize(given, BUDGET, data[0], calibration=data)


def test_what_was_optimised_already(model: nn.Module, data: list[torch.Tensor]) -> None:
    opt = fxopt.optimize(model, BUDGET, data[0], calibration=data)
    with pytest.raises(FxoptError, match="optimise the original"):
        fxopt.optimize(opt, BUDGET, data[0], calibration=data)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"budget": {"kl": 0.02}}, r"budget: takes fxopt\.Budget"),
        ({"workload": "generate"}, r"workload: takes fxopt\.Forward"),
        ({"workload": [fxopt.Forward()]}, r"workload: takes fxopt\.Forward"),
        ({"recover": "lora"}, "recover"),
        ({"calibration": []}, "calibration: it is empty"),
        ({"calibration": "heldout.txt"}, "calibration: takes an iterable"),
        ({"calibration": 7}, "calibration: takes an iterable"),
        ({"calibration": [torch.randn(1, 0, 96)]}, "sequence 0, argument 'input' is empty"),
        ({"calibration": [torch.zeros(1, 20, 96).long()]}, "dtype torch.int64"),
        ({"calibration": [torch.randn(20, 96)]}, "2 dimensions, where example_inputs has 3"),
        ({"calibration": [torch.randn(1, 20, 96, device="meta")]}, "meta device"),
        ({"calibration": [{"inputs": torch.randn(1, 20, 96)}]}, "Did you mean 'input'"),
        ({"calibration": ["text"]}, "is str 'text', where example_inputs has a tensor"),
        ({"calibration": [torch.full((1, 20, 96), float("nan"))]}, "NaN"),
        ({"budget": fxopt.Budget(latency={"decode": "0.5x"}, kl=1.0)}, "makes no call 'decode'"),
        ({"budget": fxopt.Budget(kv_cache="50%")}, r"no KV cache"),
    ],
)
def test_one_error_says_what_and_where(
    model: nn.Module, data: list[torch.Tensor], arguments: dict[str, Any], says: str
) -> None:
    given: dict[str, Any] = {"budget": BUDGET, "calibration": data, **arguments}
    with pytest.raises(FxoptError, match=says):
        fxopt.optimize(model, given.pop("budget"), data[0], **given)


def test_a_share_of_no_parameters_and_of_no_cache(data: list[torch.Tensor]) -> None:
    with pytest.raises(FxoptError, match="weights: 50% of nothing: the model has no parameters"):
        fxopt.optimize(nn.ReLU(), fxopt.Budget(weights="50%"), data[0], calibration=data)
    llama = tiny_llama()
    ids = torch.randint(1, 97, (1, 16))
    with pytest.raises(FxoptError, match=r"kv_cache: 50% of nothing.*workload=fxopt\.Generate"):
        fxopt.optimize(
            llama, fxopt.Budget(kv_cache="50%"), {"input_ids": ids}, workload=fxopt.Forward()
        )


def test_tokens_that_are_no_integers_are_named() -> None:
    ids = torch.ones(1, 16)
    with pytest.raises(FxoptError, match=r"input_ids holds tokens.*: pass input_ids\.long\(\)"):
        fxopt.plan(tiny_llama(), fxopt.Budget(weights="50%"), {"input_ids": ids})


def test_a_plan_may_be_named_by_its_file(
    model: nn.Module, data: list[torch.Tensor], tmp_path: Path
) -> None:
    plan = fxopt.plan(model, BUDGET, data[0], calibration=data, rewrites=["linear.quantized"])
    path = plan.save(tmp_path / "plan.json")
    assert fxopt.apply(model, str(path), example_inputs=data[0]).plan == plan
    assert fxopt.solve(path) == fxopt.solve(plan)
    for call in (lambda: fxopt.solve(3), lambda: fxopt.apply(model, 3)):  # pyright: ignore
        with pytest.raises(FxoptError, match=r"plan: takes fxopt\.Plan or the path of"):
            call()


def test_one_tensor_is_a_batch_of_sequences_and_one_text_a_name(model: nn.Module) -> None:
    made = fxopt.plan(
        model, fxopt.Budget(weights="80%"), torch.randn(1, 20, 96),
        calibration=torch.randn(6, 20, 96), rewrites="linear.quantized", keep="0",
    )  # fmt: skip
    assert {d.rewrite for d in made.rewritten} == {"linear.quantized"}
    assert not made.find("0", "linear").rewritten
    assert not any("calibration" in note for note in made.notes)


class Broken(nn.Module):
    """Overflows where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + torch.where(x.abs().amax() > 100, torch.nan, 0.0)


def test_an_image_has_no_length() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.head = nn.Conv2d(3, 64, 4, stride=4), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.patch(x).flatten(2).mT)

    images = [torch.randn(1, 3, 16, 16) for _ in range(3)]
    budget = fxopt.Budget(relative_error=0.2, weights="80%", minimize="error")
    for workload in (None, fxopt.Forward(batch=1)):
        made = fxopt.plan(
            Patches().eval(), budget, images[0], workload=workload, calibration=images,
            rewrites=["linear.quantized"],
        )  # fmt: skip
        assert made.workload == fxopt.Forward(batch=1, length=None)
        assert str(made).startswith("Forward(batch=1) on ")


def test_a_model_that_returns_nan_is_named(data: list[torch.Tensor]) -> None:
    data[-1] = data[-1] * 1000
    with pytest.raises(FxoptError, match="the model itself returns NaN for sequence"):
        fxopt.optimize(Broken(), BUDGET, data[0], calibration=data)


def test_weights_that_are_no_numbers_are_named(data: list[torch.Tensor]) -> None:
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    with pytest.raises(FxoptError, match="whether its weights are finite"):
        fxopt.optimize(model, BUDGET, data[0], calibration=data)


def test_a_metric_that_is_no_number_is_named(model: nn.Module, data: list[torch.Tensor]) -> None:
    budget = fxopt.Budget(metric=lambda _: float("nan"), metric_drop=0.1, weights="60%")
    with pytest.raises(FxoptError, match=r"Budget\.metric: it returned nan for the original"):
        fxopt.optimize(model, budget, data[0], calibration=data)


def test_a_rewritten_metric_that_is_no_number_keeps_no_limit(
    model: nn.Module, data: list[torch.Tensor]
) -> None:
    def metric(module: nn.Module) -> float:
        return 1.0 if module is model else float("nan")

    budget = fxopt.Budget(metric=metric, metric_drop=0.1, weights="60%")
    with pytest.raises(fxopt.BudgetError) as caught:
        fxopt.optimize(model, budget, data[0], calibration=data)
    assert caught.value.binding == "metric_drop"


class Masked(nn.Module):
    """Logits of which one class is ruled out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 96)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"logits": y.masked_fill(torch.arange(96) == 3, -torch.inf)}


def test_a_class_that_is_ruled_out_has_no_share_in_kl(data: list[torch.Tensor]) -> None:
    budget = fxopt.Budget(kl=0.01, weights="60%")
    opt = fxopt.optimize(Masked(), budget, data[0], calibration=data)
    rows = {row.name: row for row in opt.report.rows}
    assert 0 <= rows["kl"].measured <= 0.01


def test_half_precision_models_are_optimised(data: list[torch.Tensor]) -> None:
    """fp8 beside float16, whose largest number is 65504."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96)).half().eval()
    calibration = [30 * x.half() for x in data]
    opt = fxopt.optimize(
        model, fxopt.Budget(relative_error=0.1, weights="60%"), calibration[0],
        calibration=calibration,
    )  # fmt: skip
    labels = {a.label: a.error for d in opt.plan.decisions for a in d.alternatives}
    labels |= {d.label: d.error for d in opt.plan.rewritten}
    assert labels["fp8"] is not None
    assert labels["fp8"] < 0.01


def tiny_llama() -> Any:
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


def test_random_inputs_are_as_many_as_the_workload_says() -> None:
    model = tiny_llama()

    def drawn(workload: Any) -> tuple[int, ...]:
        return tuple(default_inputs(model, None, workload)["input_ids"].shape)

    assert drawn(None) == (2, 128)
    assert drawn(fxopt.Forward(batch=3, length=512)) == (2, 512)  # timed as three rows
    assert drawn(fxopt.Train(batch=3, seq=48)) == (3, 48)
    longest = model.config.max_position_embeddings
    assert drawn(fxopt.Forward(length=longest + 1)) == (2, longest)


def test_what_is_drawn_to_calibrate_with_is_as_long_as_what_is_attended() -> None:
    """Windows and packed caches err on no shorter sequence."""
    model = tiny_llama()

    def length(workload: Any) -> int:
        drawn = default_calibration(model, workload)["input_ids"]
        assert drawn.shape[0] == SEQUENCES
        return drawn.shape[1]

    assert length(fxopt.Generate(batch=4, prompt=200, new_tokens=100)) == 300
    assert length(fxopt.Forward(batch=4, length=70)) == 70
    parts = (("a", fxopt.Forward(length=70)), ("b", fxopt.Forward(length=90)))
    assert length(Several(parts)) == 90
    assert length(fxopt.Generate(batch=1, prompt=10**5, new_tokens=100)) == LONGEST


def test_what_is_drawn_for_a_part_leaves_out_the_cache_as_the_example_does() -> None:
    request = resolve(
        tiny_llama(), fxopt.Budget(weights="60%"), None, workload=None, calibration=None, keep=(),
        rewrites=None, at="model", seed=0, time_limit=None,
    )  # fmt: skip
    batches = (*request.calibration.fit, *request.calibration.choose, *request.calibration.verify)
    assert request.example["use_cache"] is False
    assert [batch["use_cache"] for batch in batches] == [False] * SEQUENCES


def test_a_model_generates_whatever_its_budget_was() -> None:
    model, ids = tiny_llama(), torch.randint(1, 97, (2, 16))
    data = [{"input_ids": row[None]} for row in torch.randint(1, 97, (6, 24))]
    opt = fxopt.optimize(model, fxopt.Budget(weights="100%"), data[0], calibration=data)
    assert opt.plan.workload.kind == "forward"
    assert not [d for d in opt.plan.decisions if d.family == "kv_cache"]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(opt.generate(ids, max_new_tokens=8, do_sample=False), expected)
