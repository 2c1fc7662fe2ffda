"""The head of a small language model, trained here: some words are likely, most are not."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from fxopt.kernels.cut_cross_entropy import linear_cross_entropy

CONTEXT, WIDTH, BATCH = 4, 128, 512


def trained_head(
    rows: int, features: int, classes: int, steps: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, features], weight [classes, features] and labels [rows], in float32.

    The words of Python's standard library, the most frequent `classes` of them, each predicted from
    the four before it; `features` beyond 128 are a rotation of those, which leaves logits as they
    are. The rows are consecutive words.
    """
    ids = words(classes).to(device)
    with torch.device(device):
        embed = nn.Embedding(classes, 64)
        body = nn.Sequential(
            nn.Linear(64 * CONTEXT, 512), nn.GELU(), nn.Linear(512, WIDTH), nn.LayerNorm(WIDTH)
        )
        weight = nn.Parameter(torch.randn(classes, WIDTH) / WIDTH**0.5)
        turn = torch.linalg.qr(torch.randn(max(features, WIDTH), WIDTH))[0].T
    optimiser = torch.optim.AdamW([*embed.parameters(), *body.parameters(), weight], 3e-3)

    def batch(places: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.stack([ids[places - CONTEXT + i] for i in range(CONTEXT)], 1)
        return body(embed(before).flatten(1)), ids[places]

    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        hidden, labels = batch(torch.randint(CONTEXT, len(ids), (BATCH,), device=device))
        linear_cross_entropy(hidden, weight, labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        hidden, labels = batch(torch.arange(CONTEXT, CONTEXT + rows, device=device))
        return hidden @ turn, weight @ turn, labels


def words(classes: int) -> Tensor:
    """The text as numbers, the most frequent word first; rarer ones are left out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(errors="ignore") for path in files)
    found = re.findall(r"\w+| +|\n|[^\w\s]", text)
    number = {w: i for i, (w, _) in enumerate(Counter(found).most_common(classes))}
    if len(number) < classes:
        raise ValueError(f"the text has {len(number)} different words, fewer than {classes}")
    return torch.tensor([number[w] for w in found if w in number])
