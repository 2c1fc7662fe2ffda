"""Peak memory against step time of a training step: fxopt under budgets, and its peers.

    python benchmarks/training_memory.py [--model llama] [--layers 4] [--batch 2] [--seq 256]
    python benchmarks/training_memory.py --memory 6GiB 5GiB --peers checkpoint compile --out a.jsonl
    python benchmarks/training_memory.py --plot a.jsonl --svg docs/images/training-memory.svg

One JSON line a run, written at once. `peak` is what a step has alive at the most, parameters and
gradients included and no optimiser (the allocator's statistic on CUDA, storages on a CPU);
`seconds` the median of steps in turn with eager's, whose median in the same turns is `eager`;
`gradients` by how much all gradients are off together, relative to eager's first; `equal` whether
loss and gradients are eager's bit for bit. Of fxopt `predicted` is the peak that its plan says and
`added` the seconds beyond eager's, `planning` those until the module was there; `by` counts tensors
by what happens to them. Peers: `checkpoint` each layer (`gradient_checkpointing_enable`),
`selective` the same but that products and attention are saved, `selective-products` and
`selective-attention` that one of them is, `compile` is `torch.compile` under each
`activation_memory_budget` of `--stock`, `aot` the same without Inductor, `chunker` Inductor's
auto-chunker; `liger` and `cce` are eager with the loss, and of Liger the MLPs and norms, of these
packages. One that is not installed is a line with "absent"; what fails, or would end after
`--time-limit`, is a line that says so. Random weights: speed and bytes, never quality.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fxopt
from fxopt.training import measure
from fxopt.training.module import clone

sys.path.insert(0, str(Path(__file__).parent))
import training_plot

Way = Callable[[nn.Module], Any]
"""Model -> a context with the module that trains it, and facts of that module."""


def main() -> None:
    args = arguments()
    if args.plot:
        lines = [json.loads(line) for path in args.plot for line in path.read_text().splitlines()]
        args.svg.write_text(training_plot.svg(lines))
        return
    torch.manual_seed(0)
    begun = time.monotonic()
    with torch.device(args.device):
        model = build(args).to(getattr(torch, args.dtype)).train()
    bench = Bench(model, batch(args), args, begun)
    kind = torch.device(args.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=args.autocast):
        bench.run("eager", {}, as_it_is)
        for name, facts, way in ways(args):
            bench.run(name, facts, way)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["llama", "gpt2", "vit"], default="gpt2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--mlp", type=int, help="width of a llama's MLP")
    parser.add_argument("--kv-heads", type=int, help="of a llama")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256, help="of a ViT the width of an image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--memory", nargs="*", default=[], help="memory rows, as 6GiB")
    parser.add_argument("--shares", nargs="*", type=float, default=[], help="activations rows")
    parser.add_argument("--error", type=float, help="the relative_error row")
    parser.add_argument("--rewrites", nargs="*", help="names, as for fxopt.optimize")
    parser.add_argument("--peers", nargs="*", default=["checkpoint"], choices=PEERS)
    parser.add_argument("--stock", nargs="*", type=float, default=[1.0], help="PyTorch's budgets")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    parser.add_argument("--plot", nargs="*", type=Path, help="draw these files, measure nothing")
    parser.add_argument("--svg", type=Path, default=Path("docs/images/training-memory.svg"))
    return parser.parse_args()


def build(args: argparse.Namespace) -> nn.Module:
    """A causal language model, of which GPT-2 has dropout, or a classifier of images."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    heads = max(1, args.hidden // 64)
    if args.model == "gpt2":
        config = GPT2Config(
            n_embd=args.hidden, n_layer=args.layers, n_head=heads, vocab_size=args.vocabulary,
            n_positions=args.seq, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    if args.model == "vit":
        images = ViTConfig(
            hidden_size=args.hidden, intermediate_size=4 * args.hidden, image_size=args.seq,
            num_hidden_layers=args.layers, num_attention_heads=heads, patch_size=16,
        )  # fmt: skip
        return ViTForImageClassification(images)
    llama = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.mlp or args.hidden * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=heads,
        num_key_value_heads=args.kv_heads or heads, use_cache=False,
        vocab_size=args.vocabulary, max_position_embeddings=args.seq,
    )  # fmt: skip
    return LlamaForCausalLM(llama)


def batch(args: argparse.Namespace) -> dict[str, Tensor]:
    if args.model == "vit":
        pixels = torch.randn(args.batch, 3, args.seq, args.seq, device=args.device)
        return {"pixel_values": pixels, "labels": pixels.new_zeros(args.batch).long()}
    ids = torch.randint(args.vocabulary, (args.batch, args.seq), device=args.device)
    return {"input_ids": ids, "labels": ids}


def ways(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], Way]]:
    """Every run but eager's: name, what was asked of it, and how to make it."""
    budgets = [{"memory": limit} for limit in args.memory]
    budgets += [{"activations": f"{share:.0%}"} for share in args.shares]
    for budget in budgets:
        yield "fxopt", budget, partial(optimised, budget, args)
    for peer in args.peers:
        if peer in ("compile", "aot"):
            backend = {"compile": "inductor", "aot": "aot_eager"}[peer]
            for share in args.stock:
                yield peer, {"budget": share}, partial(compiled, share, backend)
        else:
            yield peer, {}, ALONE[peer]


@contextmanager
def as_it_is(model: nn.Module) -> Generator[tuple[nn.Module, dict[str, Any]]]:
    yield model, {}


@contextmanager
def optimised(
    budget: dict[str, Any], args: argparse.Namespace, model: nn.Module
) -> Generator[tuple[nn.Module, dict[str, Any]]]:
    begun = time.monotonic()
    try:
        opt: Any = fxopt.optimize(
            model,
            fxopt.Budget(**budget, relative_error=args.error),
            batch(args),
            workload=fxopt.Train(args.batch, args.seq),
            rewrites=args.rewrites,
        )
    except fxopt.BudgetError as error:
        opt = error.best
    rows = {row.name: row for row in opt.plan.totals}
    slow = rows.get("latency")
    counted = Counter(f"{d.rewrite} {d.label}".strip() for d in opt.plan.decisions)
    yield (
        opt,
        {
            "predicted": rows["memory"].predicted,
            "added": slow.predicted - slow.before if slow else None,
            "held": opt.report.kept,
            "planning": round(time.monotonic() - begun, 1),
            "by": counted,
        },
    )


@contextmanager
def checkpointed(model: nn.Module, **more: Any) -> Generator[tuple[nn.Module, dict[str, Any]]]:
    twin: Any = clone(model)
    twin.gradient_checkpointing_enable({"use_reentrant": False, **more})
    yield twin, {}


def selective(model: nn.Module, saved: Sequence[str] = ("products", "attention")) -> Any:
    """Checkpointing but for the results of `saved`."""
    aten = torch.ops.aten
    attention = [
        getattr(aten, f"_scaled_dot_product_{kind}").default
        for kind in (
            "flash_attention", "efficient_attention", "cudnn_attention",
            "flash_attention_for_cpu",
        )
    ]  # fmt: skip
    products = [aten.mm.default, aten.addmm.default]
    ops = [op for name in saved for op in {"products": products, "attention": attention}[name]]
    return checkpointed(model, context_fn=partial(create_selective_checkpoint_contexts, ops))


@contextmanager
def compiled(
    share: float, backend: str, model: nn.Module
) -> Generator[tuple[nn.Module, dict[str, Any]]]:
    torch.compiler.reset()
    with functorch.patch(activation_memory_budget=share):
        yield torch.compile(clone(model), backend=backend), {}  # pyright: ignore


@contextmanager
def chunker(model: nn.Module) -> Generator[tuple[nn.Module, dict[str, Any]]]:
    torch.compiler.reset()
    yield torch.compile(clone(model), options={"auto_chunker.enable": True}), {}  # pyright: ignore


@contextmanager
def liger(model: nn.Module) -> Generator[tuple[nn.Module, dict[str, Any]]]:
    package: Any = import_module("liger_kernel.transformers.monkey_patch")
    twin = clone(model)
    package._apply_liger_kernel_to_instance(model=twin)
    yield twin, {}


@contextmanager
def cce(model: nn.Module) -> Generator[tuple[nn.Module, dict[str, Any]]]:
    package: Any = import_module("cut_cross_entropy.transformers")
    yield package.cce_patch(clone(model)), {}


ALONE: dict[str, Way] = {
    "checkpoint": checkpointed,
    "selective": selective,
    "selective-products": partial(selective, saved=["products"]),
    "selective-attention": partial(selective, saved=["attention"]),
    "chunker": chunker,
    "liger": liger,
    "cce": cce,
}
"""Peers that take no budget."""
PEERS = (*ALONE, "compile", "aot")


class Bench:
    """One model and batch; measures each way beside eager, and writes a line of it."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any], args: argparse.Namespace, begun: float
    ) -> None:
        self.model, self.inputs, self.args, self.begun = model, inputs, args, begun
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.held = 2 * sum(p.nbytes for p in self.parameters)
        self.truth: list[Tensor] | None = None
        """Eager's loss and gradients, on the host; None where its step does not fit."""

    def run(self, name: str, asked: dict[str, Any], way: Way) -> None:
        line: dict[str, Any] = {"run": name, **asked, "tokens": self.args.batch * self.args.seq}
        left = self.begun + self.args.time_limit - time.monotonic()
        try:
            with until(left), way(self.model) as (module, facts):
                line |= {"held_by_gradients": self.held, **self.facts(module), **facts}
        except ImportError as error:
            line["absent"] = str(error)
        except Exception as error:  # a peer that does not run here is a line as well
            line["failed"] = f"{type(error).__name__}: {error}"[:300]
        # what the error's frames held is gone by now
        self.clear()
        text = json.dumps(line)
        print(text, flush=True)
        if self.args.out:
            with self.args.out.open("a") as file:
                file.write(text + "\n")

    def facts(self, module: nn.Module) -> dict[str, Any]:
        counts = self.args.device.startswith("cuda") or not hasattr(module, "_orig_mod")
        peak = self.peak(module) if counts else None  # counting storages turns compilation off
        return {"peak": peak, **self.compared(module), **self.timed(module)}

    def peak(self, module: nn.Module) -> int:
        if not self.args.device.startswith("cuda"):
            weights = sum(t.nbytes for t in {*self.model.parameters(), *self.model.buffers()})
            return weights + measure.peak(module, self.inputs)
        for _ in range(2):  # the first allocates what stays: workspaces of libraries, say
            self.clear()
            torch.cuda.reset_peak_memory_stats()
            measure.step(module, self.inputs)
        return torch.cuda.max_memory_allocated()

    def compared(self, module: nn.Module) -> dict[str, Any]:
        """Loss and gradients against eager's, which are those of the first module asked."""
        self.clear()
        torch.manual_seed(0)
        loss = measure.step(module, self.inputs).loss.detach()
        found = [loss, *(p.grad for p in self.parameters if p.grad is not None)]
        if self.truth is None and module is self.model:
            self.truth = [t.to("cpu", copy=True) for t in found]
        if self.truth is None:
            return {"loss": float(loss)}
        off = norm = 0.0
        same = True
        for mine, host in zip(found, self.truth, strict=True):
            truth = host.to(mine.device)
            same = same and torch.equal(mine, truth)
            for a, b in zip(
                mine.flatten().split(1 << 26), truth.flatten().split(1 << 26), strict=True
            ):
                off += (a.float() - b.float()).square().sum().item()
                norm += b.float().square().sum().item()
        return {"gradients": float(f"{(off / max(norm, 1e-30)) ** 0.5:.2g}"), "equal": same}

    def timed(self, module: nn.Module) -> dict[str, Any]:
        """Median seconds of steps, in turn with eager's where that fits."""
        turns = [module] if self.truth is None or module is self.model else [module, self.model]
        taken: list[list[float]] = [[] for _ in turns]
        for i in range(self.args.steps + 1):
            for each, found in zip(turns, taken, strict=True):
                self.clear(caches=False)
                seconds = self.once(each)
                found += [seconds] if i else []
        medians = [statistics.median(found) for found in taken]
        return {"seconds": medians[0], "eager": medians[-1] if self.truth is not None else None}

    def once(self, module: nn.Module) -> float:
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize()
        begun = time.perf_counter()
        measure.step(module, self.inputs)
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def clear(self, caches: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        if caches:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def until(seconds: float) -> Generator[None]:
    """TimeoutError in what runs inside after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError("--time-limit")

    if seconds == float("inf"):
        yield
        return
    if seconds <= 0:
        late()
    before = signal.signal(signal.SIGALRM, late)
    # and again each second: what is raised within a callback of the collector goes no further
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
