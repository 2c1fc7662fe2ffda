"""Blocks trained to the original's: what is trained, on what, how far, and never for worse."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.compiler import Compiler
from fxopt.decide import distill
from fxopt.decide.propose import Proposal
from fxopt.distilled import Distillation, distilled
from fxopt.request import resolve

RANK = 16


class Mlp(nn.Module):
    """Half of the hidden channels are loud, of full rank, and read by nobody; what the others hold
    has rank 16. A projection of `up` alone goes after the loud ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 192)
        self.down = nn.Linear(192, 64)
        with torch.no_grad():
            self.up.weight[:96] = torch.randn(96, RANK) @ torch.randn(RANK, 64) / 32
            self.up.weight[96:] = torch.randn(96, 64) / 16
            self.down.weight[:, 96:] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 128), nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def compiled(
    model: nn.Module, rewrites: Sequence[str], data: Sequence[Any], **options: Any
) -> Compiler:
    given: dict[str, Any] = {"keep": (), "at": None, "seed": 0, "time_limit": None, **options}
    request = resolve(
        model.eval(), fxopt.Budget(weights="50%"), data[0], workload=None, calibration=data,
        rewrites=rewrites, **given,
    )  # fmt: skip
    return Compiler(request)


def planted(rewrite: str, depth: int = 1, dtype: torch.dtype = torch.float32) -> Compiler:
    data = [torch.randn(1, 63, 64, dtype=dtype) for _ in range(24)]
    return compiled(Model(depth).to(dtype), [rewrite], data)


def mildest(compiler: Compiler) -> list[Proposal]:
    return [found[-1] for found in compiler.proposals.by_site.values() if found]


def chosen(compiler: Compiler, label: str) -> list[Proposal]:
    every = (p for found in compiler.proposals.by_site.values() for p in found)
    return [p for p in every if p.candidate.label == label]


def loud(compiler: Compiler) -> list[Proposal]:
    """The sites that the planted noise misleads, at the rank of what it hides."""
    return [p for p in chosen(compiler, f"rank{RANK}") if p.site.key.endswith("up")]


def distil(compiler: Compiler, proposals: Sequence[Proposal], **how: Any) -> Distillation:
    return distilled(compiler, proposals, fxopt.Distill(**how), compiler.preparer)


def measured(compiler: Compiler, proposals: Sequence[Proposal], made: Any = None) -> float:
    """The error of the whole model on sequences that neither fitting nor training saw."""
    return compiler.verify_reference.measure(compiler.realise(proposals, made).graph).mean


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_what_a_projection_of_one_layer_cannot_know_is_found() -> None:
    compiler = planted("linear.low_rank")
    proposals = loud(compiler)
    made = distil(compiler, proposals)
    (block,) = made.outcome.blocks
    assert block.block == "layers.0"
    assert block.after < 0.3 * block.before
    before, after = measured(compiler, proposals), measured(compiler, proposals, made)
    assert after**2 < 0.3 * before**2


@pytest.mark.slow
@pytest.mark.parametrize(
    "rewrite",
    [
        "linear.low_rank_pivoted",
        "linear.low_rank_shared",
        "linear.monarch",
        "linear.channel_pruned",
    ],
)
def test_every_structure_trains(rewrite: str) -> None:
    data = [torch.randn(1, 200, 64) for _ in range(36)]
    compiler = compiled(nn.Sequential(Gated()), [rewrite], data)
    proposals = mildest(compiler)
    disturbed = {p.site.key: _disturbed(compiler.preparer(p)) for p in proposals}
    made = distilled(compiler, proposals, fxopt.Distill(steps=40), lambda p: disturbed[p.site.key])
    (block,) = made.outcome.blocks
    assert block.block == "0"
    assert block.after < 0.9 * block.before
    for proposal in proposals:
        first, trained = disturbed[proposal.site.key], made(proposal)
        changed = {n for n, t in trained.items() if not torch.equal(t, first[n])}
        assert changed >= {n for n, t in first.items() if _trains(n, t)}
        assert changed.isdisjoint({"order", "kept"})


def test_of_codes_and_factors_the_factors_train() -> None:
    data = [torch.randn(1, 63, 512) for _ in range(12)]
    rewrites = ["linear.quantized_low_rank", "linear.quantized"]
    compiler = compiled(nn.Sequential(nn.Linear(512, 512, bias=False)), rewrites, data)
    every = [p for found in compiler.proposals.by_site.values() for p in found]
    mixed, codes = ([next(p for p in every if p.rewrite.name == name)] for name in rewrites)
    first = _disturbed(compiler.preparer(mixed[0]))
    made = distilled(compiler, mixed, fxopt.Distill(steps=4), lambda _: first)
    assert {n for n, t in made(mixed[0]).items() if not torch.equal(t, first[n])} == {"down", "up"}
    alone = distil(compiler, codes, steps=4)
    assert "nothing was distilled" in alone.said
    assert alone.outcome == distill.Outcome(0)
    assert equal(alone(codes[0]), compiler.preparer(codes[0]))


def _trains(name: str, tensor: Tensor) -> bool:
    """Most biases are the original's own: a rewrite has a copy to emulate with."""
    return tensor.is_floating_point() and not name.startswith("bias")


def _disturbed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        n: t + 0.2 * t.std() * torch.randn_like(t) if _trains(n, t) else t
        for n, t in tensors.items()
    }


def test_errors_are_those_of_blocks_behind_rewritten_ones() -> None:
    compiler = planted("linear.low_rank", depth=2, dtype=torch.float64)
    proposals = mildest(compiler)
    made = distil(compiler, proposals, steps=20, holdout=0.5)
    fit = compiler.request.calibration.fit
    x = torch.cat([batch["x"] for batch in fit[len(fit) // 2 :]])
    tensors = {p.site.key: (compiler.preparer(p), made(p)) for p in proposals}
    model = compiler.request.model
    assert isinstance(model, Model)

    def layer(k: int, x: Tensor, trained: int) -> Tensor:
        up, down = (tensors[f"layers.{k}.{name}"][trained] for name in ("up", "down"))
        hidden = F.linear(F.linear(x, up["down"]), up["up"], up["bias"])
        return F.linear(F.linear(F.relu(hidden), down["down"]), down["up"], down["bias"])

    new = exact = x
    with torch.no_grad():
        for k, block in enumerate(made.outcome.blocks):
            assert block.block == f"layers.{k}"
            y = model.layers[k](exact)
            errors = [
                float((layer(k, new, trained) - y).square().sum() / y.square().sum())
                for trained in (0, 1)
            ]
            assert [block.before, block.after] == pytest.approx(errors, rel=1e-9)
            exact, new = exact + y, new + layer(k, new, 1)


def test_steps_are_those_of_adam() -> None:
    data = [torch.randn(1, 31, 64, dtype=torch.float64) for _ in range(9)]
    compiler = compiled(nn.Sequential(nn.Linear(64, 64).double()), ["linear.low_rank"], data)
    proposals = mildest(compiler)
    how = {"steps": 20, "batch": 2, "learning_rate": 0.03, "holdout": 0.3, "patience": 20}
    made = distil(compiler, proposals, **how)
    # The same by hand: the best of what is seen after every step on the third sequence of three.
    first = compiler.preparer(proposals[0])
    factors = [first[n].clone().requires_grad_() for n in ("down", "up")]
    scales = [float(f.detach().square().mean().sqrt()) for f in factors]
    adam = torch.optim.Adam([{"params": [f]} for f in factors], betas=(0.9, 0.99))
    fit = [batch["input"] for batch in compiler.request.calibration.fit]
    targets = [compiler.request.model(x).detach() for x in fit]

    def loss(which: Sequence[int]) -> Tensor:
        pairs = [(targets[i], F.linear(F.linear(fit[i], factors[0]), factors[1])) for i in which]
        off = sum(((y - first["bias"] - yhat).square().sum()) for y, yhat in pairs)
        return torch.as_tensor(off) / sum(y.square().sum() for y, _ in pairs)

    generator = torch.Generator().manual_seed(0)
    best, kept = loss([2]).item(), [f.detach().clone() for f in factors]
    for step in range(20):
        for group, scale in zip(adam.param_groups, scales, strict=True):
            rising = min(1.0, (step + 1) / 2)
            group["lr"] = 0.03 * scale * rising * (1 - step / 20)
        adam.zero_grad()
        which = torch.randperm(2, generator=generator)[:2].tolist()
        (loss(which) * 31 * len(which)).backward()
        adam.step()
        if (now := loss([2]).item()) < best:
            best, kept = now, [f.detach().clone() for f in factors]
    assert made.outcome.blocks[0].after == pytest.approx(best, rel=1e-9)
    for name, value in zip(("down", "up"), kept, strict=True):
        torch.testing.assert_close(made(proposals[0])[name], value, rtol=1e-9, atol=1e-12)


@settings(max_examples=6)
@given(st.integers(0, 2**20), st.sampled_from([1e-4, 0.03, 3.0]), st.integers(1, 3))
def test_no_block_is_worse_than_it_was(seed: int, rate: float, patience: int) -> None:
    torch.manual_seed(seed)
    data = [torch.randn(1, 17, 64) for _ in range(7)]
    compiler = compiled(nn.Sequential(Mlp(), Mlp()), ["linear.low_rank"], data)
    proposals = mildest(compiler)
    made = distil(compiler, proposals, steps=6, learning_rate=rate, patience=patience, seed=seed)
    assert len(made.outcome.blocks) == 2
    for block in made.outcome.blocks:
        assert block.after <= block.before
        assert patience <= block.steps <= 6
        for proposal in proposals:
            if proposal.site.key.startswith(f"{block.block}."):
                same = equal(made(proposal), compiler.preparer(proposal))
                assert same == (block.after == block.before)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits() -> None:
    compiler = planted("linear.low_rank", depth=2)
    proposals = loud(compiler)
    one, again, other = (
        distil(compiler, proposals, steps=20, seed=seed, batch=2) for seed in (1, 1, 2)
    )
    assert all(equal(one(p), again(p)) for p in proposals)
    assert one.outcome == again.outcome
    assert not all(equal(one(p), other(p)) for p in proposals)


def test_what_was_fitted_stays_as_it_was() -> None:
    compiler = planted("linear.low_rank")
    proposals = loud(compiler)
    before = {
        p.site.key: {n: t.clone() for n, t in compiler.preparer(p).items()} for p in proposals
    }
    model = {n: t.clone() for n, t in compiler.request.model.state_dict().items()}
    assert distil(compiler, proposals, steps=20).improved
    assert all(equal(compiler.preparer(p), before[p.site.key]) for p in proposals)
    assert equal(compiler.request.model.state_dict(), model)
    assert all(p.grad is None for p in compiler.request.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(dtype: torch.dtype) -> None:
    compiler = planted("linear.low_rank", dtype=dtype)
    proposals = loud(compiler)
    made = distil(compiler, proposals, steps=60)
    (block,) = made.outcome.blocks
    assert block.after < 0.6 * block.before
    assert made(proposals[0])["down"].dtype == dtype


def test_a_site_in_no_numbered_module_is_a_block_of_its_own() -> None:
    data = [torch.randn(1, 63, 64) for _ in range(12)]
    alone = compiled(Mlp(), ["linear.low_rank"], data)
    made = distil(alone, mildest(alone), steps=2)
    assert [block.block for block in made.outcome.blocks] == ["up", "down"]
    # and sites that one group rewrites are one block
    grouped = compiled(Named(), ["linear.low_rank_shared", "linear.low_rank"], data)
    proposals = [p for p in mildest(grouped) if p.site.key in ("body.mlp.gate+up", "body.mlp.down")]
    assert len(proposals) == 2
    made = distil(grouped, proposals, steps=2)
    assert [block.block for block in made.outcome.blocks] == ["body.mlp"]


@pytest.mark.parametrize("rewrite", ["linear.low_rank", "linear.low_rank_shared"])
def test_what_stands_at_the_root_is_a_block(rewrite: str) -> None:
    data = [torch.randn(1, 63, 64) for _ in range(12)]
    # a layer that is the model, as one that `at=` names, or a group whose members the model holds
    model = nn.Linear(64, 64) if rewrite == "linear.low_rank" else Gated()
    compiler = compiled(model, [rewrite], data)
    proposals = mildest(compiler)
    disturbed = {p.site.key: _disturbed(compiler.preparer(p)) for p in proposals}

    def first(proposal: Proposal) -> Mapping[str, Tensor]:
        return disturbed[proposal.site.key]

    made = distilled(compiler, proposals, fxopt.Distill(steps=20, holdout=0.5), first)
    (block,) = made.outcome.blocks
    assert block.block == "(model)"
    # which returns what the model returns
    fit = compiler.request.calibration.fit
    x = torch.cat([next(iter(batch.values())) for batch in fit[len(fit) // 2 :]])
    graphs = [compiler.realise(proposals, tensors).graph for tensors in (first, made)]
    with torch.no_grad():
        y = model(x)
        errors = [(_returned(graph, x) - y).square().sum() / y.square().sum() for graph in graphs]
    assert [block.before, block.after] == pytest.approx([float(e) for e in errors], rel=1e-3)
    assert block.after < block.before


def _returned(graph: Any, x: Tensor) -> Tensor:
    return torch.cat([graph(one[None])[0] for one in x])


def test_blocks_that_cannot_be_trained_apart_are_counted() -> None:
    data = [torch.randn(1, 31, 64) for _ in range(7)]
    compiler = compiled(Interleaved(2), ["linear.low_rank"], data)
    made = distil(compiler, mildest(compiler), steps=2)
    assert [block.block for block in made.outcome.blocks] == ["layers.0"]
    assert "of 2 blocks are better" in made.said
    assert "1 could not be trained apart" in made.said


class Interleaved(Model):
    """Its first layer ends behind the second."""

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.layers[0]
        hidden = F.relu(first.up(x))
        return self.layers[1](x) + first.down(hidden)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"mlp": Gated()})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body["mlp"](x)


def test_time_and_ctrl_c_keep_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = planted("linear.low_rank", depth=3)
    proposals = mildest(compiler)
    whole = distil(compiler, proposals, steps=20)
    calls = 0

    def error(segment: Any, sequences: Any) -> float:
        nonlocal calls
        calls += segment.block.name == "layers.1"
        if calls == 3:
            raise KeyboardInterrupt
        return measure(segment, sequences)

    measure = distill._Segment.error  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(distill._Segment, "error", error)  # pyright: ignore[reportPrivateUsage]
    made = distil(compiler, proposals, steps=20)
    assert made.outcome.interrupted
    assert made.outcome.blocks == whole.outcome.blocks[:1]
    for proposal in proposals:
        first, trained = compiler.preparer(proposal), made(proposal)
        if proposal.site.key.startswith("layers.0"):
            assert equal(trained, whole(proposal))
        if proposal.site.key.startswith("layers.2"):
            assert equal(trained, first)
    assert "of 3 blocks are better on sequences held out; Ctrl-C ended it after 1" in made.said
    late = planted("linear.low_rank", depth=3)
    late.request = replace(late.request, deadline=time.monotonic())
    assert "the time limit ended it after 0" in distil(late, mildest(late)).said


def test_time_that_ends_before_the_first_step_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = planted("linear.low_rank")
    compiler.request = replace(compiler.request, deadline=5.0)
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def error(segment: Any, sequences: Any) -> float:
        clock.now = 10.0
        return measure(segment, sequences)

    measure = distill._Segment.error  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(distill._Segment, "error", error)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(distill, "time", clock)
    made = distil(compiler, mildest(compiler))
    assert "0 of 1 blocks are better" in made.said
    assert "the time limit ended it after 0" in made.said


def test_a_sequence_is_left_to_train_on() -> None:
    data = [torch.randn(1, 31, 64) for _ in range(6)]
    compiler = compiled(Model(1), ["linear.low_rank"], data)
    assert len(compiler.request.calibration.fit) == 2
    made = distil(compiler, loud(compiler), steps=5, holdout=0.75)
    assert [block.steps for block in made.outcome.blocks] == [5]
    assert "blocks are better on sequences held out" in made.said


def test_scalars_that_blocks_return_are_left_out() -> None:
    data = [torch.randn(1, 31, 64) for _ in range(7)]
    compiler = compiled(Balanced(), ["linear.low_rank"], data)
    made = distil(compiler, mildest(compiler), steps=2)
    assert [block.block for block in made.outcome.blocks] == ["layers.0", "layers.1"]


class Balanced(Model):
    """Returns what its layers add to a loss as well."""

    def __init__(self) -> None:
        super().__init__(2)
        self.layers = nn.ModuleList([WithLoss(), WithLoss()])

    def forward(self, x: Tensor) -> Any:
        loss = torch.zeros(())
        for layer in self.layers:
            x, added = layer(x)
            loss = loss + added
        return x, loss


class WithLoss(Mlp):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return x + y, y.square().mean()


def test_one_block_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []

    class Segment(distill._Segment):  # pyright: ignore[reportPrivateUsage]
        def __init__(self, *given: Any) -> None:
            assert not any(other() for other in held)
            held.append(weakref.ref(self))
            super().__init__(*given)

    monkeypatch.setattr(distill, "_Segment", Segment)
    compiler = planted("linear.low_rank", depth=3)
    distil(compiler, mildest(compiler), steps=1)
    assert len(held) == 3


def test_padding_is_not_trained_on() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=97,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 97, (9, 24))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0

    def padded(filler: int) -> list[dict[str, Tensor]]:
        filled = ids.masked_fill(mask == 0, filler)
        return [
            {"input_ids": i[None], "attention_mask": m[None]}
            for i, m in zip(filled, mask, strict=True)
        ]

    compiler = compiled(model, ["linear.low_rank"], padded(0))
    proposals = mildest(compiler)
    one = distil(compiler, proposals, steps=3, learning_rate=1e-3)
    fit = replace(compiler.request.calibration, fit=tuple(padded(50)[:3]))
    compiler.request = replace(compiler.request, calibration=fit)
    other = distil(compiler, proposals, steps=3, learning_rate=1e-3)
    blocks = [block.block for block in one.outcome.blocks]
    assert blocks == ["model.layers.0", "lm_head"]
    for a, b in zip(one.outcome.blocks, other.outcome.blocks, strict=True):
        assert (a.before, a.after) == pytest.approx((b.before, b.after), rel=1e-4)
