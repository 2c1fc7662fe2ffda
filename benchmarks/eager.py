"""Eager speed of an exact plan against the original: what the graph itself costs or gains.

    python benchmarks/eager.py [--device cuda] [--layers 16] [--dtype bfloat16]

Prints seconds of a prefill and of one decoding step, original and rewritten interleaved, for a
Llama of the 1B shape with random weights (which prove speed, never quality).
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.decide.runs import measure_latency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, head_dim=64,
        num_hidden_layers=args.layers, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=max(args.prompt) + 1024, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    ids = torch.randint(config.vocab_size, (args.batch, 64)).to(args.device)
    workload = fxopt.Generate(batch=args.batch, prompt=64, new_tokens=8)
    opt = fxopt.optimize(
        model,
        fxopt.Budget(weights="100%"),
        {"input_ids": ids},
        workload=workload,
        rewrites=["attention.exact"],
    )
    device = torch.device(args.device)
    for prompt in args.prompt:
        workload = fxopt.Generate(batch=args.batch, prompt=prompt, new_tokens=128)
        latency = measure_latency(model, opt, workload, {"input_ids": ids}, device)
        for name, timing in latency.calls.items():
            print(
                json.dumps(
                    {
                        "call": name,
                        "prompt": prompt,
                        "original_ms": round(timing.first * 1e3, 3),
                        "rewritten_ms": round(timing.second * 1e3, 3),
                        "ratio_upper_95": round(timing.ratio_upper, 3),
                    }
                )
            )


if __name__ == "__main__":
    main()
