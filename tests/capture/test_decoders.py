"""Hugging Face decoders become one graph for prefill and decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from fxopt.capture import Captured, capture
from fxopt.capture.sites import attention_info
from fxopt.ir.site import ExpertsInfo, GroupInfo, LinearInfo
from fxopt.kernels.kv_attention import op as _  # noqa: F401
from fxopt.kernels.kv_attention.layout import allocate, parse

VOCABULARY = 97
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**WIDTHS, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    kv_heads: int
    linears: int
    mlps: int = 2
    windows: tuple[int, int] = (0, 0)
    together: int = 0
    transposed: int = 0
    positions: str = "index"


CASES = {
    "llama": Case(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), 2, 15),
    "qwen2": Case(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)), 2, 15),
    "qwen3": Case(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)), 2, 15),
    "mistral": Case(
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=8)),
        2, 15, windows=(8, 8),
    ),
    "gemma3": Case(
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                **GROUPED, head_dim=16, sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        2, 15, windows=(8, 0), together=1,
    ),
    "phi3": Case(lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, pad_token_id=0)), 2, 9),
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                bos_token_id=1, eos_token_id=2,
            )
        ),
        4, 9, together=1, transposed=8,
    ),
    "gpt_neox": Case(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDTHS)), 4, 9),
    "opt": Case(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(**WIDTHS, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
        ),
        4, 13, together=1, positions="mask",
    ),
    "mixtral": Case(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
        2, 15, mlps=0, together=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    case: Case
    model: nn.Module
    captured: Captured


@pytest.fixture(scope="module", params=list(CASES))
def trial(request: pytest.FixtureRequest) -> Trial:
    torch.manual_seed(0)
    case = CASES[request.param]
    model = case.build().eval()
    return Trial(case, model, capture(model))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 40), (2, 7)])
def test_equals_the_model(trial: Trial, assert_same: Any, batch: int, length: int) -> None:
    assert_same(trial.captured, trial.model, {"input_ids": tokens(batch, length)})


def test_left_padding_is_respected(trial: Trial, assert_same: Any) -> None:
    ids, mask = tokens(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[0, :5], mask[1, :16] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert_same(trial.captured, trial.model, inputs, seen=mask.bool())
    seen = trial.captured.run(**inputs).logits[0, 5:]
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % VOCABULARY
    again = trial.captured.run(**{**inputs, "input_ids": changed}).logits[0, 5:]
    assert torch.equal(seen, again)


def test_last_logits_only(trial: Trial) -> None:
    ids = tokens(2, 9)
    whole = trial.captured.run(input_ids=ids).logits
    last = trial.captured.run(input_ids=ids, logits_to_keep=1).logits
    assert last.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-5, atol=1e-5)


def test_one_graph_for_prefill_and_decoding(trial: Trial) -> None:
    captured = trial.captured
    assert captured.causal_lm, captured.reason
    assert captured.inputs == ("input_ids", "position_ids", "attention_mask", "logits_to_keep")
    assert captured.static_dims == ()
    assert captured.optional == {"attention_mask"}
    assert captured.positions == trial.case.positions
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    assert [n.target for n in placeholders] == [*captured.inputs, "past", "start"]
    for i, node in enumerate(captured.attentions):
        assert node.kwargs["state"].args == (placeholders[4], i)
        assert next(iter(node.kwargs["state"].meta["nn_module_stack"].values()))[0] == ""
        assert node.kwargs["start"] is placeholders[5]


def test_decoding_equals_one_pass(trial: Trial) -> None:
    captured, length = trial.captured, 13
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = captured.run(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    past = [
        list(
            allocate(parse(""), 2, i.num_kv_heads, i.head_dim, i.value_dim, length, i.dtype, "cpu")
        )
        for i in map(attention_info, captured.attentions)
    ]
    pieces = []
    for begin, end in ((0, 7), (7, 8), (8, 12), (12, 13)):
        out = captured.run(
            input_ids=ids[:, begin:end], attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end], past=past, start=torch.tensor(begin),
        )  # fmt: skip
        pieces.append(out.logits)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[seen], whole[seen], rtol=1e-5, atol=1e-5)


def test_sites(trial: Trial) -> None:
    case, sites = trial.case, trial.captured.sites
    count = Counter(site.family for site in sites)
    assert count["attention"] == count["kv_cache"] == 2 * case.kv_heads
    kinds = Counter(s.info.kind for s in sites if s.family == "activation")
    assert (kinds["mlp"], kinds["head"]) == (case.mlps, 1)
    linears = [s for s in sites if isinstance(s.info, LinearInfo)]
    tied = [s for s in sites if isinstance(s.info, GroupInfo) and s.info.kind == "tied"]
    experts = [s for s in sites if isinstance(s.info, ExpertsInfo)]
    assert len(linears) + len(tied) + len(experts) == case.linears
    assert not any(s.blocked for s in linears)
    assert len(tied) + len(experts) == case.together
    assert sum(s.info.transposed for s in linears) == case.transposed
    attention = [s for s in sites if s.family == "attention"]
    assert tuple(s.info.window for s in attention[:: case.kv_heads]) == case.windows
    assert all(s.info.causal and s.info.cached and s.info.has_mask for s in attention)
    assert all(s.info.num_heads == 4 and s.info.num_kv_heads == case.kv_heads for s in attention)
    keys = [(s.family, s.key) for s in sites]
    assert len(set(keys)) == len(keys)


def test_experts_are_one_site_a_projection() -> None:
    captured = capture(CASES["mixtral"].build().eval())
    found = {s.info.weight: s.info.count for s in captured.sites if isinstance(s.info, ExpertsInfo)}
    assert not any(s.blocked for s in captured.sites)
    assert found == {
        name: 4
        for layer in range(2)
        for name in (
            f"model.layers.{layer}.mlp.experts.gate_up_proj",
            f"model.layers.{layer}.mlp.experts.down_proj",
        )
    }


def test_parameters_keep_their_names_and_are_shared(trial: Trial) -> None:
    own = dict(trial.model.named_parameters(remove_duplicate=False))
    read = dict(trial.captured.graph.named_parameters(remove_duplicate=False))
    assert read
    assert all(read[name] is own[name] for name in read)
    modules = dict(trial.model.named_modules())
    for site in trial.captured.sites:
        assert site.op.split("#")[0] in modules


def test_shapes_follow_from_the_sizes(trial: Trial) -> None:
    roles = {
        d.role: name for name, d in trial.captured.symbols.items() if d.input != "attention_mask"
    }
    assert set(roles) == {"batch", "length", "keep"}
    logits = trial.captured.graph.graph.output_node().args[0][0].meta["val"]
    assert [str(s) for s in logits.shape] == [roles["batch"], roles["keep"], str(VOCABULARY)]
