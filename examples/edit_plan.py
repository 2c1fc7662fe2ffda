"""A plan is a file: read it, keep what you know better, solve the rest again, replay it.

python examples/edit_plan.py [--out DIR]
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
    parser.add_argument("--out", type=Path, default=Path("plan-out"))
    out = parser.parse_args().out
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    windows = heldout_windows(256)[:6]
    data = [{"input_ids": row[None]} for row in windows]
    plan = fxopt.plan(
        model,
        fxopt.Budget(weights="45%"),
        data[0],
        calibration=data,
        rewrites=["linear.quantized"],  # leave it out to try all: that takes a few times as long
    )
    plan.save(out / "plan.json")

    edited = fxopt.Plan.load(out / "plan.json")
    # The last layer stays as it is, whatever the solver thought of it.
    edited.lock(r"re:model\.layers\.5\..*", "keep", family="linear")
    again = fxopt.solve(edited)
    print(plan.diff(again))

    opt = fxopt.apply(model, again, example_inputs=data[0], calibration=data)
    print(fxopt.verify(opt, model, data))
    opt.plan.save(out / "edited.json")


if __name__ == "__main__":
    main()
