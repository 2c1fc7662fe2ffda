"""Trains the byte-level Llama of `examples/tiny_lm` on CPython's standard library.

    python examples/train_tiny_lm.py --out examples/tiny_lm

One row in five of every batch is a key-value retrieval document (see `tiny_lm_data.py`), so that
the model has a reason to use all of its context. Takes minutes on one large GPU; `--smoke --steps
40` tries the script at a toy size on a CPU.
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
    # Copying is learned sooner, and cheaper, where the distances are short.
    short_context: int = 1024
    short_fraction: float = 0.4

    def context(self, step: int) -> int:
        return self.short_context if step < self.short_fraction * self.steps else CONTEXT

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) * cosine


def llama_config(layers: int = 6) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,  # bytes
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


class Batches:
    """Random windows of the corpus, which stays on the device, and one row in five retrieval."""

    def __init__(self, text: bytes, device: torch.device, seed: int = 0):
        self.text = text
        self.corpus = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        self.rng = random.Random(seed)

    def draw(self, rows: int, length: int) -> torch.Tensor:
        device = self.corpus.device
        retrieval = torch.stack([self._document(length) for _ in range(max(1, rows // 5))])
        starts = torch.randint(len(self.corpus) - length, (rows - len(retrieval), 1), device=device)
        windows = self.corpus[starts + torch.arange(length, device=device)].long()
        return torch.cat([windows, retrieval.to(device, non_blocking=True)])

    def _document(self, length: int) -> torch.Tensor:
        pairs = self.rng.randint(1, 8)
        return retrieval_document(self.rng, length, pairs, self.text)[0]


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
        self.file = path.open("w")
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


def train(
    model: LlamaForCausalLM, text: bytes, heldout: bytes, schedule: Schedule, log: Log
) -> None:
    batches = Batches(text, model.device)
    optimizer = make_optimizer(model, schedule)
    loss_fn = torch.compile(lm_loss, dynamic=False) if model.device.type == "cuda" else lm_loss

    for step in range(schedule.steps):
        context = schedule.context(step)
        ids = batches.draw(schedule.tokens // context, context + 1)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = loss_fn(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0:
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
    text, heldout = stdlib_corpus(args.stdlib)
    (args.out / "heldout.txt").write_bytes(heldout)

    schedule = Schedule(args.steps, args.lr, args.weight_decay)
    layers, lengths, count = 6, [1024, 2048, 4096], 400
    if args.smoke:
        schedule = replace(schedule, tokens=2 * CONTEXT)
        layers, lengths, count = 1, [256, 512], 4
    model = LlamaForCausalLM(llama_config(layers)).to(device)
    model.set_attn_implementation("sdpa_no_mask")
    log(f"{model.num_parameters():,} parameters, {len(text) / 1e6:.1f} MB of text, {device}")

    train(model, text, heldout, schedule, log)
    shipped(model).save_pretrained(args.out)
    evaluate(model, heldout, lengths, count, log)


if __name__ == "__main__":
    main()
