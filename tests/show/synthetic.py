"""Plans of any size without a model: Llama's sites and graph, decided at random."""

from __future__ import annotations

import random
from dataclasses import replace

from fxopt.ir.budget import Budget
from fxopt.ir.cost import Cost
from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Block, Generated, Looser, Pair, Price, Trial
from fxopt.ir.plan import KEEP, Alternative, Decision, Plan, Refused
from fxopt.ir.units import format_value
from fxopt.ir.workload import Generate

LINEARS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}

CHANGED = [
    " %a = aten.relu(%x) -> f32[8] in",
    "-%gone = aten.neg(%a) -> f32[8] in m",
    "+%new = my.op(%a) -> f32[8] in m",
    "-%b = aten.add(%a, %gone) -> f32[8] at m",
    "+%b = aten.mul(%a, %new) -> f32[8] at m",
]
"""The lines of a block: a call that stays, one removed, one added, one rewritten."""
PRICED = {"objective": "latency", "objective_unit": "s"}


def llama(layers: int, heads: int, seed: int = 0) -> Plan:
    """A plan of `layers` x (2 x `heads` + 7) sites with 10 alternatives each; no two layers of it
    are decided alike."""
    chance = random.Random(seed)
    decisions: list[Decision] = []
    pairs: list[Pair] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for head in range(heads):
            key = f"{prefix}.self_attn/kv={head}"
            halves = [_decision(chance, key, family, 0) for family in ("attention", "kv_cache")]
            decisions += halves
            pairs.append(_pair(*halves))
        for name, (rows, columns) in LINEARS.items():
            decisions.append(_decision(chance, f"{prefix}.{name}", "linear", rows * columns * 2))
    rows = [
        RowResult("weights", 6e9, 5.9e9, 5.97e9, "bytes", before=1.6e10),
        RowResult("kl", 0.02, 0.008, 0.011, "nats", before=0.0),
    ]
    then = [RowResult("weights", 6e9, 7e9, None, "bytes", before=5.97e9)]
    then.append(RowResult("kl", 0.02, 0.0115, None, "nats", before=0.011))
    then.append(RowResult("latency", None, 0.8, None, "s", before=1.0))
    latency = RowResult("latency", None, 1.0, None, "s", before=2.5)
    failed = [replace(row, measured=(row.measured or 0) * 2) for row in rows]
    failed.append(replace(latency, predicted=0.9))
    return Plan(
        created_by="fxopt test",
        budget=Budget(kl=0.02, weights="6GB"),
        workload=Generate(1, 2048, 256),
        decisions=decisions,
        refusals=[Refused(family="linear", key="lm_head", reason="tied to model.embed_tokens")],
        totals=rows,
        trials=[
            Trial(rows=failed, holds=False),
            Trial(rows=[*rows, latency], holds=True, taken=True),
        ],
        prices=[
            Price(row="weights", unit="bytes", price=1e-10, used=0.98, **PRICED),
            Price(row="kl", unit="nats", price=0.0, used=0.4, **PRICED),
        ],
        looser=[
            Looser(row="weights", limit=7.5e9, unit="bytes", rows=then),
            Looser(row="kl", limit=0.04, unit="nats", rows=[], solved=False),
        ],
        pairs=pairs,
        untried=["linear.low_rank_shared"],
        blocks=[_block(decisions, f"model.layers.{layer}", layer) for layer in range(layers)],
        sources=[
            Generated(
                modules=[f"model.layers.{layer}.mlp"],
                text=f"class LlamaMLP_{layer}(nn.Module):\n" + "    # generated\n" * 60,
            )
            for layer in range(layers)
        ],
    )


def _pair(attention: Decision, cache: Decision) -> Pair:
    """What the two are as one: what they take adds up in every choice."""
    both = attention.rewritten and cache.rewritten
    return Pair(
        key=attention.key,
        choices=[attention.choice, cache.choice],
        kept=Alternative(
            rewrite=KEEP,
            cost=Cost(4e-4, 0, 131072),
            error=0.0,
            calls={"prefill": 1.6e-4, "decode": 8e-7},
            timed=["prefill", "decode"],
            reason="needs 64 KiB more of kv_cache, which is used up",
        ),
        reason="saves 64 KiB of kv_cache, which is used up: worth 2 ms elsewhere" if both else "",
        error_measured=True if both else None,
    )


def _decision(chance: random.Random, key: str, family: str, weights: int) -> Decision:
    rewrite = {"attention": "window", "kv_cache": "blocks", "linear": "monarch"}[family]
    options = [
        Alternative(
            rewrite=f"{family}.{rewrite}",
            label=f"option{number}",
            parameters={"rank": 16 * number, "group_size": 64},
            cost=Cost(1e-5 * number, weights * number // 11, 0 if weights else 4096 * number),
            error=chance.expovariate(1e4),
            feasible=number > 2,
            calls={"prefill": 4e-6 * number, "decode": 2e-8 * number},
            timed=["decode"],
            error_measured=number == 4,
        )
        for number in range(1, 11)
    ]
    kept = Alternative(
        rewrite=KEEP,
        cost=Cost(2e-4, weights, 0 if weights else 65536),
        error=0.0,
        calls={"prefill": 8e-5, "decode": 4e-7},
        timed=["prefill", "decode"],
    )
    decision = Decision(
        key=key,
        family=family,  # pyright: ignore[reportArgumentType]
        cost=kept.cost,
        error=0.0,
        reason=f"no candidate pays; the nearest, option1: errs {chance.random():.3g} nats more",
        alternatives=options,
        calls=kept.calls,
        timed=kept.timed,
    )
    if chance.random() < 0.6:
        chosen = chance.choice(options)
        decision.choose(chosen.rewrite, chosen.label)
        decision.reason = "saves 64 KiB of weights, which is used up: worth 1.5 ms elsewhere"
    for other in decision.alternatives:
        other.reason = _reason(other, decision)
    return decision


def _reason(other: Alternative, decision: Decision) -> str:
    """As many different texts as plans of real models have: sizes and times are those of a layer,
    errors each site's own."""
    if not other.feasible:
        return f"errs {other.error:.3g} nats alone, and the whole budget is 0.02 nats"
    times = other.cost.seconds, decision.cost.seconds
    slower = "takes {} against {}".format(*(format_value(t, "s") for t in times))
    bytes_ = (c.cost.weight_bytes + c.cost.state_bytes for c in (other, decision))
    more = next(bytes_) - next(bytes_)
    size = format_value(abs(more), "bytes")
    errs = (other.error or 0.0) - (decision.error or 0.0)
    if more > 0:
        return f"needs {size} more of weights, which is used up" + (
            f"; {slower}" if times[0] > times[1] else ""
        )
    if errs > 0:
        return f"errs {errs:.3g} nats more, and kl is used up"
    if times[0] > times[1]:
        return f"{slower}; the {size} of weights that it frees are worth 1.2 µs"
    return "better by costs corrected after the choice; not solved again"


def _block(decisions: list[Decision], module: str, layer: int) -> Block:
    """One decoder layer: norms and rotations of several calls, the linear layers rewritten."""
    rewritten = {d.key for d in decisions if d.rewritten}
    lines: list[str] = []
    count = 0

    def plain(op: str, inputs: str, where: str) -> str:
        nonlocal count
        count += 1
        lines.append(f" %{op}_{count} = aten.{op}({inputs}) -> f32[batch, length, 64] in {where}")
        return f"%{op}_{count}"

    def linear(name: str, x: str) -> str:
        leaf = name.rpartition(".")[2]
        tail = f"-> f32[batch, length, {LINEARS[name][0]}] at {name}"
        shape = "{}, {}".format(*LINEARS[name])
        before = f"%{leaf} = aten.linear({x}, {name}.weight f32[{shape}]) {tail}"
        after = f"%{leaf} = fxopt.monarch_linear({x}, {name}.right f32[2, {layer}, 9]) {tail}"
        changed = f"{module}.{name}" in rewritten
        lines.extend([f"-{before}", f"+{after}"] if changed else [f" {before}"])
        return f"%{leaf}"

    def norm(x: str, where: str) -> str:
        squared = plain("pow", f"{x}, 2", where)
        return plain("mul", f"{x}, {plain('rsqrt', plain('mean', squared, where), where)}", where)

    x = norm("%input", "input_layernorm")
    q, k, v = (linear(f"self_attn.{name}_proj", x) for name in "qkv")
    for _ in range(4):
        q, k = plain("mul", f"{q}, %cos", "self_attn"), plain("mul", f"{k}, %cos", "self_attn")
    lines.append(f" %attend = attend({q}, {k}, {v}) -> f32[batch, length, 8, 64] at self_attn")
    x = plain("add", f"%input, {linear('self_attn.o_proj', '%attend')}", "")
    lines[-1] = lines[-1].rstrip()
    y = norm(x, "post_attention_layernorm")
    gate = plain("silu", linear("mlp.gate_proj", y), "mlp.act_fn")
    y = plain("mul", f"{gate}, {linear('mlp.up_proj', y)}", "mlp")
    plain("add", f"{x}, {linear('mlp.down_proj', y)}", "")
    lines[-1] = lines[-1].rstrip()
    before = f"model.layers.{layer - 1}/add_{count}" if layer else "/embedding"
    return Block(modules=[module], lines=lines, inputs={"input": [before], "cos": ["/cos"]})
