"""What a budget buys: every plan worth having, from one scoring, and two budgets answered from it.

python examples/compare_budgets.py [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny_lm_data import MODEL_DIR, heldout_windows
from transformers import AutoModelForCausalLM

import fxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("frontier-out"))
    out = parser.parse_args().out
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    windows = heldout_windows(512)[:6]
    front = fxopt.frontier(
        model,
        {"input_ids": windows[:1]},
        workload=fxopt.Generate(batch=1, prompt=384, new_tokens=128),
        calibration=[{"input_ids": row[None]} for row in windows],
        rewrites=["kv_cache"],  # the linear layers too: a minute more
    )
    print(front)
    print(f"drawn in {front.to_svg(out / 'frontier.svg')}")
    for kl in (0.001, 0.05):
        plan = front.plan(fxopt.Budget(kl=kl, minimize="memory"))
        rows = {row.name: row.predicted for row in plan.totals}
        size = sum(d.cost.state_bytes for d in plan.decisions) / 2**20
        print(f"kl {kl}: a cache of {size:.2f} MiB, predicted kl {rows['kl']:.2g}")


if __name__ == "__main__":
    main()
