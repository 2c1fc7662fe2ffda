"""The rewrite `kv_cache.blocks`: where it fits, what it says it costs, what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.decide.options import calls_of
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Generate, Scenario, scenarios
from fxopt.kernels.kv_attention import allocate, cached_attention, parse, state_bytes
from fxopt.kernels.kv_attention.filled import fill
from fxopt.passes.baseline import baseline_calls
from fxopt.passes.kv_cache.blocks import Blocks, exact_calls

INFO = AttentionInfo(
    num_heads=8, num_kv_heads=2, head_dim=64, value_dim=64, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=False, cached=True,
)  # fmt: skip
WORK = scenarios(Generate(batch=2, prompt=700, new_tokens=64))
FINAL = Scenario("final", 2, 1, 763, repeats=0)


def site(head: int = 0, **changes: Any) -> Site:
    info = replace(INFO, **changes)
    return Site("kv_cache", f"layers.0.attn/kv={head}", "attend", info, "layers.0.attn", head)


def matched(head: int = 0, **changes: Any) -> Match:
    found = Blocks().match(site(head, **changes))
    assert isinstance(found, Match)
    return found


def offered(label: str) -> Candidate:
    found = {candidate.label: candidate for candidate in Blocks().candidates(matched(), WORK)}
    return found[label]


def test_candidates_are_few_and_each_saves_bytes() -> None:
    match = matched()
    found = Blocks().candidates(match, [*WORK, FINAL])
    assert len(found) == len({c.label for c in found}) == 10
    exact = exact_calls(INFO, FINAL)[0].state_bytes
    assert exact == 2 * 764 * (64 + 64) * 4
    sizes = {c.label: Blocks().lower(match, c, FINAL)[0].state_bytes for c in found}
    assert all(size < 0.5 * exact for size in sizes.values())
    # Only keys as e4m3 numbers take what integers do.
    assert sizes.pop("kf8vf8g128r64s4") == sizes["k8vf8g128r64s4"] < sizes["k8v8g128r64s4"]
    assert len(set(sizes.values())) == len(sizes)


def test_plans_say_which_numbers_are_stored() -> None:
    candidate = offered("k8vf8g128r64s4")
    assert candidate.parameters == {
        "key_bits": 8, "value_bits": "f8", "group": 128, "residual": 64, "sink": 4,
    }  # fmt: skip


def test_state_bytes_are_those_of_the_layer() -> None:
    for candidate in Blocks().candidates(matched(), WORK):
        heads = sum(Blocks().lower(matched(h), candidate, FINAL)[0].state_bytes for h in range(2))
        layer = state_bytes(parse(candidate.label), 2, 2, 64, 64, FINAL.length, 4)
        # Each class has one list of block starts, of 8 bytes a block.
        assert 0 <= heads - layer <= 8 * (FINAL.length // 64 + 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cached": False}, "reads no cache"),
        ({"cross": True, "cached": False}, "reads no cache"),
        ({"causal": False}, "not causal"),
        ({"head_dim": 7, "value_dim": 7}, "channels divisible by 2, got 7"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    rewrite = Blocks(bits=((4, 4), (2, 2))) if "head_dim" in changes else Blocks()
    found = rewrite.match(site(**changes))
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_other_sites_are_refused() -> None:
    linear = Site("linear", "a", "n", LinearInfo("w", None, 8, 8, torch.float32), "a")
    assert isinstance(Blocks().match(linear), Refusal)
    blocked = replace(site(), blocked="no positions")
    assert Blocks().match(blocked) == Refusal("no positions")


def test_head_sizes_decide_the_bits_of_keys() -> None:
    def bits(size: int) -> set[str]:
        found = Blocks().candidates(matched(head_dim=size, value_dim=size), WORK)
        return {candidate.label.partition("g")[0] for candidate in found}

    assert bits(8) == {"k8v8", "k8vf8", "kf8vf8", "k8v4", "k4v4", "k4v2", "k2v2"}
    assert bits(6) == bits(8) - {"k2v2"}
    assert bits(7) == {"k8v8", "k8vf8", "kf8vf8", "k8v4"}


def test_short_workloads_are_refused_with_the_numbers() -> None:
    short = scenarios(Generate(batch=1, prompt=100, new_tokens=20))
    assert Blocks().candidates(matched(), short) == []
    reason = Blocks().refusal(matched(), short)
    assert reason is not None
    assert "ends at 111 tokens" in reason
    assert "packed at 132 (4 sink + 64 residual + a block of 64)" in reason
    assert Blocks().refusal(matched(), WORK) is None
    enough = [Scenario("decode", 1, 1, 131)]
    assert {c.parameters["group"] for c in Blocks().candidates(matched(), enough)} == {64}


def test_calls_can_be_timed_and_read_fewer_bytes() -> None:
    match, decode, prefill = matched(), WORK[1], WORK[0]
    (exact,) = exact_calls(INFO, decode)
    keys = {exact.key}
    for candidate in Blocks().candidates(match, WORK):
        call, fill = (Blocks().lower(match, candidate, s)[0] for s in (decode, prefill))
        assert call.bytes_read < 0.5 * exact.bytes_read
        assert fill.run is not None
        assert fill.flops == 0
        assert fill.state_bytes < call.state_bytes
        keys |= {call.key, fill.key}
    assert len(keys) == 1 + 2 * 10
    for timed in (exact, call):
        assert timed.run is not None
        step = timed.run("cpu")
        assert step().shape == (2, 1, 4 * timed.share, 64)
        assert step().isfinite().all()


def test_a_run_that_stores_a_prompt_stores_it_each_time() -> None:
    """Blocks of a state that is full are packed again."""
    packed = Blocks().lower(matched(), offered("k4v4g64r64s4"), WORK[0])[0]
    for call in (*exact_calls(INFO, WORK[0]), packed):
        assert call.run is not None
        store: Any = call.run("cpu")
        part, new, *_ = store.args
        for _ in range(2):
            part["key"].zero_()
            store()
            assert part["key"].any()
            assert call is packed or torch.equal(part["key"], new["key"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_window_limits_what_is_read(packed: bool) -> None:
    candidate = offered("k4v4g64r64s4")
    cache: Any = SimpleNamespace(match=matched(), rewrite=Blocks(), candidate=candidate)
    near: Any = SimpleNamespace(candidate=SimpleNamespace(parameters={"window": 64}))
    sites = (replace(site(), family="attention"), site())
    chosen = {"kv_cache": cache} if packed else {}
    (whole,) = calls_of(sites, chosen, WORK[1], baseline_calls)
    (window,) = calls_of(sites, {**chosen, "attention": near}, WORK[1], baseline_calls)
    (own,) = calls_of((sites[0], site(window=64)), chosen, WORK[1], baseline_calls)
    assert window.bytes_read < 0.2 * whole.bytes_read
    assert window.state_bytes == whole.state_bytes
    assert window.key != whole.key
    assert own.bytes_read == window.bytes_read


class Editor:
    """Records what a rewrite asks of the graph."""

    def __init__(self, layout: str) -> None:
        self.kwargs = {"layout": layout}

    def node(self, site: Site) -> Any:
        return SimpleNamespace(kwargs=self.kwargs)

    def update(self, site: Site, **kwargs: Any) -> None:
        self.kwargs.update(kwargs)


def test_apply_merges_heads() -> None:
    rewrite, editor = Blocks(), Editor("")
    first, second = offered("k4v4g64r64s4"), offered("k4v4g128r64s4")
    for head, candidate, expected in (
        (1, first, "0:exact|1:k4v4g64r64s4"),
        (0, second, "0:k4v4g128r64s4|1:k4v4g64r64s4"),
        (0, first, "k4v4g64r64s4"),
    ):
        rewrite.apply(matched(head), candidate, {}, editor)  # type: ignore[arg-type]
        assert editor.kwargs["layout"] == expected


@pytest.mark.parametrize("label", ["k2v2g64r64s4", "kf8vf8g128r64s4"])
def test_emulation_is_decoding(label: str) -> None:
    """What `emulate` returns is what the op returns step by step over the layout it applies."""
    total, prompt = 230, 200
    q, k, v = torch.randn(1, 8, total, 64), *torch.randn(2, 1, 2, total, 64)
    mask = torch.ones(1, total, dtype=torch.long)
    mask[:, :5] = 0
    inputs: dict[str, Any] = {
        "q": q, "k": k, "v": v, "mask": mask, "bias": None, "sinks": None, "scale": 0.125,
        "causal": True, "prompt": prompt, "layout": "",
    }  # fmt: skip
    candidate = offered(label)
    out = Blocks().emulate(
        matched(), candidate, Blocks().prepare(matched(), candidate, None), inputs
    )  # type: ignore[arg-type]
    layout = candidate.label
    state = allocate(parse(layout), 1, 2, 64, 64, total, torch.float32)
    start = torch.zeros((), dtype=torch.int64)
    rows: list[Tensor] = []
    for count in [prompt, *[1] * (total - prompt)]:
        done = int(start)
        new = [t[:, :, done : done + count] for t in (q, k, v)]
        seen = mask[:, : done + count]
        rows.append(
            cached_attention(
                *new, state, start, seen, None, None, 0.125, True, [0], 0.0, [0], layout
            )
        )
        start += count
    torch.testing.assert_close(out, torch.cat(rows, 1), rtol=2e-6, atol=2e-6)


CROSS = {"cross": True, "causal": False}


def test_cross_attention_is_packed_whole() -> None:
    decode = Scenario("decode", 2, 1, 299)
    (exact,) = exact_calls(matched(**CROSS).site.info, decode)
    assert exact.state_bytes == 2 * 300 * (64 + 64) * 4
    found = Blocks().candidates(matched(**CROSS), [decode])
    assert found
    for candidate in found:
        (call,) = Blocks().lower(matched(**CROSS), candidate, decode)
        assert (candidate.parameters["residual"], candidate.parameters["sink"]) == (0, 0)
        k, v = torch.randn(2, 1, 300, 64), torch.randn(2, 1, 300, 64)
        state = fill(k, v, None, candidate.label)
        assert call.state_bytes == sum(tensor.nbytes for tensor in state) < exact.state_bytes
        assert call.run is not None
        assert call.run("cpu")().shape == (2, 1, 4 * call.share, 64)


def test_a_source_shorter_than_a_block_is_refused() -> None:
    match = matched(**CROSS)
    reason = Blocks().refusal(match, [Scenario("decode", 2, 1, 39)])
    assert reason is not None
    assert "encoder's result has 40 tokens, fewer than a block of 64" in reason


def test_float8_values_are_chosen_where_their_zeros_are_what_is_too_much(tmp_path: Path) -> None:
    """And the plan, saved, gives the same module."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(1, 97, (1, 320))} for _ in range(3)]
    layout = "k8vf8g128r64s4"
    limit = state_bytes(parse(layout), 1, 1, 16, 16, 320, 4)
    opt = fxopt.optimize(
        model, fxopt.Budget(kv_cache=limit, minimize="error"), batches[0],
        workload=fxopt.Generate(batch=1, prompt=260, new_tokens=60), calibration=batches,
        rewrites=["kv_cache.blocks"],
    )  # fmt: skip
    assert [state.layout for state in opt.program.states] == [layout]
    opt.plan.save(tmp_path / "plan.json")
    again = fxopt.apply(model, fxopt.Plan.load(tmp_path / "plan.json"))
    assert [state.layout for state in again.program.states] == [layout]
    ids = batches[1]["input_ids"][:, :300]
    want, got = (x.generate(ids, max_new_tokens=12, do_sample=False) for x in (opt, again))
    assert torch.equal(want, got)
