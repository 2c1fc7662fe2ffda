"""What packed caches cost in quality on the tiny trained model, and whether the solver spends well.

    python benchmarks/kv_quality.py [--windows 36] [--documents 100] [--random 20] [--device cuda]

Two tables. Every layout in all heads ("h" behind it: of rotated keys): bytes of the cache, KL and
agreement of the likeliest byte on held-out text, as decoding behind a prompt of 512 bytes sees it,
the share of attention that fell on packed tokens there, and exact retrieval at 4,096 bytes by free
decoding: in four turns, of which each asks the same cache for another value. Then, at the bytes of
three uniform layouts, the plan that `optimize` decides head by head against that layout, the best
other uniform one and the best of random assignments of as many bytes. Decisions are made on other
text than they are measured on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import fxopt
from fxopt import coverage
from fxopt.compiler import Compiler
from fxopt.decide.propose import Proposal
from fxopt.request import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_lm_data import MODEL_DIR, heldout_windows, retrieval_turns

LENGTH, PROMPT = 2048, 512
WORKLOAD = fxopt.Generate(batch=1, prompt=PROMPT, new_tokens=LENGTH - PROMPT)
BYTES = ("k4v4g128r64s4", "k4v2g128r64s4", "k2v2g128r64s4")
Choice = Mapping[str, str]
"""The layout of each head by its site; a head that is left out is stored exactly."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=36, help="a third of them to measure on")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--random", type=int, default=20, help="0: no second table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    bench = Bench(args.windows, args.device)
    for layout in ("", *bench.layouts):
        choice = {} if not layout else dict.fromkeys(bench.heads, layout)
        line = {"layout": layout or "exact", **bench.scores(choice)}
        if args.documents:
            line["retrieval"] = bench.retrieval(choice, args.documents)
        print(json.dumps(line), flush=True)
    if not args.random:
        return
    k4v4, k4v2, k2v2 = (bench.bytes(dict.fromkeys(bench.heads, layout)) for layout in BYTES)
    for name, limit in (("K4V4", k4v4), ("K4V2", k4v2), ("midway to K2V2", (k4v2 + k2v2) // 2)):
        print(json.dumps({"bytes of": name, **bench.contest(limit, args.random)}), flush=True)


class Bench:
    """The tiny model, its heads' candidates, and text to decide and to measure on."""

    def __init__(self, windows: int, device: str) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        self.model = model.to(device)
        self.device = device
        text = heldout_windows(LENGTH)[:windows].to(device)
        self.options: dict[str, Any] = {
            "workload": WORKLOAD, "calibration": [{"input_ids": row[None]} for row in text],
            "rewrites": ["kv_cache"],
        }  # fmt: skip
        self.example = {"input_ids": text[:1]}
        budget = fxopt.Budget(kv_cache="100%", minimize="error")
        request = resolve(
            model, budget, self.example, **self.options, keep=(), at=None, seed=0, time_limit=None
        )
        self.made = Compiler(request)
        sites = self.made.proposals.by_site
        self.offered: dict[str, dict[str, Proposal]] = {
            key: {p.candidate.label: p for p in found}
            for (family, key), found in sites.items()
            if family == "kv_cache"
        }
        self.heads = list(self.offered)
        self.layouts = list(next(iter(self.offered.values())))

    def graph(self, choice: Choice) -> Any:
        chosen = [self.offered[head][label] for head, label in choice.items()]
        return self.made.realise(chosen)

    def bytes(self, choice: Choice) -> int:
        return self.made.kv_cache_bytes(self.graph(choice).graph)

    def scores(self, choice: Choice) -> dict[str, float]:
        """Bytes as a share of 16 bits, KL in nats a byte and agreement of the likeliest byte."""
        graph = self.graph(choice).graph
        exact = self.made.kv_cache_bytes(self.made.captured.graph, element_size=2)
        total, same, count = 0.0, 0, 0
        for batch, known in self.known:
            places = self.made.quality.positions(batch)
            found = self.made.evaluate(graph, batch, places).log_softmax(-1)
            total += float((known.exp() * (known - found)).sum())
            same += int((known.argmax(-1) == found.argmax(-1)).sum())
            count += known.shape[:-1].numel()
        share = self.made.kv_cache_bytes(graph) / exact
        packed = coverage.look(self.made, graph).packed
        return {
            "bytes": round(share, 4), "kl": total / count, "top1": round(same / count, 4),
            "on_packed": round(sum(packed) / len(packed), 4) if packed else 0.0,
        }  # fmt: skip

    @cached_property
    def known(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Each text to measure on with the exact model's log-probabilities."""
        exact, quality = self.made.captured.graph, self.made.quality
        return [
            (batch, self.made.evaluate(exact, batch, quality.positions(batch)).log_softmax(-1))
            for batch in self.made.request.calibration.verify
        ]

    @torch.no_grad()
    def retrieval(self, choice: Choice, documents: int) -> list[float]:
        """Turn by turn, the share of documents whose six bytes are decoded without an error. Each
        turn goes on from the cache of the one before, the module's own answers in it."""
        module: Any = self.made.emit(self.graph(choice))
        text, answers = retrieval_turns(documents)
        found = [0] * len(answers)
        for known in text.split(25):
            part, done = known.to(self.device, copy=True), 0
            cache = module.make_cache(*part.shape)
            for turn, answer in enumerate(answers):
                # the last token apart, so that the rest of a question is read back from the cache
                module(part[:, done : answer.start - 1], past_key_values=cache, logits_to_keep=1)
                done = answer.stop - 1
                for i in range(answer.start - 1, done):
                    output = module(part[:, i : i + 1], past_key_values=cache, logits_to_keep=1)
                    part[:, i + 1] = output.logits[:, -1].argmax(-1)
                found[turn] += int((part[:, answer].cpu() == known[:, answer]).all(1).sum())
        return [count / documents for count in found]

    def contest(self, limit: int, count: int) -> dict[str, Any]:
        """KL of the decided plan within `limit` bytes, and of its rivals."""
        opt = fxopt.optimize(
            self.model, fxopt.Budget(kv_cache=limit, minimize="error"), self.example, **self.options
        )
        decided = {
            d.key: d.label for d in opt.plan.decisions if d.family == "kv_cache" and d.rewritten
        }
        uniform = [dict.fromkeys(self.heads, layout) for layout in self.layouts]
        fitting = [choice for choice in uniform if self.bytes(choice) <= limit]
        drawn = [self.drawn(limit, seed) for seed in range(count)]
        ours = self.scores(decided)
        best = {
            "uniform": min(self.scores(c)["kl"] for c in fitting),
            "random": min(self.scores(c)["kl"] for c in drawn),
        }
        return {
            "share": ours["bytes"], "decided": ours["kl"], **best,
            "ratio": round(ours["kl"] / min(best.values()), 3), "layouts": counted(decided),
        }  # fmt: skip

    def drawn(self, limit: int, seed: int) -> Choice:
        """A random assignment that fits: heads in random order change until it does, and then as
        far as bytes are left."""
        chance = random.Random(seed)
        choice = {head: chance.choice(self.layouts) for head in self.heads}
        while self.bytes(choice) > limit:
            choice[chance.choice(self.heads)] = chance.choice(self.layouts)
        for head in chance.sample(self.heads, len(self.heads)):
            other = {**choice, head: chance.choice(self.layouts)}
            if self.bytes(choice) < self.bytes(other) <= limit:
                choice = other
        return choice


def counted(choice: Choice) -> dict[str, int]:
    labels: Sequence[str] = sorted(choice.values())
    return {label: labels.count(label) for label in dict.fromkeys(labels)}


if __name__ == "__main__":
    main()
