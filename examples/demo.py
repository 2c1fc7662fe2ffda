"""Optimise the tiny language model under a budget, and show what was decided and measured.

    python examples/demo.py [--out DIR]

Everything that it prints was measured in this run, on this machine.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
import transformers
from tiny_lm_data import MODEL_DIR, heldout_text, heldout_windows

import fxopt

PROMPT, NEW_TOKENS = 1024, 96
BUDGET = fxopt.Budget(kl=0.02, kv_cache="40%", weights="60%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    began = time.perf_counter()

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    windows = heldout_windows(PROMPT + 256)[:6]
    print(f"model: {model.num_parameters():,} parameters; budget: {BUDGET}")
    opt = fxopt.optimize(
        model,
        BUDGET,
        example_inputs={"input_ids": windows[:1]},
        workload=fxopt.Generate(batch=1, prompt=PROMPT, new_tokens=NEW_TOKENS),
        calibration=[{"input_ids": row[None]} for row in windows],
        progress=True,  # lines where standard error is no terminal
    )
    print(opt.plan)
    print(opt.report)
    print(f"decided and verified in {time.perf_counter() - began:.0f} s\n")

    compare_generation(model, opt)
    write_files(opt, out)
    print(f"\nthe whole demo took {time.perf_counter() - began:.0f} s")


def compare_generation(model: torch.nn.Module, opt: fxopt.OptimizedModule) -> None:
    """A continuation of held-out text before and after, through each one's own cache."""
    text = heldout_text()[200_000 : 200_000 + PROMPT]
    ids = torch.tensor([list(text)])
    rates: dict[str, float] = {}
    for name, module in (("before", model), ("after", opt)):
        begin = time.perf_counter()
        output = module.generate(
            input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        rates[name] = NEW_TOKENS / (time.perf_counter() - begin)
        continuation = bytes(output[0, PROMPT:].tolist()).decode(errors="replace")
        print(f"--- {name}: {rates[name]:.0f} tokens/s, prompt included\n{continuation}\n")
    ratio = rates["after"] / rates["before"]
    if ratio < 1.02:
        print(
            f"generation runs at {ratio:.2f}x of the original's speed here: on this CPU the "
            "rewrites save memory, not time"
        )
    else:
        print(f"generation runs at {ratio:.2f}x of the original's speed")


def write_files(opt: fxopt.OptimizedModule, out: Path) -> None:
    """Plan, page and ONNX model."""
    opt.plan.save(out / "plan.json")
    opt.plan.to_html(out / "plan.html")
    exported = opt.export_onnx(out / "model.onnx")
    for name in ("plan.json", "plan.safetensors", "plan.html", "model.onnx"):
        path = out / name
        if path.exists():
            print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")
    print(f"onnxruntime differs from the module by at most {exported.difference:.1e}")


if __name__ == "__main__":
    main()
