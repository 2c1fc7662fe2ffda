"""Trains the byte-level Llama of `examples/tiny_lm`, or a larger one, on Python source.

    python examples/train_tiny_lm.py --out examples/tiny_lm
    python examples/train_tiny_lm.py --size larger --steps 6000 --lr 1e-3 --out larger_lm \\
        --more .venv/lib/python3.12/site-packages/{torch,transformers}

The text is CPython's standard library; `--more` adds folders of source. One row in five of every
batch is a key-value retrieval document (see `tiny_lm_data.py`), so that the model has a reason to
use all of its context. Takes minutes on one large GPU. Every 500 steps all that the training holds
is written beside the model, and the same command goes on from there. `--smoke --steps 40` tries the
script at a toy size on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_lm_data import (
    CONTEXT,
    heldout_windows,
    nats_per_byte,
    retrieval_document,
    retrieval_documents,
    retrieval_rate,
    stdlib_corpus,
)
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Under a name that has no mask function transformers passes no mask, and SDPA is called with
# is_causal=True: in a compiled model plain "sdpa" would build the mask and miss flash attention.
AttentionInterface.register("sdpa_no_mask", sdpa_attention_forward)


@dataclass(frozen=True)
class Schedule:
    steps: int
    lr: float
    weight_decay: float
    tokens: int = 10 * CONTEXT  # a step
    warmup_steps: int = 300
    every: int = 500  # steps from one checkpoint and report to the next
    # Copying is learned sooner, and cheaper, where the distances are short.
    short_context: int = 1024
    short_fraction: float = 0.4

    def context(self, step: int) -> int:
        return self.short_context if step < self.short_fraction * self.steps else CONTEXT

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) * cosine


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    mlp: int
    heads: int


SIZES = {"tiny": Size(6, 256, 576, 4), "larger": Size(10, 512, 1408, 8)}  # 3.9 M, 29.6 M


def llama_config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,  # bytes
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


class Batches:
    """Random windows of the corpus, which stays on the device, and one row in five retrieval.

    What is drawn for a step depends on its number alone, so training can go on at any.
    """

    def __init__(self, text: bytes, device: torch.device, seed: int = 0):
        self.text = text
        self.corpus = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        self.seed = seed

    def draw(self, step: int, rows: int, length: int) -> torch.Tensor:
        device = self.corpus.device
        rng = random.Random(f"{self.seed} {step}")
        documents = [self._document(rng, length) for _ in range(max(1, rows // 5))]
        last = len(self.corpus) - length
        starts = [rng.randrange(last) for _ in range(rows - len(documents))]
        places = torch.tensor(starts, dtype=torch.long, device=device)[:, None]
        windows = self.corpus[places + torch.arange(length, device=device)].long()
        return torch.cat([windows, torch.stack(documents).to(device, non_blocking=True)])

    def _document(self, rng: random.Random, length: int) -> torch.Tensor:
        return retrieval_document(rng, length, rng.randint(1, 8), self.text)[0]


def lm_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean nats a byte; `ids` holds one byte more than the context."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def make_optimizer(model: LlamaForCausalLM, schedule: Schedule) -> torch.optim.AdamW:
    decayed = [p for p in model.model.layers.parameters() if p.ndim == 2]
    kept = [p for p in model.parameters() if all(p is not other for other in decayed)]
    groups = [
        # Several times the usual decay, since the corpus is seen about a dozen times over.
        {"params": decayed, "weight_decay": schedule.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95), fused=True)


class Log:
    def __init__(self, path: Path):
        self.file = path.open("a")
        self.start = time.monotonic()

    def __call__(self, message: str) -> None:
        line = f"{time.monotonic() - self.start:6.1f} s  {message}"
        print(line, flush=True)
        print(line, file=self.file, flush=True)


def shipped(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy in the precision of the file."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    return model


class Checkpoint:
    """Where training stands, in a file."""

    def __init__(self, path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer):
        self.path, self.model, self.optimizer = path, model, optimizer

    def load(self) -> int:
        """The number of steps that were done; 0 without a file."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, map_location=self.model.device)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return saved["steps"]

    def save(self, steps: int) -> None:
        # Beside the file first: a run that ends while it writes leaves the one before.
        new = self.path.with_suffix(".new")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "steps": steps}, new)
        new.replace(self.path)


def train(
    model: LlamaForCausalLM, text: bytes, heldout: bytes, schedule: Schedule, out: Path, log: Log
) -> None:
    batches = Batches(text, model.device)
    optimizer = make_optimizer(model, schedule)
    checkpoint = Checkpoint(out / "checkpoint.pt", model, optimizer)
    loss_fn = torch.compile(lm_loss, dynamic=False) if model.device.type == "cuda" else lm_loss

    for step in range(checkpoint.load(), schedule.steps):
        context = schedule.context(step)
        ids = batches.draw(step, schedule.tokens // context, context + 1)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = loss_fn(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % schedule.every == 0:
            checkpoint.save(step + 1)
            log(f"step {step + 1}  loss {loss:.3f}  {progress_report(model, heldout, context)}")


def progress_report(model: LlamaForCausalLM, heldout: bytes, context: int) -> str:
    model = shipped(model)
    nats = nats_per_byte(model, heldout_windows(context, heldout)[::8])
    documents, answer = retrieval_documents(64, context, seed=1, filler=heldout)
    rate = retrieval_rate(model, documents, answer)
    return f"at context {context}: held out {nats:.4f} nats/byte, retrieval {rate:.0%}"


def evaluate(
    model: LlamaForCausalLM, heldout: bytes, lengths: list[int], count: int, log: Log
) -> None:
    """The figures of the README: bf16 weights as shipped, float32 arithmetic."""
    model = shipped(model).float()
    windows = heldout_windows(lengths[-1], heldout)[:count]
    log(f"held out: {nats_per_byte(model, windows):.4f} nats/byte over {len(windows)} windows")
    for length in lengths:
        documents, answer = retrieval_documents(count, length, seed=2, filler=heldout)
        rate = retrieval_rate(model, documents, answer)
        log(f"retrieval at {length}: {rate:.1%} of {count} documents")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "tiny_lm")))
    parser.add_argument("--stdlib", type=Path, help="default: the running Python's")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="folders of source")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--smoke", action="store_true", help="toy size, to try the script on a CPU")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "log.txt")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, heldout = stdlib_corpus(args.stdlib, args.more)
    (args.out / "heldout.txt").write_bytes(heldout)

    schedule = Schedule(args.steps, args.lr, args.weight_decay)
    size, lengths, count = SIZES[args.size], [1024, 2048, 4096], 400
    if args.smoke:
        schedule = replace(schedule, tokens=2 * CONTEXT, every=10)
        size, lengths, count = replace(size, layers=1), [256, 512], 4
    model = LlamaForCausalLM(llama_config(size)).to(device)
    model.set_attn_implementation("sdpa_no_mask")
    log(f"{model.num_parameters():,} parameters, {len(text) / 1e6:.1f} MB of text, {device}")

    train(model, text, heldout, schedule, args.out, log)
    shipped(model).save_pretrained(args.out)
    evaluate(model, heldout, lengths, count, log)


if __name__ == "__main__":
    main()
