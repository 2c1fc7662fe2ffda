"""Several named workloads under one budget: each has its own latency rows, all measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.compiler import Compiler
from fxopt.ir.errors import FxoptError
from fxopt.request import resolve

transformers = pytest.importorskip("transformers")
WORK = {
    "chat": fxopt.Generate(batch=1, prompt=24, new_tokens=6),
    "digest": fxopt.Generate(batch=2, prompt=192, new_tokens=3),
}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def data() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 96, (1, 60), generator=generator)} for _ in range(4)]


@pytest.fixture(scope="module")
def opt(llama: nn.Module, data: list[dict[str, Any]]) -> Any:
    latency = {"chat.decode": "50x", "digest.prefill": "50x", "digest": "50x"}
    return fxopt.optimize(
        llama,
        fxopt.Budget(latency=latency, weights="45%", kl=1.0, minimize="memory"),
        data[0],
        workload=WORK,
        calibration=data,
        rewrites=["linear.quantized"],
    )


def test_each_scenario_has_a_row_that_was_measured(opt: Any) -> None:
    rows = {row.name: row for row in opt.report.rows}
    assert {"latency.chat.decode", "latency.digest.prefill", "latency.digest"} <= rows.keys()
    for name in ("latency.chat.decode", "latency.digest.prefill", "latency.digest"):
        assert rows[name].measured is not None
        assert rows[name].predicted is not None
        assert 0 < rows[name].measured <= rows[name].limit
    before = opt.plan.baseline
    assert before["latency"] == pytest.approx(before["latency.chat"] + before["latency.digest"])
    assert before["latency.digest"] == pytest.approx(
        before["latency.digest.prefill"] + 3 * before["latency.digest.decode"]
    )


def test_bytes_are_those_of_the_largest(opt: Any) -> None:
    tokens = 2 * (192 + 3)
    assert opt.plan.baseline["kv_cache"] == pytest.approx(
        2 * tokens * 2 * 2 * 32 * 2, rel=0.05
    )  # K and V, two layers, two heads of 32, 16 bits; capacity is rounded up


def test_the_table_adds_calls_up_to_workloads(llama: nn.Module, data: list[dict[str, Any]]) -> None:
    request = resolve(
        llama, fxopt.Budget(weights="50%"), data[0], workload=WORK, calibration=data, keep=(),
        rewrites=["linear.quantized"], at=None, seed=0, time_limit=None,
    )  # fmt: skip
    compiler = Compiler(request)
    names = ["chat.prefill", "chat.decode", "digest.prefill", "digest.decode"]
    assert [call.name for call in compiler.scenarios] == names
    assert (compiler.final.batch, compiler.final.length) == (2, 195)
    assert (compiler.widest.batch, compiler.widest.queries) == (2, 192)
    assert compiler.quality.prompt == 24
    for columns in compiler.table().columns:
        for column in columns:
            chat = column.seconds["chat.prefill"] + 6 * column.seconds["chat.decode"]
            assert column.seconds["chat"] == pytest.approx(chat)
            assert column.cost.seconds == pytest.approx(chat + column.seconds["digest"])


def test_a_plan_of_several_is_stored_and_replayed(
    opt: Any, llama: nn.Module, data: list[dict[str, Any]], tmp_path: Path
) -> None:
    opt.plan.save(tmp_path / "plan.json")
    plan = fxopt.Plan.load(tmp_path / "plan.json")
    assert plan.workload == opt.plan.workload
    assert "chat: Generate(batch=1, prompt=24, new_tokens=6), digest: Generate(" in str(plan)
    again = fxopt.apply(llama, plan, example_inputs=data[0])
    ids = data[0]["input_ids"]
    assert torch.equal(again(input_ids=ids).logits, opt(input_ids=ids).logits)


def test_forward_workloads_differ_in_their_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    plan = fxopt.plan(
        model,
        fxopt.Budget(latency={"one": "50x", "many.forward": "50x"}, weights="50%"),
        torch.randn(2, 128),
        workload={"one": fxopt.Forward(batch=1), "many": fxopt.Forward(batch=64)},
    )
    rows = {row.name: row.predicted for row in plan.totals}
    assert rows.keys() >= {"latency.one", "latency.many.forward"}
    assert rows["weights"] <= 0.5 * plan.baseline["weights"]


@pytest.mark.parametrize(
    ("workload", "options", "says"),
    [
        ({"a": WORK["chat"], "b": fxopt.Forward()}, {}, "all fxopt.Generate or all fxopt.Forward"),
        ({"a.b": WORK["chat"]}, {}, "the name 'a.b'"),
        ({}, {}, "at least one workload"),
        ({"a": fxopt.Train(1, 8)}, {}, "by name, not Train"),
        ([WORK["chat"]], {}, "by name, not list"),
        (WORK, {"at": "model"}, "at= takes one workload"),
        (WORK, {"budget": fxopt.Budget(latency={"chat.decod": "1x"}, kl=1.0)}, "chat.decode"),
        (WORK, {"budget": fxopt.Budget(latency={"decode": "1x"}, kl=1.0)}, "no call 'decode'"),
    ],
)
def test_what_is_wrong_is_named(
    llama: nn.Module, workload: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FxoptError, match=says):
        fxopt.plan(llama, **{"budget": fxopt.Budget(weights="50%"), **options}, workload=workload)
