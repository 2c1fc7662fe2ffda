"""Predictions of whole calls: sums of sites and rest, peaks of a dry run, heads that differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt import pace as paces
from fxopt.compiler import Compiler
from fxopt.cost_models.calls import Parts, Realised
from fxopt.decide.options import lowered
from fxopt.decide.runs import calls
from fxopt.decide.search import identity
from fxopt.decide.table import Table, build
from fxopt.decide.verify import peak_live_bytes, weight_bytes
from fxopt.ir.site import LinearInfo
from fxopt.kernels import quantized_linear
from fxopt.pace import Pace
from fxopt.passes.baseline import baseline_calls
from fxopt.request import resolve


def made(device: str, head_dim: int = 32) -> Compiler:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=4 * head_dim, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(
        device, torch.float32 if device == "cpu" else torch.bfloat16
    )
    ids = torch.randint(128, (1, 160), device=device)
    return Compiler(
        resolve(
            model.eval(), fxopt.Budget(weights="100%"), {"input_ids": ids},
            workload=fxopt.Generate(batch=1, prompt=160, new_tokens=8), calibration=None, keep=(),
            rewrites=["linear.quantized", "kv_cache.blocks"], at=None, seed=0, time_limit=None,
        )
    )  # fmt: skip


def priced(compiler: Compiler) -> Table:
    options = lowered(compiler.proposals, (*compiler.scenarios, compiler.final), baseline_calls)
    with torch.no_grad():
        return build(compiler.proposals, options, compiler.costs, lambda _: 0.0)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return made("cpu")


@pytest.fixture(scope="module")
def table(compiler: Compiler) -> Table:
    return priced(compiler)


def labelled(
    table: Table, family: str, label: str, heads: int = 99, only: str = ""
) -> tuple[int, ...]:
    """The choice of `label` wherever a group of the family has it, of each op in so many heads."""
    taken: dict[str, int] = {}
    choice: list[int] = []
    for sites, columns in zip(table.keys, table.columns, strict=True):
        labels = [c.label for c in columns]
        mine = sites[0].family == family and label in labels and sites[0].key.endswith(only)
        mine = mine and taken.setdefault(sites[0].op, 0) < heads
        taken[sites[0].op] = taken.get(sites[0].op, 0) + mine
        choice.append(labels.index(label) if mine else 0)
    return tuple(choice)


def test_logits_of_a_prompt_are_the_last_token_s(compiler: Compiler) -> None:
    (head,) = (s for s in compiler.sites if s.last)
    assert head.key == "lm_head"
    prefill, decode = compiler.scenarios
    assert head.at(prefill) == replace(prefill, queries=1, past=159)
    assert head.at(decode) == decode
    (call,) = baseline_calls(head, head.at(prefill))  # pyright: ignore
    assert call.flops == 2 * 128 * 128
    other = next(s for s in compiler.sites if s.family == "linear" and not s.last)
    assert other.at(prefill) == prefill


def test_seconds_are_those_of_the_rest_and_of_all_sites(compiler: Compiler, table: Table) -> None:
    pace = Pace(compiler)
    pace.rest = {"prefill": Parts(1.0, 5.0), "decode": Parts(2.0, 6.0)}
    kept = pace.calls(table, identity(table))
    priced = [compiler.costs(c).seconds for c in every_call(compiler)]
    assert kept["decode"].device == pytest.approx(2.0 + sum(priced))
    assert kept["decode"].host == 6.0
    pace.replayed = {"prefill"}
    pace.sites = {"prefill": Parts(1.0, 7.0), "decode": Parts(1.0, 7.0)}
    assert pace.calls(table, identity(table))["prefill"].host == 5.0
    assert pace.calls(table, identity(table))["decode"].host == 13.0


def every_call(compiler: Compiler) -> list[Any]:
    """The calls of a step: one linear each, and of each head the attention that reads its cache."""
    decode = compiler.scenarios[1]
    sites = [s for s in compiler.sites if isinstance(s.info, LinearInfo) or s.family == "kv_cache"]
    return [call for s in sites for call in baseline_calls(s, s.at(decode) or decode)]


def test_a_choice_adds_what_its_columns_do(compiler: Compiler, table: Table) -> None:
    pace = Pace(compiler)
    pace.rest = {"prefill": Parts(1.0), "decode": Parts(2.0)}
    choice = labelled(table, "linear", "int8-g128")
    more = sum(
        c[o].seconds["decode"] - c[0].seconds["decode"]
        for c, o in zip(table.columns, choice, strict=True)
    )
    assert any(choice)
    kept, rewritten = (pace.calls(table, c)["decode"].device for c in (identity(table), choice))
    assert rewritten - kept == pytest.approx(more)


def test_heads_that_differ_are_calls_of_their_own(compiler: Compiler, table: Table) -> None:
    """Through one head and through all: the time of a call is affine in its heads."""
    pace = Pace(compiler)
    pace.rest = {"prefill": Parts(1.0), "decode": Parts(2.0)}
    label = next(c.label for k, cs in zip(table.keys, table.columns, strict=True) for c in cs
                 if k[0].family == "attention" and c.proposals)  # fmt: skip
    none, one, both = (labelled(table, "attention", label, n) for n in (0, 1, 2))
    seconds = [pace.calls(table, c)["decode"].device for c in (none, one, both)]
    # by the roofline the start of a call is a launch, and each of two layers makes one more
    start = compiler.hardware.launch_seconds
    assert seconds[1] - (seconds[0] + seconds[2]) / 2 == pytest.approx(2 * start, rel=1e-6)


def test_plans_of_other_models_calibrate(compiler: Compiler, table: Table, tmp_path: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    pace, none = Pace(compiler), identity(table)
    pace.rest = {"prefill": Parts(1.0), "decode": Parts(2.0)}
    before = pace.seconds(table, none)
    pace.note(table, none, {"prefill": 10.0, "decode": 20.0})
    assert pace.seconds(table, none) == before, "a model does not calibrate itself"
    known = Realised(compiler.hardware)
    for _ in range(8):
        known.note("another", "decode", 2.0, 3.0)
    after = pace.seconds(table, none)
    assert after["prefill"] == before["prefill"]
    assert after["decode"] == pytest.approx(1.5 * before["decode"], rel=0.02)


@torch.no_grad()
@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("family", "label"),
    [("linear", "int4-g64"), ("attention", "k4v4g64r64s4"), ("linear", "as it is")],
)
def test_peaks_are_predicted_before_anything_is_realised(
    compiler: Compiler, table: Table, family: str, label: str
) -> None:
    choice = labelled(table, family, label, only="down_proj" if family == "linear" else "")
    assert any(choice) is (label != "as it is")
    proposals = [p for c, o in zip(table.columns, choice, strict=True) for p in c[o].proposals]
    found = Pace(compiler).memory(table, choice)
    weights = dict(compiler.request.model.named_parameters())

    def stored(proposal: Any) -> dict[str, torch.Tensor]:
        if proposal.site.family != "linear":
            return {}
        codes = quantized_linear.quantize(weights[proposal.site.info.weight].detach(), 4, 64)
        return dict(zip(("packed", "scale", "zero"), codes, strict=True))

    assert found == pytest.approx(peak_of(compiler, proposals, stored), rel=0.02)


def peak_of(compiler: Compiler, proposals: list[Any], stored: Any) -> int:
    """Bytes of a realised module with what its prompt takes, the cache included."""
    module = compiler.emit(compiler.realise(proposals, stored))
    _, prefill = next(calls(module, compiler.request.workload, compiler.request.example))
    prefill()
    return weight_bytes(module) + peak_live_bytes(prefill, compiler.device)


@pytest.mark.usefixtures("clock")
def test_the_rest_is_timed_once_for_each_kind_of_call(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paces, "SECONDS", 0.01)
    rest = Pace(compiler).rest
    assert set(rest) == {"prefill", "decode"}
    assert all(0 < parts.device < 1 and parts.host == 0 for parts in rest.values())


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.usefixtures("clock")
def test_on_a_gpu_steps_are_replayed_and_prompts_are_issued() -> None:
    compiler = made("cuda", 64)
    pace, table = Pace(compiler), priced(compiler)
    assert set(pace.rest) == {"prefill", "decode"}
    assert pace.replayed == {"decode"}
    assert all(min(parts.host, parts.device) > 0 for parts in pace.rest.values())
    none = identity(table)
    assert pace.calls(table, none)["prefill"].host > pace.rest["prefill"].host
    assert pace.calls(table, none)["decode"].host == pace.rest["decode"].host
    assert pace.memory(table, none) == pytest.approx(peak_of(compiler, [], None), rel=0.05)
