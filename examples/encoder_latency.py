"""An encoder for latency: as fast as it gets while its outputs stay where they were.

    python examples/encoder_latency.py

The BERT has random weights: they prove speed and shapes, never quality. It computes attention the
long way (eager softmax), as many models do that were written for reading; the exact rewrite of
that costs no quality, and the budget asks for some speed on top.
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

import fxopt

SHAPE = (2, 256)


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=8,
                        intermediate_size=1024, attn_implementation="eager")  # fmt: skip
    model = BertModel(config).eval()
    batches = [{"input_ids": torch.randint(config.vocab_size, SHAPE)} for _ in range(3)]
    try:
        opt = fxopt.optimize(
            model,
            fxopt.Budget(latency="0.95x", relative_error=0.01),
            batches[0],
            calibration=batches,
        )
    except fxopt.BudgetError as error:
        # The nearest module is handed out all the same, with what it measured.
        print(f"not on this machine: {error.binding} binds")
        opt = error.best
    print(opt.report)
    with torch.no_grad():
        print(tuple(opt(**batches[1]).last_hidden_state.shape))


if __name__ == "__main__":
    main()
