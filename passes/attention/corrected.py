"""`+d64` of rewrites that hide keys: rows of a prompt make up for some of what they miss.

    attend(q, k, v, mask, causal=True, window=(512, 0), delta=(310, 640, 0, 0))    # KV head 0

Every 64th query sees all keys; what that changes in it stands for what its followers miss, and
they add as much of it as served the calibration prompts best, a share for each query head.
Pays in heads that look everywhere in a long prompt, where no few keys stand for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.rewrite import Editor, SiteStatistics
from fxopt.ir.site import AttentionInfo, Site
from fxopt.kernels.attention.delta import EVERY, corrected_rows
from fxopt.kernels.attention.spec import per_head
from fxopt.passes.attention import emulation

SUFFIX = f"+d{EVERY}"


def shares(statistics: SiteStatistics, **options: Any) -> dict[str, Tensor]:
    """Per mille of what asked rows find that their followers add, as "share", int32 [H], from 1 to
    1000: by least squares over the recorded prompts under `options` of `attend`. It is 1 where
    these are too short to hide a key; calibration that short is noted (`fxopt.coverage`)."""
    prompt = prompt_of(statistics.inputs)
    early = corrected_rows(prompt["q"].shape[2])
    dense = statistics.once("dense prompt", lambda: emulation.attended(prompt))
    missed = (dense - emulation.attended(prompt, **options))[:, :early].float()
    by_asked = missed.unflatten(1, (-1, EVERY))
    asked, followers = by_asked[:, :, :1], by_asked[:, :, 1:]
    if prompt.get("mask") is not None:
        shown = (prompt["mask"][:, :early] != 0).unflatten(1, (-1, EVERY))[:, :, 1:]
        followers = followers * shown[..., None, None]
        asked = asked * shown[..., None, None]
    along = (followers * asked).sum((0, 1, 2, 4), dtype=torch.float64)
    whole = asked.expand_as(followers).square().sum((0, 1, 2, 4), dtype=torch.float64)
    share = along / whole.clamp(min=torch.finfo(torch.float64).tiny)
    return {"share": (1000 * share).round().clamp(1, 1000).to(torch.int32)}


def prompt_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded arguments of the tokens that are processed before decoding begins."""
    length = inputs.get("prompt") or inputs["q"].shape[2]
    prompt = dict(inputs) | {name: inputs[name][:, :, :length] for name in "qkv"}
    mask = inputs.get("mask")
    return prompt | {"mask": None if mask is None else mask[:, :length]}


def apply(site: Site, info: AttentionInfo, share: Tensor, editor: Editor) -> None:
    """Give the query heads of a site their shares."""
    given: Any = editor.node(site).kwargs.get("delta", (0,))
    values = per_head("delta", given, info.num_heads, "query heads")
    group = info.num_heads // info.num_kv_heads
    for head in range(info.num_kv_heads) if site.head is None else (site.head,):
        own = slice(head * group, (head + 1) * group)
        values[own] = share[own].tolist()
    editor.update(site, delta=tuple(values))
