"""Latency rows of the contract, measured again from outside on the machine at hand.

    python benchmarks/contract.py [--device cuda] [--ratios 0.95 0.8 0.6]

For each ratio the tiny trained model is optimised under `latency` and `kl`; what comes back is
timed again against the original, interleaved, in a measurement of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import fxopt
from fxopt.decide.runs import measure_latency

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from tiny_lm_data import MODEL_DIR, heldout_windows  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.95, 0.8, 0.6])
    parser.add_argument("--prompt", type=int, default=1024)
    args = parser.parse_args()

    device = torch.device(args.device)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval().to(device)
    data = [{"input_ids": row[None].to(device)} for row in heldout_windows(args.prompt)[:6]]
    workload = fxopt.Forward(batch=1, length=args.prompt)
    for ratio in args.ratios:
        budget = fxopt.Budget(kl=0.1, latency=f"{ratio}x")
        try:
            opt = fxopt.optimize(model, budget, data[0], workload=workload, calibration=data)
        except fxopt.BudgetError as error:
            print(json.dumps({"ratio": ratio, "refused": error.binding}))
            continue
        again = measure_latency(model, opt, workload, data[0], device, seconds=5.0)
        print(
            json.dumps(
                {
                    "ratio": ratio,
                    "measured_again": round(again.after / again.before, 3),
                    "upper_95": round(again.ratio_upper, 3),
                    "holds": again.ratio_upper <= ratio,
                }
            )
        )


if __name__ == "__main__":
    main()
