"""Embeddings and the head that share a weight: one decision, codes stored once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.compiler import Compiler
from fxopt.decide.recover import recover
from fxopt.ir.rewrite import Match, Refusal
from fxopt.ir.site import EmbeddingInfo, GroupInfo, Site
from fxopt.passes.baseline import baseline_calls
from fxopt.passes.linear.quantized_tied import QuantizedTied
from fxopt.request import resolve

hf = pytest.importorskip("transformers")
VOCABULARY = 211


class Tied(nn.Module):
    """Two embeddings, a layer, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(VOCABULARY, 64)
        self.second = nn.Embedding(VOCABULARY, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, VOCABULARY)
        self.second.weight = self.head.weight = self.first.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(ids) + self.second(ids.flip(1))
        return self.head(torch.tanh(self.layer(x)))


def llama(**changes: Any) -> Any:
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=64, **changes,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    return hf.GPT2LMHeadModel(config).eval()


def text(length: int = 24) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, (1, length))}


def compiled(model: nn.Module, *rewrites: str, **given: Any) -> Compiler:
    data = [torch.randint(VOCABULARY, (1, 40)) for _ in range(6)]
    request = resolve(
        model.eval(), fxopt.Budget(weights="50%"), data[0], workload=None, calibration=data,
        rewrites=rewrites or ("linear.quantized_tied",), at=None, seed=0, time_limit=None,
        **{"keep": (), **given},
    )  # fmt: skip
    return Compiler(request)


def restored(tensors: Any, parameters: Any) -> Tensor:
    from fxopt.kernels.quantized_linear import dequantize

    codes = (tensors[name] for name in ("packed", "scale", "zero"))
    return dequantize(*codes, parameters["bits"], parameters["group_size"])


def test_the_site() -> None:
    sites = capture(Tied().eval(), torch.randint(VOCABULARY, (2, 9))).sites
    site = next(s for s in sites if s.key == "head")
    assert isinstance(site.info, GroupInfo)
    assert site.info.kind == "tied"
    first, second, head = site.info.members
    assert first.info == EmbeddingInfo("first.weight", VOCABULARY, 64, torch.float32)
    assert (second.key, head.key, head.info.bias) == ("second", "head", "head.bias")
    assert head.info.shared_with == ()
    assert list(site.info.outputs) == [0, 1, 2]


def test_another_reader_leaves_it_blocked() -> None:
    class More(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.first.weight.sum()

    sites = capture(More().eval(), torch.randint(VOCABULARY, (2, 9))).sites
    (site,) = [s for s in sites if s.key == "head"]
    assert site.blocked is not None
    assert "tied weight: also read as first.weight in first" in site.blocked


def test_both_uses_read_the_codes() -> None:
    compiler = compiled(Tied())
    model = copy.deepcopy(compiler.request.model)
    ids = torch.randint(VOCABULARY, (3, 17))
    found = compiler.proposals.by_site["linear", "head"]
    assert [p.candidate.label for p in found] == ["int8", "int4"]
    for proposal in found:
        tensors = compiler.preparer(proposal)
        model.head.weight.data = restored(tensors, proposal.candidate.parameters)
        editor = compiler.realise([proposal])
        assert torch.equal(editor.graph(ids)[0], model(ids))
        kept = {name for name, _ in editor.graph.named_parameters(remove_duplicate=False)}
        assert not kept & {"first.weight", "second.weight", "head.weight"}
        assert editor.graph.first.packed is editor.graph.head.packed


def test_the_estimate_counts_both_uses() -> None:
    """Against what the model with the restored weight in both places, or in one, loses."""
    compiler = compiled(Tied())
    (_, proposal) = compiler.proposals.by_site["linear", "head"]
    prior = compiler._priors(proposal)  # pyright: ignore[reportPrivateUsage]
    statistics, head = compiler.statistics, proposal.site.info.members[-1]
    recorded = statistics.at(head)
    weight = restored(compiler.preparer(proposal), proposal.candidate.parameters)
    alone = statistics.second_order(head, recorded.inputs["x"] @ (weight - recorded.weight).T)
    assert prior > 1.05 * alone > 0
    measured = compiler.choose_reference.measure(compiler.realise([proposal]).graph).mean
    measured = compiler.quality.additive(measured)
    assert measured / 4 < prior < 4 * measured


def test_codes_weigh_both_errors() -> None:
    """Less than with the head's gram alone, or with none, in the sum of relative errors."""
    from fxopt.passes.linear.rounding import Rounding, quantize

    compiler = compiled(Tied())
    (_, proposal) = compiler.proposals.by_site["linear", "head"]
    recorded = compiler.statistics.at(proposal.site.info.members[-1])
    weight, gram = recorded.weight, recorded.gram

    def error(codes: Any) -> float:
        names = ("packed", "scale", "zero")
        change = restored(dict(zip(names, codes, strict=True)), {"bits": 4, "group_size": 64})
        change, dense = change.double() - weight.double(), weight.double()
        head = (change @ gram * change).sum() / (dense @ gram * dense).sum()
        return float(head + change.square().sum() / dense.square().sum())

    tensors = compiler.preparer(proposal)
    mine = error([tensors[name] for name in ("packed", "scale", "zero")])
    eye = torch.eye(64, dtype=torch.float64)
    for other in (gram, eye):
        assert mine <= error(quantize(weight, Rounding.of(other), 4, 64))


def test_prices_count_the_table_once() -> None:
    compiler = compiled(Tied())
    scenario, (proposal, _) = compiler.scenarios[0], compiler.proposals.by_site["linear", "head"]
    kept = baseline_calls(proposal.site, scenario)
    size = VOCABULARY * 64
    assert sum(call.weight_bytes for call in kept) == 4 * (size + VOCABULARY)
    calls = proposal.rewrite.lower(proposal.match, proposal.candidate, scenario)
    stored = sum(t.nbytes for t in compiler.preparer(proposal).values())
    assert sum(call.weight_bytes for call in calls) == stored
    assert [call.op for call in calls] == ["fxopt::quantized_embedding"] * 2 + [
        "fxopt::quantized_linear"
    ]
    for call in (*kept, *calls):
        assert call.run is not None
        assert call.run(torch.device("cpu"))().shape[0] == scenario.batch * scenario.queries


@pytest.mark.slow
@pytest.mark.parametrize("build", [llama, gpt2])
def test_generation_saving_exporting(build: Any, tmp_path: Path) -> None:
    model, data = build(), [text() for _ in range(4)]
    opt = fxopt.optimize(
        model, fxopt.Budget(weights="97%"), data[0],
        workload=fxopt.Generate(batch=1, prompt=20, new_tokens=4), calibration=data,
        rewrites=["linear.quantized_tied"],
    )  # fmt: skip
    (decision,) = opt.plan.rewritten
    assert (decision.key, decision.rewrite) == ("lm_head", "linear.quantized_tied")
    assert "rewritten with" not in decision.reason
    row = next(row for row in opt.report.rows if row.name == "weights")
    assert row.measured == row.predicted
    table = opt.get_input_embeddings()
    assert table.packed is opt.lm_head.packed
    moved = copy.deepcopy(opt).to("cpu")
    assert moved.get_input_embeddings().packed is moved.lm_head.packed
    with pytest.raises(fxopt.FxoptError, match="resize the original"):
        opt.resize_token_embeddings(300)

    same = copy.deepcopy(model)
    tensors = {name: getattr(table, name).data for name in ("packed", "scale", "zero")}
    same.lm_head.weight.data = restored(tensors, decision.parameters)
    ids = text(9)["input_ids"]
    torch.testing.assert_close(opt(input_ids=ids).logits, same(input_ids=ids).logits)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(opt.generate(input_ids=ids, **how), same.generate(input_ids=ids, **how))

    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert loaded.get_input_embeddings().packed is loaded.lm_head.packed
    assert torch.equal(loaded(input_ids=ids).logits, opt(input_ids=ids).logits)
    for kind in ("forward", "generate"):
        report = opt.export_onnx(tmp_path / f"{kind}.onnx", kind=kind)
        assert report.difference < 1e-4
    import onnx

    held = onnx.load(tmp_path / "forward.onnx").graph.initializer
    packed = [i for i in held if i.data_type == onnx.TensorProto.UINT8]
    assert sum(len(i.raw_data) for i in packed) <= tensors["packed"].nbytes + 64


@pytest.mark.slow
def test_replay_is_bit_identical(tmp_path: Path) -> None:
    model, data = llama(), [text() for _ in range(4)]
    budget = fxopt.Budget(weights="92%")
    made = fxopt.optimize(
        model, budget, data[0], calibration=data, rewrites=["linear.quantized_tied"]
    )
    made.plan.save(tmp_path / "plan.json")
    again = fxopt.apply(model, fxopt.Plan.load(tmp_path / "plan.json"))
    ids = text()["input_ids"]
    assert torch.equal(again(input_ids=ids).logits, made(input_ids=ids).logits)


def test_an_encoder_decoder_shares_one_table() -> None:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).eval()
    data = [{**text(12), "decoder_input_ids": text(7)["input_ids"]} for _ in range(4)]
    opt = fxopt.optimize(
        model, fxopt.Budget(weights="99%"), data[0], calibration=data,
        workload=fxopt.Generate(batch=1, prompt=12, new_tokens=4),
        rewrites=["linear.quantized_tied"],
    )  # fmt: skip
    (decision,) = opt.plan.rewritten
    assert decision.key == "lm_head"
    row = next(row for row in opt.report.rows if row.name == "weights")
    assert row.measured == row.predicted
    same = copy.deepcopy(model)
    tensors = {name: getattr(opt.lm_head, name).data for name in ("packed", "scale", "zero")}
    same.shared.weight.data = restored(tensors, decision.parameters)
    torch.testing.assert_close(opt(**data[0]).logits, same(**data[0]).logits)
    how = {"max_new_tokens": 6, "do_sample": False}
    ids = data[0]["input_ids"]
    assert torch.equal(opt.generate(input_ids=ids, **how), same.generate(input_ids=ids, **how))


def test_keep_and_other_rewrites_leave_it() -> None:
    kept = compiled(Tied(), keep=["head"]).proposals
    assert kept.refused["linear", "head"] == [("*", "kept by the caller (keep=)")]
    ((_, reason),) = compiled(Tied(), "linear.low_rank").proposals.refused["linear", "head"]
    assert reason == (
        "tied weight: also read as first.weight in first, second.weight in second, and no rewrite "
        "of this call serves them together"
    )


def test_refusals() -> None:
    sites = capture(Tied().eval(), torch.randint(VOCABULARY, (2, 9))).sites
    head = next(s for s in sites if s.key == "head")
    assert isinstance(QuantizedTied().match(head), Match)
    odd = QuantizedTied(bits=(4,), group_sizes=(48,)).match(head)
    assert isinstance(odd, Refusal)
    assert "no group size of (48,) divides the 64 input features" in odd.reason
    other: Site = next(s for s in sites if s.key == "layer")
    refused = QuantizedTied().match(other)
    assert isinstance(refused, Refusal)
    assert "serves tied embeddings and heads" in refused.reason
    small = nn.Sequential(nn.Embedding(30, 64), nn.Linear(64, 30, bias=False)).eval()
    small[1].weight = small[0].weight
    (site,) = [s for s in capture(small, torch.randint(30, (2, 9))).sites if s.key == "1"]
    refused = QuantizedTied().match(site)
    assert isinstance(refused, Refusal)
    assert "30 x 64 is too small" in refused.reason


def test_recovery_walks_past_it() -> None:
    compiler = compiled(Tied(), "linear.quantized_tied", "linear.low_rank")
    chosen = [found[-1] for found in compiler.proposals.by_site.values()]
    graph = compiler.captured.graph
    recovery = recover(
        graph, graph, chosen, compiler.request.calibration.fit,
        compiler._run,  # pyright: ignore[reportPrivateUsage]
        compiler.quality, compiler.statistics, compiler.preparer,
    )  # fmt: skip
    assert set(recovery.errors) == {"layer"}
    codes = compiler.preparer(next(p for p in chosen if p.site.key == "head"))
    weight = restored(codes, {"bits": 4, "group_size": 64})
    model = compiler.request.model
    off = total = 0.0
    for batch in compiler.request.calibration.fit:
        (ids,) = batch.values()
        seen = F.embedding(ids, weight) + F.embedding(ids.flip(1), weight)
        exact = model.layer(model.first(ids) + model.second(ids.flip(1))).detach()
        proposal = next(p for p in chosen if p.site.key == "layer")
        tensors = compiler.preparer(proposal)
        y = F.linear(F.linear(seen, tensors["down"]), tensors["up"], tensors["bias"]).detach()
        off += float((y - exact).square().sum())
        total += float(exact.square().sum())
    assert recovery.errors["layer"][0] == pytest.approx(off / total, rel=1e-3)
