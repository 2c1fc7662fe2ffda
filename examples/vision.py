"""A vision transformer in less memory, under a metric of one's own.

    python examples/vision.py

The metric here is how often the rewritten model names the class that the original names; use
accuracy on labelled images where there are some.
"""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

import fxopt


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    images = [torch.randn(4, 3, 64, 64) for _ in range(3)]
    held_out = torch.randn(64, 3, 64, 64)
    with torch.no_grad():
        named = model(held_out).logits.argmax(-1)

    def agreement(module: torch.nn.Module) -> float:
        with torch.no_grad():
            return (module(held_out).logits.argmax(-1) == named).float().mean().item()

    opt = fxopt.optimize(
        model,
        fxopt.Budget(weights="35%", metric=agreement, metric_drop=0.1, minimize="error"),
        {"pixel_values": images[0]},
        calibration=[{"pixel_values": batch} for batch in images],
    )
    print(opt.report)
    print(f"agreement {agreement(opt):.0%}")


if __name__ == "__main__":
    main()
