"""The rewrite `kv_cache.rotated`: no score changes, packed keys lose less, heads stay apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.decide.statistics import Recorded
from fxopt.decide.verify import weight_bytes
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import OptimizedModule, emit
from fxopt.ir.ops import attend, mix_channels, rotate_both
from fxopt.ir.rewrite import Match, Refusal
from fxopt.ir.site import AttentionInfo, Site
from fxopt.ir.workload import Generate, scenarios
from fxopt.kernels.kv_attention.layout import parse
from fxopt.passes.kv_cache.blocks import Blocks
from fxopt.passes.kv_cache.calls import rotation_call
from fxopt.passes.kv_cache.rotated import Rotated, channel_scale, hadamard, rotations
from tests.crossed import first
from tests.oracle import FakeQuantizedCache, FakeQuantizedLayer, fake_quantize

INFO = AttentionInfo(
    num_heads=4, num_kv_heads=2, head_dim=64, value_dim=64, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=False, has_bias=False, has_sinks=False, cross=False,
    cached=True,
)  # fmt: skip
WORK = scenarios(Generate(batch=2, prompt=700, new_tokens=64))
SIZES = st.sampled_from([2, 8, 32, 64, 128, 256])
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def site(head: int = 0, **changes: Any) -> Site:
    info = replace(INFO, **changes)
    return Site("kv_cache", f"layers.0.attn/kv={head}", "attend", info, "layers.0.attn", head)


def matched(head: int = 0, **changes: Any) -> Match:
    found = Rotated().match(site(head, **changes))
    assert isinstance(found, Match)
    return found


def recorded(total: int = 512, prompt: int = 320, outliers: float = 1.0) -> dict[str, Any]:
    """Attention that some channels decide, whose keys have two other channels larger by `outliers`,
    and queries smaller there: the scores are those without."""
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, total, 64), *torch.randn(2, 1, 2, total, 64)
    widths = torch.logspace(-0.7, 0.3, 64)
    q, k = q * widths, k * widths
    k[..., [3, 40]] *= outliers
    q[..., [3, 40]] /= outliers
    return {"q": q, "k": k, "v": v, "scale": 0.125, "causal": True, "prompt": prompt}


def lost(rewrite: Blocks, inputs: dict[str, Any], **given: Tensor) -> float:
    """The relative error of the output past the prompt under the one candidate."""
    match = rewrite.match(site())
    assert isinstance(match, Match)
    (candidate,) = rewrite.candidates(match, WORK)
    tensors = given or rewrite.prepare(match, candidate, Recorded(inputs=inputs))
    exact = attend(**{name: x for name, x in inputs.items() if name != "prompt"})
    found = rewrite.emulate(match, candidate, tensors, inputs)
    decoded = slice(inputs["prompt"], None)
    return float((found - exact)[:, decoded].norm() / exact[:, decoded].norm())


@given(SIZES)
def test_the_mixing_is_sylvesters(size: int) -> None:
    assert torch.equal(hadamard(size), torch.tensor(sylvester(size)).float())


@given(SIZES, DTYPES, st.integers(0, 99))
def test_no_score_changes(size: int, dtype: torch.dtype, seed: int) -> None:
    """The matrices hold no rounded number: their product is the identity to the bit."""
    steps = torch.randint(-5, 6, (3, size), generator=torch.Generator().manual_seed(seed))
    query, key = rotations(2.0**steps * (1 - 2 * (steps % 2)), dtype)
    assert query.dtype == key.dtype == dtype
    product = query.double() @ key.double().mT
    assert torch.equal(product, torch.eye(size, dtype=torch.float64).expand(3, -1, -1))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_each_head_has_its_own_matrix(batch: int, kv: int, group: int, tokens: int) -> None:
    x = torch.randn(batch, kv * group, tokens, 5, dtype=torch.float64)
    matrices = torch.randn(kv, 5, 3, dtype=torch.float64)
    mixed = mix_channels(x, matrices)
    assert mixed.shape == (batch, kv * group, tokens, 3)
    for head in range(kv * group):
        torch.testing.assert_close(mixed[:, head], x[:, head] @ matrices[head // group])


@given(st.sets(st.integers(0, 3), min_size=1), st.integers(1, 4), st.integers(0, 9))
def test_heads_without_a_matrix_stay_as_they_are(heads: set[int], group: int, tokens: int) -> None:
    x = torch.randn(2, 4 * group, tokens, 5, dtype=torch.float64)
    matrices = torch.randn(len(heads), 5, 5, dtype=torch.float64)
    mixed = mix_channels(x, matrices, sorted(heads), 4)
    for head in range(4 * group):
        of = head // group
        want = x[:, head] @ matrices[sorted(heads).index(of)] if of in heads else x[:, head]
        torch.testing.assert_close(mixed[:, head], want)


@given(st.lists(st.integers(-3, 3), min_size=64, max_size=64), st.integers(0, 9))
def test_what_queries_make_up_for_is_made_up_for_before(powers: list[int], seed: int) -> None:
    """Keys scaled by powers of two and queries by their inverses are packed as before."""
    torch.manual_seed(seed)
    q, k = torch.randn(1, 2, 40, 64), torch.randn(1, 1, 40, 64)
    scale = channel_scale({"q": q, "k": k})
    assert torch.equal(scale.abs().log2(), scale.abs().log2().round())
    assert abs(scale.abs().log2().mean()) < 0.5
    by = 2.0 ** torch.tensor(powers)
    moved = channel_scale({"q": q / by, "k": k * by})
    near = (moved * by / scale).log2()
    # all channels of a head may move together, and a ratio between two powers to either
    assert (near - near.median()).abs().max() <= 1


def test_matrices_have_no_gradients() -> None:
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    matrices = torch.randn(1, 8, 8, requires_grad=True)
    mix_channels(x, matrices).square().sum().backward()
    assert x.grad is not None
    assert matrices.grad is None


def test_padding_and_dead_channels_do_not_matter() -> None:
    q, k = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 70, 16)
    k[..., 5], q[..., 6] = 0, 0
    mask = torch.ones(2, 70)
    mask[0, :30] = 0
    scale = channel_scale({"q": q, "k": k, "mask": mask})
    k[0, :, :30] = 1e4 * torch.randn(2, 30, 16)
    assert torch.equal(channel_scale({"q": q, "k": k, "mask": mask}), scale)
    assert not torch.equal(channel_scale({"q": q, "k": k}), scale)
    assert scale.isfinite().all()
    assert channel_scale({"q": q * 0, "k": k[:, :, :1] * 0}).abs().eq(1).all()


def test_what_is_constant_hardly_counts() -> None:
    """A bias of a channel, as Qwen2.5 has, is in the zero of a block."""
    inputs = recorded()
    scale = channel_scale(inputs)
    inputs["k"][..., 7] += 20
    assert (channel_scale(inputs)[:, 7] / scale[:, 7]).abs().min() >= 0.5
    inputs["k"][..., 7] += 2e4
    assert (channel_scale(inputs)[:, 7] / scale[:, 7]).abs().max() < 0.5


@pytest.mark.parametrize("bits", [4, 2])
def test_planted_outlier_channels_tell_axes_apart(bits: int) -> None:
    """Per channel they cost nothing, per token or mixed with others as they are everything; once
    balanced, mixing gains as much as without them."""
    options: dict[str, Any] = {"bits": ((bits, 16),), "groups": (64,)}
    plain, mixed = Blocks(**options), Rotated(**options)
    calm, planted = recorded(), recorded(outliers=32.0)
    blocks, balanced = lost(plain, calm), lost(mixed, planted)
    assert lost(plain, planted) == pytest.approx(blocks, rel=1e-3)
    assert balanced == pytest.approx(lost(mixed, calm), rel=0.1)
    assert balanced < 0.8 * blocks
    assert lost(mixed, planted, scale=channel_scale(planted).sign()) > 1.5 * blocks
    valid = torch.ones((), dtype=torch.bool)
    keys = planted["k"][:, :, :256]
    token, channel = (fake_quantize(keys, valid, bits, dim) - keys for dim in (3, 2))
    q = planted["q"][:, ::2, 256:]
    per_token, per_channel = ((q @ error.mT).norm() for error in (token, channel))
    assert per_token > 1.5 * per_channel


def test_candidates_and_refusals() -> None:
    found = Rotated().candidates(matched(), WORK)
    plain = {c.label: c for c in Blocks().candidates(matched(), WORK)}
    assert {c.label for c in found} == {
        f"k{k}v{v}g{g}r64s4h" for k, v in ((4, 4), (4, 2), (2, 2)) for g in (64, 128)
    }
    assert all(c.parameters == plain[c.label[:-1]].parameters for c in found)
    odd = Rotated().match(site(head_dim=96))
    assert isinstance(odd, Refusal)
    assert "a power of two channels, not 96" in odd.reason
    assert Rotated().match(site(cached=False)) == Blocks().match(site(cached=False))


def test_products_are_in_the_price() -> None:
    candidate = Rotated().candidates(matched(), WORK)[0]
    for scenario in WORK:
        cache, rotation = Rotated().lower(matched(), candidate, scenario)
        assert cache.key == Blocks().lower(matched(), candidate, scenario)[0].key
        rows = 3 * scenario.batch * scenario.queries  # one key and two queries a token
        assert rotation.flops == 2 * rows * 64 * 64
        assert rotation.weight_bytes == 2 * 64 * 64 * 4
        assert rotation.state_bytes == 0
        assert rotation.run is not None
        sides = rotation.run("cpu")()
        assert [x.shape[1] for x in sides] == [4, 2]
    cross = matched(cross=True, causal=False)
    rotation = Rotated().lower(cross, candidate, WORK[1])[1]
    assert rotation.flops == 2 * 2 * 2 * 64 * 64  # its keys were rotated before
    assert rotation.run is not None
    assert len(rotation.run("cpu")()) == 1


class RotatedLayer(FakeQuantizedLayer):
    """Keys are stored as the mixing of the test's own matrices leaves them, and mixed back."""

    def __init__(self, layout: str, mask: Tensor | None, matrices: Tensor) -> None:
        super().__init__(layout, mask)
        self.matrices = matrices

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        mixed = key_states @ self.matrices
        keys, values = super().update(mixed, value_states, *args, **kwargs)
        return keys @ torch.linalg.inv(self.matrices), values


def tiny() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=96,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def rotated(model: nn.Module, scale: Tensor, heads: tuple[int, ...]) -> OptimizedModule:
    """`model` with 2-bit keys everywhere, those of `heads` mixed."""
    captured = capture(model, {"input_ids": torch.randint(1, 97, (2, 11))})
    editor = GraphEditor(captured)
    options: dict[str, Any] = {"bits": ((2, 4),), "groups": (32,), "residual": 8}
    work = scenarios(Generate(batch=1, prompt=100, new_tokens=10))
    for found in captured.sites:
        if found.family != "kv_cache":
            continue
        rewrite = (Rotated if found.head in heads else Blocks)(**options)
        match = rewrite.match(found)
        assert isinstance(match, Match)
        (candidate,) = rewrite.candidates(match, work)
        with editor.applying(rewrite.name):
            rewrite.apply(match, candidate, {"scale": scale}, editor)
    editor.finish()
    return emit(captured, editor, model)


@pytest.mark.parametrize("heads", [(0, 1), (1,)])
def test_decoding_is_that_of_the_original_over_mixed_keys(heads: tuple[int, ...]) -> None:
    model = tiny().double()
    scale = 2.0 ** torch.randint(-2, 3, (2, 16)) * (1 - 2 * torch.randint(0, 2, (2, 16)))
    opt = rotated(model, scale, heads)
    (layout,) = {state.layout for state in opt.program.states}
    assert layout == "k2v4g32r8s4"  # heads that differ in nothing else are of one class
    matrices = torch.eye(16).repeat(2, 1, 1)
    for head in heads:
        matrices[head] = scale[head].diag() @ torch.tensor(sylvester(16)).float() / 4
    ids = torch.randint(1, 96, (2, 80))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = FakeQuantizedCache(layout, 2, mask)
    cache.layers = [RotatedLayer(layout, mask, matrices.double()) for _ in range(2)]
    mode: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    want = model.generate(ids, past_key_values=cache, **mode)  # type: ignore[operator]
    got = opt.generate(ids, **mode)
    assert torch.equal(want.sequences, got.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits))
    # without a cache nothing is packed
    torch.testing.assert_close(opt(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("heads", first([(1,), (0,), (0, 1)]))
def test_only_heads_that_are_mixed_have_matrices(heads: tuple[int, ...]) -> None:
    """As many bytes as each of them is priced with."""
    scale = torch.tensor([1.0, 2.0])[:, None].expand(2, 16)
    opt = rotated(tiny(), scale, heads)
    attention = opt.get_submodule("model.layers.0.self_attn")
    for side, name in enumerate(("query_rotation", "key_rotation")):
        held: Any = getattr(attention, name)
        assert torch.equal(held, rotations(scale, torch.float32)[side][list(heads)])
    # with the rotary embeddings, in one line of both sides; layers in a loop
    assert opt.source.count("query_rotation, self.key_rotation") == 1
    assert "mix_channels(" not in opt.source
    priced = rotation_call(replace(INFO, head_dim=16), WORK[0]).weight_bytes
    held = weight_bytes(opt) - weight_bytes(rotated(tiny(), scale, ()))
    assert held == 2 * len(heads) * priced  # of two layers


@pytest.mark.parametrize("heads", [(1,), (0, 1)])
def test_no_call_more_than_without(heads: tuple[int, ...]) -> None:
    scale = torch.ones(2, 16)
    calls = [
        [node.target for node in rotated(tiny(), scale, some).graph.nodes
         if node.op == "call_function"]
        for some in ((), heads)
    ]  # fmt: skip
    assert calls[0] == calls[1]
    assert calls[0].count(rotate_both) == 2  # layers


def test_a_plan_with_it_is_saved_and_replayed(tmp_path: Path) -> None:
    model = tiny()
    batches = [{"input_ids": torch.randint(1, 97, (1, 240))} for _ in range(3)]
    options: dict[str, Any] = {
        "workload": fxopt.Generate(batch=1, prompt=200, new_tokens=40), "calibration": batches,
        "rewrites": ["kv_cache.rotated"],
    }  # fmt: skip
    budget = fxopt.Budget(kv_cache="130%", minimize="error")
    opt = fxopt.optimize(model, budget, batches[0], **options)
    assert {d.rewrite for d in opt.plan.rewritten} == {"kv_cache.rotated"}
    held = sum(x.nbytes for n, x in opt.named_parameters() if n.endswith("_rotation"))
    assert held == 2 * 2 * 2 * 16 * 16 * 4
    opt.plan.save(tmp_path / "plan.json")
    opt.save(tmp_path / "saved")
    ids = batches[1]["input_ids"][:, :200]
    want = opt.generate(ids, max_new_tokens=12, do_sample=False)
    for other in (
        fxopt.apply(model, fxopt.Plan.load(tmp_path / "plan.json")),
        fxopt.load(tmp_path / "saved"),
    ):
        assert [parse(s.layout) for s in other.program.states] == [
            parse(s.layout) for s in opt.program.states
        ]
        assert torch.equal(other.generate(ids, max_new_tokens=12, do_sample=False), want)
