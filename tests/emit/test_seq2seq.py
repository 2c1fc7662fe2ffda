"""Encoder-decoder models generate over the emitted graph: encoder once, then steps over a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
)
from transformers.cache_utils import Cache as HFCache
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

import fxopt
from fxopt.capture import capture
from fxopt.decide.evaluate import run_as_decoded
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import emit
from fxopt.emit.phases import Phase, split
from fxopt.emit.save import load
from fxopt.ir.errors import FxoptError
from fxopt.ir.ops import mix_channels, rotate_both
from fxopt.ir.rewrite import Match
from fxopt.ir.workload import Scenario
from fxopt.passes.baseline import cache_bytes
from fxopt.passes.kv_cache.rotated import Rotated
from tests.crossed import first
from tests.emit.seq2seq_models import CROSS, OWN, example, make, packed, padded
from tests.oracle import FakeQuantizedCache, fake_quantize, parse


@pytest.fixture(scope="module", params=["t5", "bart"])
def pair(request):
    model = make(request.param)
    captured = capture(model, example(model))
    return model, emit(captured, GraphEditor(captured), model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"decoder_input_ids": torch.tensor([[5, 6, 7]] * 3)},
    ],
    ids=["greedy", "beams", "sampling", "returned", "no cache", "prompted"],
)
def test_tokens_are_the_originals(pair, options):
    ids, mask = padded()
    tokens = []
    for module in pair:
        torch.manual_seed(3)
        options = {"attention_mask": mask, "max_new_tokens": 10, **options}
        tokens.append(module.generate(ids, **options))
    assert torch.equal(*tokens)


def test_prompt_lookup_crops_what_was_generated_alone():
    model = make("t5")
    captured = capture(model, example(model))
    opt = emit(captured, GraphEditor(captured), model)
    ids = torch.randint(3, 61, (1, 12))
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}
    assert torch.equal(model.generate(ids, **options), opt.generate(ids, **options))


def test_layers_of_one_class_are_a_loop_over_both_kinds_of_state():
    model = make("t5", layers=5)
    captured = capture(model, example(model))
    opt = emit(captured, GraphEditor(captured), model)
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 8}
    assert torch.equal(model.generate(ids, **options), opt.generate(ids, **options))


def test_encoder_and_its_projections_run_once(pair, monkeypatch):
    _, opt = pair
    names = ("encoder", "cross", "step", "decoder")
    calls = {id(opt.phase(name)): [] for name in names}
    call = Phase.__call__

    def counted(self, inputs):
        calls[id(self)].append(inputs)
        return call(self, inputs)

    monkeypatch.setattr(Phase, "__call__", counted)
    ids, mask = padded()
    opt.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6)
    encoder, cross, step, decoder = (calls[id(opt.phase(name))] for name in names)
    assert [len(encoder), len(cross), len(step), len(decoder)] == [1, 1, 6, 0]
    assert all(inputs["decoder_input_ids"].shape == (3, 1) for inputs in step)


def test_a_step_reads_no_weight_of_the_encoder_nor_of_its_projections(pair):
    _, opt = pair
    read = {str(n.target) for n in opt.parts.step.graph.find_nodes(op="get_attr")}
    once = {str(n.target) for part in (opt.parts.encoder, opt.parts.cross)
            for n in part.graph.find_nodes(op="get_attr")}  # fmt: skip
    assert sum("k" in name.rsplit(".", 2)[-2] for name in once) >= 4
    assert not {name for name in read & once if "embed" not in name and "shared" not in name}
    linears = [n for n in opt.parts.step.graph.nodes if "linear" in str(n.target)]
    assert len(linears) == 2 * 8 + 1


def test_a_plain_call_and_one_over_encoder_outputs_agree(pair):
    model, opt = pair
    ids, mask = padded()
    start = torch.randint(3, 61, (3, 4))
    inputs = {"attention_mask": mask, "decoder_input_ids": start}
    with torch.no_grad():
        want = model(input_ids=ids, **inputs).logits
        encoded = opt.get_encoder()(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(opt(input_ids=ids, **inputs).logits, want)
        torch.testing.assert_close(opt(encoder_outputs=encoded, **inputs).logits, want)
        assert opt(input_ids=ids, **inputs).past_key_values is None


def test_token_by_token_equals_one_pass(pair):
    _, opt = pair
    ids, mask = padded()
    decoded = torch.randint(3, 61, (3, 9))
    with torch.no_grad():
        whole = opt(input_ids=ids, attention_mask=mask, decoder_input_ids=decoded).logits
        cache = opt.make_cache(3, 2)
        pieces = [
            opt(input_ids=ids, attention_mask=mask, decoder_input_ids=part, past_key_values=cache)
            for part in decoded.split([3, 1, 4, 1], 1)
        ]
    torch.testing.assert_close(torch.cat([piece.logits for piece in pieces], 1), whole)
    assert cache.get_seq_length() == 9
    assert pieces[-1].past_key_values is cache


class PackedOnce(DynamicLayer):
    """The oracle of cross-attention: what is stored is the image of what came."""

    def __init__(self, layout, mask):
        super().__init__()
        self.layout, self.mask = layout, mask

    def update(self, key_states, value_states, *args, **kwargs):
        sides = [key_states.clone(), value_states.clone()]
        repeats = key_states.shape[0] // self.mask.shape[0]
        mask = self.mask.bool().repeat_interleave(repeats, 0)[..., None]
        for head, fmt in enumerate(parse(self.layout, key_states.shape[1])):
            for low in range(0, key_states.shape[2] - 31 if fmt else 0, 32):
                span = slice(low, low + 32)
                for side, bits, dim in zip(sides, fmt, (1, 2), strict=False):
                    image = fake_quantize(side[:, head, span], mask[:, span], bits, dim)
                    side[:, head, span] = image
        return super().update(*sides, *args, **kwargs)


def sharpened(model):
    """The model with cross-attention that looks at few tokens, so that their keys matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "EncDecAttention" in name or ("encoder_attn" in name and weight.dim() > 1):
                weight.mul_(8.0)
    return model


def oracle(mask):
    layers = [PackedOnce(CROSS, mask) for _ in range(2)]
    return EncoderDecoderCache(FakeQuantizedCache(OWN, 2), HFCache(layers=layers))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_packed_caches_give_the_oracles_tokens(name, beams):
    model = sharpened(make(name))
    opt, _ = packed(model)
    ids, mask = padded(75)
    options = {
        "attention_mask": mask, "max_new_tokens": 80, "min_new_tokens": 80, "num_beams": beams,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    want = model.generate(ids, past_key_values=oracle(mask), **options)
    exact = model.generate(ids, **options)
    got = opt.generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    change = (got.logits[0] - exact.logits[0]).abs().max()
    assert change > 1e-2, "the first step reads packed keys already"


def rotated(model, layout=None):
    """All keys mixed before they are stored, in the format of the rewrite or in `layout`."""
    captured, rewrite = capture(model, example(model)), Rotated(bits=((2, 4),), groups=(32,))
    editor = GraphEditor(captured)
    for site in captured.sites:
        match = rewrite.match(site) if site.family == "kv_cache" else None
        if isinstance(match, Match):
            (candidate,) = rewrite.candidates(match, [Scenario("decode", 1, 1, 200)])
            scale = 2.0 ** torch.randint(-2, 3, (4, 8))
            with editor.applying(rewrite.name):
                rewrite.apply(match, candidate, {"scale": scale}, editor)
                if layout is not None:
                    editor.update(site, layout=layout)
    editor.finish()
    return emit(captured, editor, model)


@pytest.mark.parametrize("name", first(["bart", "t5"]))
def test_mixed_keys_change_no_score_in_any_phase(name):
    model = make(name)
    ids, mask = padded(75)
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    want, opt = model.generate(ids, **options), rotated(model, "")
    # two layers' keys of the encoder, once; their queries, and both of what is generated
    parts = (opt.parts.encoder, opt.parts.cross, opt.parts.step)
    found = [[node.target for node in part.graph.nodes] for part in parts]
    assert [targets.count(mix_channels) for targets in found] == [0, 2, 2]
    assert [targets.count(rotate_both) for targets in found] == [0, 0, 2]
    got = opt.generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    packed = rotated(model).generate(ids, **options)
    change = (packed.logits[0] - want.logits[0]).abs().max()
    assert 1e-5 < change < 1.0


def test_a_packed_cache_is_as_large_as_it_was_said_to_be():
    model = make("t5")
    opt, editor = packed(model)
    ids, mask = padded(75)
    cache = opt.make_cache(3, 50)
    assert not cache.filled
    with torch.no_grad():
        opt(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :50],
            past_key_values=cache)  # fmt: skip
    said = cache_bytes(editor.graph, Scenario("final", 3, 1, 49, source=75))
    assert cache.filled
    assert cache.nbytes == said
    exact = cache_bytes(capture(model, example(model)).graph, Scenario("", 3, 1, 49, source=75))
    assert said < 0.75 * exact


@pytest.mark.slow
def test_quality_is_measured_as_decoding_computes():
    model = sharpened(make("t5"))
    opt, editor = packed(model)
    ids, mask = (part[1:2] for part in padded(75))
    decoded = torch.randint(3, 61, (1, 90))
    inputs = {"attention_mask": mask, "decoder_input_ids": decoded}
    arguments = capture(model, example(model)).arguments(input_ids=ids, **inputs)
    measured = run_as_decoded(editor.graph, arguments, 1)[0]
    with torch.no_grad():
        cache = opt.make_cache(1, 90)
        hidden = opt.get_encoder()(input_ids=ids, attention_mask=mask)
        steps = [
            opt(encoder_outputs=hidden, attention_mask=mask, decoder_input_ids=token,
                past_key_values=cache).logits
            for token in decoded.split(1, 1)
        ]  # fmt: skip
    torch.testing.assert_close(measured, torch.cat(steps, 1), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        exact = model(input_ids=ids, **inputs).logits
    assert (measured - exact).abs().max() > 1e-2


def test_caches_are_reordered_selected_forked_and_reset(pair):
    _, opt = pair
    ids, mask = padded()
    start = torch.randint(3, 61, (3, 4))
    order = torch.tensor([2, 0, 1, 1])

    def decode(cache, rows, given):
        hidden = opt.get_encoder()(input_ids=ids[rows], attention_mask=mask[rows])
        return opt(encoder_outputs=hidden, attention_mask=mask[rows], decoder_input_ids=given,
                   past_key_values=cache).logits  # fmt: skip

    with torch.no_grad():
        cache = opt.make_cache(3, 10)
        decode(cache, slice(None), start)
        fork = cache.fork()
        fork.batch_select_indices(order)
        other = opt.make_cache(4, 10)
        decode(other, order, start[order])
        after = torch.randint(3, 61, (4, 1))
        want = decode(other, order, after)
        torch.testing.assert_close(decode(fork, order, after), want)
        cache.reorder_cache(order[:3])
        torch.testing.assert_close(decode(cache, order[:3], after[:3]), want[:3])
        cache.reset()
        assert not cache.filled
        assert cache.get_seq_length() == 0


@pytest.mark.slow
def test_saved_and_copied_modules_generate(tmp_path):
    opt, _ = packed(make("t5"))
    ids, mask = padded(40)
    options = {"attention_mask": mask, "max_new_tokens": 40}
    want = opt.generate(ids, **options)
    opt.save(tmp_path / "out")
    for other in (load(tmp_path / "out"), copy.deepcopy(opt)):
        assert other.parts.step is not None
        assert torch.equal(other.generate(ids, **options), want)


def test_phases_follow_the_module(pair):
    opt = copy.deepcopy(pair[1])
    first = opt.phase("step")
    opt.to("cpu")
    assert opt.phase("step") is not first


def test_wrong_caches_and_masks_are_one_error(pair):
    _, opt = pair
    ids, mask = padded()
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    with pytest.raises(FxoptError, match=r"past_key_values.*fxopt\.Cache.*DynamicCache"):
        opt(**inputs, past_key_values=DynamicCache())
    with pytest.raises(FxoptError, match="decoder_attention_mask: it has 6 columns"):
        opt(**inputs, use_cache=True, decoder_attention_mask=torch.ones(3, 6))


class Centred(nn.Linear):
    """A head to which all tokens of the call make a difference."""

    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True))


def test_a_decoder_that_mixes_tokens_generates_without_a_cache():
    model = make("t5")
    head = Centred(32, 61, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    captured = capture(model, example(model))
    assert "depends on where its piece begins" in captured.reason
    assert not captured.encoder_decoder
    opt = emit(captured, GraphEditor(captured), model)
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 6}
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(opt.generate(ids, **options), want)
    with pytest.raises(FxoptError, match=r"no cache: .*where its piece begins"):
        opt.make_cache(3, 10)


def test_a_decoder_alone_has_no_cut(case):
    assert split(case("llama").emit().program) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_budget_packs_both_kinds_of_cache(name, tmp_path):
    model = make(name).to(torch.bfloat16)
    ids = torch.randint(3, 61, (3, 140))
    inputs = {"input_ids": ids % 61, "decoder_input_ids": ids[:, :100]}
    opt = fxopt.optimize(
        model,
        fxopt.Budget(kv_cache="75%", kl=5.0, memory="100MiB"),
        example_inputs=inputs,
        workload=fxopt.Generate(batch=2, prompt=140, new_tokens=100),
    )
    rows = {row.name: row for row in opt.report.rows}
    cache = opt.make_cache(2, 100)
    with torch.no_grad():
        opt(**{n: v[:2] for n, v in inputs.items()}, past_key_values=cache)
    assert rows["kv_cache"].measured == cache.nbytes <= rows["kv_cache"].limit
    assert any(state.cross and state.layout for state in opt.program.states)
    text = str(opt.plan)
    assert "kv_cache.blocks" in text
    assert "the workload ends at 100 tokens and the first block is packed at 132" in text
    report = opt.export_onnx(tmp_path / "model.onnx")
    assert report.difference < 1e-4


@pytest.mark.slow
def test_generated_tokens_lie_on_pages():
    opt, _ = packed(make("t5"))
    ids, mask = padded(75)
    found = []
    caches = [opt.make_cache(6, 40, pool_tokens=tokens) for tokens in (6 * 90, None)]
    for cache in caches:
        torch.manual_seed(0)
        found.append(
            opt.generate(
                ids, attention_mask=mask, past_key_values=cache, num_beams=2, max_new_tokens=80,
                min_new_tokens=80, output_logits=True, return_dict_in_generate=True,
            )
        )  # fmt: skip
    assert torch.equal(*(result.sequences for result in found))
    for one, other in zip(*(result.logits for result in found), strict=True):
        assert torch.equal(one, other)
    assert 0 < caches[0].free_tokens < 6 * 90
    assert caches[1].free_tokens is None
