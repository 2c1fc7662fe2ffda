"""How long a plan of an 8B model on the meta device takes, and how much memory.

python benchmarks/weightless.py [--layers 32]
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import transformers

import fxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    config = transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=parser.parse_args().layers, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14336, vocab_size=128256,
        max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    wall, processor = time.perf_counter(), time.process_time()
    plan = fxopt.plan(
        model,
        fxopt.Budget(weights="50%", kv_cache="40%"),
        workload=fxopt.Generate(batch=16, prompt=32_768, new_tokens=256),
    )
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(plan)
    print(f"{wall:.1f} s, {processor:.1f} s of processor time, {peak:.2f} GiB at most")


if __name__ == "__main__":
    main()
