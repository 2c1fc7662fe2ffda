"""Plans of any size without a model: Llama's sites and graph, decided at random."""

from __future__ import annotations

import random

from fxopt.ir.budget import Budget
from fxopt.ir.cost import Cost
from fxopt.ir.errors import RowResult
from fxopt.ir.evidence import Block, Generated, Looser, Trial
from fxopt.ir.plan import KEEP, Alternative, Decision, Plan, Refused
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


def llama(layers: int, heads: int, seed: int = 0) -> Plan:
    """A plan of `layers` x (2 x `heads` + 7) sites with 10 alternatives each; no two layers of it
    are decided alike."""
    chance = random.Random(seed)
    decisions: list[Decision] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for head in range(heads):
            key = f"{prefix}.self_attn/kv={head}"
            decisions.append(_decision(chance, key, "attention", 0))
            decisions.append(_decision(chance, key, "kv_cache", 0))
        for name, (rows, columns) in LINEARS.items():
            decisions.append(_decision(chance, f"{prefix}.{name}", "linear", rows * columns * 2))
    rows = [
        RowResult("weights", 6e9, 5.9e9, 5.97e9, "bytes", before=1.6e10),
        RowResult("kl", 0.02, 0.008, 0.011, "nats", before=0.0),
    ]
    then = [RowResult("weights", 6e9, 7e9, None, "bytes", before=5.9e9)]
    then.append(RowResult("latency", None, 0.8, None, "s", before=1.0))
    return Plan(
        created_by="fxopt test",
        budget=Budget(kl=0.02, weights="6GB"),
        workload=Generate(1, 2048, 256),
        decisions=decisions,
        refusals=[Refused(family="linear", key="lm_head", reason="tied to model.embed_tokens")],
        totals=rows,
        trials=[Trial(rows=rows, holds=True, taken=True), Trial(rows=rows, holds=False)],
        looser=[Looser(row="weights", limit=7.5e9, unit="bytes", rows=then)],
        blocks=[_block(decisions, f"model.layers.{layer}", layer) for layer in range(layers)],
        sources=[
            Generated(
                modules=[f"model.layers.{layer}.mlp"],
                text=f"class LlamaMLP_{layer}(nn.Module):\n" + "    # generated\n" * 60,
            )
            for layer in range(layers)
        ],
    )


def _decision(chance: random.Random, key: str, family: str, weights: int) -> Decision:
    rewrite = {"attention": "window", "kv_cache": "blocks", "linear": "low_rank"}[family]
    options = [
        Alternative(
            rewrite=f"{family}.{rewrite}",
            label=f"option{number}",
            parameters={"rank": 16 * number, "group_size": 64},
            cost=Cost(1e-5 * number, weights * number // 11, 0 if weights else 4096 * number),
            error=(error := chance.expovariate(1e4)),
            feasible=number > 2,
            reason=f"error {error:.2e} against 0.00e+00",
        )
        for number in range(1, 11)
    ]
    kept = Alternative(rewrite=KEEP, cost=Cost(2e-4, weights, 0 if weights else 65536), error=0.0)
    decision = Decision(
        key=key,
        family=family,  # pyright: ignore[reportArgumentType]
        cost=kept.cost,
        error=0.0,
        reason=f"the budget holds without it: option1 would err by {chance.random():.2e}",
        alternatives=options,
    )
    if chance.random() < 0.6:
        chosen = chance.choice(options)
        decision.choose(chosen.rewrite, chosen.label)
        decision.reason = f"gains 1.5x speed; error {chosen.error:.2e} nats (measured)"
    return decision


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
        after = f"%{leaf} = fxopt.low_rank_linear({x}, {name}.down f32[{layer}, 9]) {tail}"
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
