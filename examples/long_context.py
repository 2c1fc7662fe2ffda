"""A language model for long prompts: how small the KV cache gets within a quality budget.

    python examples/long_context.py

The trained model that ships here finds values that its context assigned, so what a packed cache
costs is seen in answers, not only in nats.
"""

from __future__ import annotations

import torch
from tiny_lm_data import MODEL_DIR, heldout_windows, retrieval_documents
from transformers import AutoModelForCausalLM

import fxopt

PROMPT, NEW_TOKENS, QUESTIONS = 896, 128, 16


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    windows = heldout_windows(PROMPT + NEW_TOKENS)[:6]
    opt = fxopt.optimize(
        model,
        # shares of the cache refer to keys and values of 16 bits
        fxopt.Budget(kl=0.01, kv_cache="45%"),
        example_inputs={"input_ids": windows[:1]},
        workload=fxopt.Generate(batch=1, prompt=PROMPT, new_tokens=NEW_TOKENS),
        calibration=[{"input_ids": row[None]} for row in windows],
        rewrites=["kv_cache"],
    )
    print(opt.report)
    for decision in opt.plan.rewritten[:3]:
        print(f"{decision.key}: {decision.label}")
    print(f"answers found before: {answered(model)}, after: {answered(opt)} of {QUESTIONS}")


def answered(model: torch.nn.Module) -> int:
    """Questions answered exactly by greedy decoding through the model's own cache."""
    documents, answer = retrieval_documents(QUESTIONS, length=PROMPT)
    prompts = documents[:, : answer.start]
    length = answer.stop - answer.start
    output = model.generate(input_ids=prompts, max_new_tokens=length, do_sample=False)
    return int((output[:, answer.start :] == documents[:, answer]).all(-1).sum())


if __name__ == "__main__":
    main()
