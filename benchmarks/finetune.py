"""Fine-tuning with exact and with rounded saved tensors: are the losses the same within noise?

    python benchmarks/finetune.py [--out finetune.jsonl] [--steps 500] [--seeds 3] [--plans int8]
    python benchmarks/finetune.py --plot finetune.jsonl --svg docs/images/finetune.svg

The tiny model, trained on source code, is fine-tuned on the prose of docs/; two pages are held out.
Every plan sees the same batches under a seed. `exact` computes tensors again and rounds nothing, so
its steps are eager's to the bit. One JSON line a run, written when it ends: the loss of each step;
`heldout` nats a byte before and after; `cosine` of the gradient of all parameters with eager's on
one batch, before and after, and `worst` that of the weight that is off most; `activations` the peak
of a step as a share of eager's; `by` counts tensors by what happens to them. Runs that the file has
are not run again, and plans are kept beside it by what was asked for, so that a run can be ended at
any time. At the end, and with --plot, a table: over the seeds, the mean and the largest distance
from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fxopt
from fxopt.training import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
import finetune_plot
from tiny_lm_data import MODEL_DIR, heldout_windows, nats_per_byte

PAGES = Path(__file__).resolve().parents[1] / "docs"
HELD_OUT = ("plans.md", "refusals.md")

Line = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """Rows and rewrites of a plan; codes of tensors that have `int4` in their names get 4 bits."""

    activations: str
    relative_error: float | None
    rewrites: list[str]
    int4: str | None = None


ROUNDED = "activation.quantized_saved"
PLANS = {
    "exact": Asked("60%", None, ["activation.recompute"]),
    "int8": Asked("22%", 0.05, [ROUNDED]),
    "int8 and int4": Asked("22%", 0.05, [ROUNDED], int4=".mlp."),
    "2-bit derivatives": Asked("82%", 0.4, ["activation.approximate_backward"]),
}


def main() -> None:
    args = arguments()
    if args.plot:
        lines = [json.loads(line) for line in args.plot.read_text().splitlines()]
        args.svg.write_text(finetune_plot.svg(lines))
        print(table(lines))
        return
    bench = Bench(args)
    lines = bench.known()
    done = {(line["plan"], line["seed"]) for line in lines}
    for seed in range(args.seeds):
        for name in args.plans:
            if (name, seed) not in done:
                lines.append(bench.run(name, seed))
    print(table(lines))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=3e-4, help="of AdamW")
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=PLANS)
    parser.add_argument("--out", type=Path, default=Path("finetune.jsonl"))
    parser.add_argument("--plot", type=Path, help="draw this file, run nothing")
    parser.add_argument("--svg", type=Path, default=Path("docs/images/finetune.svg"))
    return parser.parse_args()


@dataclass(frozen=True)
class Text:
    """The pages of docs/ as bytes, some of them held out."""

    training: bytes
    heldout: bytes

    @classmethod
    def of_pages(cls) -> Text:
        texts = {page.name: page.read_bytes() for page in sorted(PAGES.glob("*.md"))}
        heldout = b"".join(texts.pop(name) for name in HELD_OUT)
        return cls(b"".join(texts.values()), heldout)

    @property
    def digest(self) -> str:
        """Tells texts apart: the pages change."""
        return hashlib.sha256(self.training + self.heldout).hexdigest()[:12]

    def batches(self, seed: int, count: int, batch: int, seq: int) -> Iterator[Tensor]:
        """Random windows of the training text, int64 [batch, seq]."""
        ids = torch.frombuffer(bytearray(self.training), dtype=torch.uint8).long()
        draws = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(len(ids) - seq, (batch, 1), generator=draws)
            yield ids[starts + torch.arange(seq)]


class Bench:
    """One setting: the text, the size of steps, and the file of what was run with them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.text = args, Text.of_pages()
        self.setting = {name: getattr(args, name) for name in ("steps", "batch", "seq", "lr")}
        self.setting["text"] = self.text.digest
        self.windows = heldout_windows(args.seq, self.text.heldout)
        self.example = inputs(self.windows[: args.batch].to(args.device))

    def known(self) -> list[Line]:
        """The runs of the file; ValueError where they are of another setting."""
        if not self.args.out.exists():
            return []
        lines = [json.loads(line) for line in self.args.out.read_text().splitlines()]
        for line in lines:
            other = {name: line[name] for name in self.setting if line[name] != self.setting[name]}
            if other:
                raise ValueError(f"{self.args.out} has runs of {other}: name another --out")
        return lines

    def run(self, name: str, seed: int) -> Line:
        """Fine-tune from the trained weights; the line is written when all is known."""
        model = self.tiny()
        opt = self.optimised(name, model)
        first = agreement(model, opt, self.example)
        losses = list(self.losses(opt, seed))
        last = agreement(model, opt, self.example)
        after = nats_per_byte(model, self.windows)
        row = next(row for row in opt.plan.totals if row.name == "activations")
        line = {
            "plan": name,
            "seed": seed,
            **self.setting,
            "heldout": [self.heldout, after],
            "cosine": [first[0], last[0]],
            "worst": [first[1], last[1]],
            "activations": row.measured / row.before,
            "by": Counter(f"{d.rewrite} {d.label}".strip() for d in opt.plan.decisions),
            "losses": losses,
        }
        with self.args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}, seed {seed}: {after:.4f} nats a byte held out", flush=True)
        return line

    @cached_property
    def heldout(self) -> float:
        """Nats a byte before."""
        return nats_per_byte(self.tiny(), self.windows)

    def tiny(self) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        return model.to(self.args.device).train()

    def optimised(self, name: str, model: nn.Module) -> Any:
        """`model` by the plan that all seeds share."""
        asked = PLANS[name]
        options = f"{asked}{self.args.batch}x{self.args.seq}{self.text.digest}"
        digest = hashlib.sha256(options.encode()).hexdigest()[:8]
        path = self.args.out.with_suffix(f".{name.replace(' ', '-')}.{digest}.json")
        if not path.exists():
            self.decided(asked, model).save(path)
        return fxopt.apply(model, fxopt.Plan.load(path), example_inputs=self.example)

    def decided(self, asked: Asked, model: nn.Module) -> fxopt.Plan:
        opt: Any = fxopt.optimize(
            model,
            fxopt.Budget(activations=asked.activations, relative_error=asked.relative_error),
            self.example,
            workload=fxopt.Train(self.args.batch, self.args.seq),
            rewrites=asked.rewrites,
        )
        for decision in opt.plan.rewritten:
            if asked.int4 is not None and asked.int4 in decision.key:
                opt.plan.lock(decision.key, ROUNDED, "int4")
        return opt.plan

    def losses(self, opt: Any, seed: int) -> Iterator[float]:
        """The loss of each step of AdamW."""
        args = self.args
        optimiser = torch.optim.AdamW(opt.parameters(), lr=args.lr, betas=(0.9, 0.95))
        for ids in self.text.batches(seed, args.steps, args.batch, args.seq):
            loss = opt(**inputs(ids.to(args.device))).loss
            loss.backward()
            nn.utils.clip_grad_norm_(opt.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            yield loss.item()


def inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


def agreement(model: nn.Module, opt: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Cosines of gradients, `opt`'s with eager's: of all parameters, and the least of a weight."""
    eager, found = (measure.outcome(module, batch).tensors for module in (model, opt))
    names = [name for name in eager if name.startswith(measure.GRADIENT)]
    pairs = {n: (eager[n].double().flatten(), found[n].double().flatten()) for n in names}
    everything = (torch.cat(side) for side in zip(*pairs.values(), strict=True))
    matrices = [pairs[n] for n in names if eager[n].dim() > 1]
    return cosine(*everything), min(cosine(*pair) for pair in matrices)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, 0).item()


def table(lines: Sequence[Line]) -> str:
    """A row a plan: bytes, gradients, and what is held out, against exact under the same seed."""
    exact = {line["seed"]: line["heldout"][1] for line in lines if line["plan"] == "exact"}
    rows = ["| plan | activations | cosine | worst weight | held out | off exact, same seed |"]
    rows.append("|---|---|---|---|---|---|")
    for name in dict.fromkeys(line["plan"] for line in lines):
        own = [line for line in lines if line["plan"] == name]
        least = [f"{min(min(line[key]) for line in own):.5f}" for key in ("cosine", "worst")]
        ends = [line["heldout"][1] for line in own]
        off = [abs(x["heldout"][1] - exact[x["seed"]]) for x in own if x["seed"] in exact]
        mean = statistics.mean(ends)
        spread = max(abs(end - mean) for end in ends)
        away = f"{max(off):.4f}" if off and name != "exact" else ""
        size = f"{own[0]['activations']:.0%}"
        rows.append(
            f"| {name} | {size} | {least[0]} | {least[1]} | {mean:.4f} ± {spread:.4f} | {away} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
