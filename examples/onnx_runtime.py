"""Out of PyTorch: one ONNX file that prefills and decodes, run by onnxruntime and numpy alone.

python examples/onnx_runtime.py [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession, OrtValue
from tiny_lm_data import MODEL_DIR, heldout_text, heldout_windows
from transformers import AutoModelForCausalLM

import fxopt

BEGIN, PROMPT, NEW_TOKENS = 200_000, 300, 48
TYPES = {"tensor(float)": 1, "tensor(uint8)": 2, "tensor(bfloat16)": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("onnx-out"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    windows = heldout_windows(512)[:6]
    opt = fxopt.optimize(
        model,
        fxopt.Budget(kl=0.02, kv_cache="120%"),
        {"input_ids": windows[:1]},
        workload=fxopt.Generate(batch=1, prompt=384, new_tokens=128),
        calibration=[{"input_ids": row[None]} for row in windows],
        rewrites=["kv_cache"],
        time_limit=20,
    )
    print(opt.export_onnx(out / "model.onnx", kind="generate"))

    text = heldout_text()[BEGIN : BEGIN + PROMPT]
    prompt = np.frombuffer(text, np.uint8).astype(np.int64)[None]
    found = decoded(out / "model.onnx", prompt, NEW_TOKENS)
    ids = torch.from_numpy(prompt)
    same = opt.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    print(f"onnxruntime: {bytes(found)!r}")
    print(f"fxopt:       {bytes(same[0, PROMPT:].tolist())!r}")


def decoded(path: Path, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy tokens after `prompt`, the cache handed from step to step as the file stores it."""
    session = InferenceSession(str(path))
    cache = {i.name: empty(i) for i in session.get_inputs() if i.name.startswith("past.")}
    names = [o.name for o in session.get_outputs()]
    ids, seen, tokens = prompt, 0, list[int]()
    for _ in range(count):
        first, seen = seen, seen + ids.shape[1]
        step = {
            "input_ids": ids,
            "position_ids": np.arange(first, seen)[None],
            "attention_mask": np.ones((1, seen), np.int64),
        }
        given = {name: OrtValue.ortvalue_from_numpy(value) for name, value in step.items()}
        found = dict(zip(names, session.run_with_ort_values(None, given | cache), strict=True))
        cache = {name: found[name.replace("past.", "present.")] for name in cache}
        tokens.append(int(found["logits"].numpy()[0, -1].argmax()))
        ids = np.array([[tokens[-1]]])
    return tokens


def empty(value: Any) -> OrtValue:
    """A past without tokens: each symbolic size but the batch's counts them."""
    sizes = [n if isinstance(n, int) else int(n == "batch") for n in value.shape]
    return OrtValue.ortvalue_from_shape_and_type(sizes, TYPES[value.type])


if __name__ == "__main__":
    main()
