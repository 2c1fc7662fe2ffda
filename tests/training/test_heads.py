"""Losses that are computed from the head's input: what is matched, and what is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxopt.kernels.cut_cross_entropy import linear_cross_entropy
from fxopt.training import TrainingModule, measure
from fxopt.training.capture import joint
from fxopt.training.emit import executable, partition
from fxopt.training.heads import HeadCut, Heads
from fxopt.training.module import Inputs
from fxopt.training.schedule import schedule
from fxopt.training.step import Step

CLASSES, FEATURES, BATCH, SEQ = 701, 16, 4, 40

ROWS = BATCH * SEQ


Loss = Callable[[Tensor, Tensor], Tensor]


class Plain(nn.Module):
    """A body, a head and a loss inside; `loss` takes logits [B, T, V] and labels [B, T]."""

    def __init__(self, loss: Loss, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU())
        self.head = head or nn.Linear(FEATURES, CLASSES)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head(self.body(x)), labels)


class Product(nn.Module):
    """A head that is written as a product."""

    def __init__(self, form: str, turned: bool) -> None:
        super().__init__()
        shape = (FEATURES, CLASSES) if turned else (CLASSES, FEATURES)
        self.weight = nn.Parameter(torch.randn(shape) / 4)
        self.bias = nn.Parameter(torch.randn(CLASSES))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "@":
            return x @ self.weight
        if self.form == "matmul":
            return torch.matmul(x, self.weight.t())
        if self.form == "mm":
            return torch.mm(x.flatten(0, 1), self.weight).view(*x.shape[:2], CLASSES)
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    rows, labels = logits[..., :-1, :].contiguous().view(-1, CLASSES), labels[:, 1:].reshape(-1)
    labels = labels.where(labels != -100, 3)
    return F.cross_entropy(rows, labels, ignore_index=3, label_smoothing=0.1)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (loss * torch.linspace(0, 1, SEQ)).mean()


def module(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.CrossEntropyLoss(reduction="sum")(logits.flatten(0, 1), labels.flatten()) / 7


def of_mean(change: Callable[[Tensor], Tensor]) -> Loss:
    return lambda x, y: F.cross_entropy(change(x).reshape(-1, CLASSES), y.reshape(-1))


def log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits.view(-1, CLASSES), -1), labels.view(-1), reduction="sum")


CHAINS: dict[str, Loss] = {
    "mean": of_mean(lambda x: x),
    "shifted": shifted,
    "module": module,
    "a token": weighted,
    "permuted": lambda x, y: F.cross_entropy(input=x.permute(0, 2, 1), target=y),
    "softcap": of_mean(lambda x: 5.0 * torch.tanh(x / 5.0)),
    "scaled softcap": of_mean(lambda x: (0.5 * x).tanh() * 3.0),
    "scaled": of_mean(lambda x: x.float() * 0.25),
    "other axes": lambda x, y: of_mean(lambda z: z.transpose(0, 1).clone())(x, y.t()),
    "some rows": lambda x, y: of_mean(lambda z: z[:, 5:])(x, y[:, 5:]),
    "log softmax": log_softmax,
    "two losses": lambda x, y: shifted(x, y) + module(x, y),
}


def batch(dtype: torch.dtype = torch.float32) -> Inputs:
    labels = torch.randint(CLASSES, (BATCH, SEQ))
    labels[0, ::3], labels[1, :7] = -100, 3
    return {"x": torch.randn(BATCH, SEQ, FEATURES, dtype=dtype), "labels": labels}


def without_logits(
    model: nn.Module, inputs: Inputs, key: str, chunk: int = 32
) -> tuple[TrainingModule, Step]:
    """A module that keeps everything but logits, and its step."""
    found: list[Step] = []

    def planned(inner: nn.Module, given: Inputs) -> Any:
        def halves(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            found.append(Step.of(graph.graph, count))
            return partition(graph, schedule(found[0], ()), count)

        with joint(inner, given, {key: HeadCut(chunk)}) as traced:
            assert [site.blocked for site in traced.heads if site.key == key] == [None]
            return traced.build(halves, executable)

    made = TrainingModule(model, planned)
    with measure.untouched(made):
        made(**inputs)
    return made, found[0]


def assert_like(model: nn.Module, inputs: Inputs, key: str = "head.logits", **_: Any) -> None:
    """Loss and gradients are eager's within rounding, and no tensor is as large as the logits."""
    made, step = without_logits(model, inputs, key)
    eager, mine = measure.outcome(model, inputs), measure.outcome(made, inputs)
    assert eager.tensors.keys() == mine.tensors.keys()
    name, off = eager.difference(mine)
    dtype = next(model.parameters()).dtype
    narrow = dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    assert off < (2e-2 if narrow else 3e-6), name
    sizes = [step.bytes[o] for o in step.owner.values() if o.op != "placeholder"]
    assert max(sizes) < 2 * (SEQ - 5) * CLASSES
    assert "cut_cross_entropy" in str(step.graph)
    predicted = int(schedule(step, ()).live().max())
    assert measure.peak(made, inputs) == pytest.approx(predicted, rel=0.01, abs=20 * ROWS)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_that_are_matched(name: str) -> None:
    assert_like(Plain(CHAINS[name]).train(), batch())


@pytest.mark.parametrize(
    ("form", "turned"), [("@", True), ("matmul", False), ("mm", True), ("addmm", True)]
)
def test_heads_that_are_matched(form: str, turned: bool) -> None:
    head = Product(form, turned)
    head.bias.requires_grad_(form == "addmm")
    assert_like(Plain(CHAINS["mean"], head).train(), batch())


def test_sixteen_bits_are_cast_as_eager_casts_them() -> None:
    for chain in ("mean", "scaled", "a token"):
        model = Plain(CHAINS[chain]).train().bfloat16()
        inputs = batch(torch.bfloat16)
        made, _ = without_logits(model, inputs, "head.logits")
        assert made(**inputs).dtype == model(**inputs).dtype
        assert_like(model, inputs)


def test_half_precision_makes_logits_twice() -> None:
    model, inputs = Plain(CHAINS["scaled"]).train().half(), batch(torch.float16)
    made, step = without_logits(model, inputs, "head.logits")
    assert "cut_cross_entropy_backward" in str(step.graph)
    name, off = measure.outcome(model, inputs).difference(measure.outcome(made, inputs))
    assert off < 2e-3, name


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_like(Plain(CHAINS["mean"]).train(), batch())


def test_frozen_heads_and_frozen_bodies() -> None:
    for part in ("head", "body"):
        model = Plain(CHAINS["mean"]).train()
        model.get_submodule(part).requires_grad_(False)
        assert_like(model, batch())


def test_a_graph_that_is_kept_runs_again() -> None:
    model, inputs = Plain(CHAINS["mean"]).train(), batch()
    made, _ = without_logits(model, inputs, "head.logits")
    loss = made(**inputs)
    (first,) = torch.autograd.grad(3 * loss, [made.get_parameter("head.weight")], retain_graph=True)
    before = first.clone()
    (second,) = torch.autograd.grad(loss, [made.get_parameter("head.weight")])
    assert torch.equal(first, before)
    torch.testing.assert_close(first, 3 * second)


def test_all_labels_ignored() -> None:
    model, inputs = Plain(CHAINS["mean"]).train(), batch()
    made, _ = without_logits(model, inputs, "head.logits")
    inputs["labels"].fill_(-100)
    loss = made(**inputs)
    loss.backward()
    assert loss.isnan()
    gradients = [p.grad for p in made.parameters()]
    assert all(g is not None and torch.equal(g, torch.zeros_like(g)) for g in gradients)


def changed(logits: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(logits)
    return logits


REFUSED: list[tuple[Loss, str]] = [
    (
        lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), torch.ones(CLASSES)),
        "weighs classes",
    ),
    (
        lambda x, y: F.cross_entropy(x.flatten(0, 1), F.one_hot(y.flatten(), CLASSES).float()),
        "probabilities",
    ),
    (of_mean(lambda x: changed(x, lambda z: z.mul_(2))), "mul_ changes the logits in place"),
    (of_mean(lambda x: changed(x, lambda z: z.view(-1)[:5].add_(1))), "add_ changes"),
    (of_mean(lambda x: changed(x, lambda z: z[..., 0].fill_(-9.0))), "fill_ changes"),
    (of_mean(lambda x: changed(x, lambda z: z.__setitem__((..., 0), 2.0))), "__setitem__ changes"),
    (of_mean(lambda x: F.relu(x, inplace=True)), "relu changes"),
    (of_mean(lambda x: x.sin()), "go through `sin` before"),
    (of_mean(lambda x: x.tanh()), "go through `tanh` before"),
    (of_mean(lambda x: x * torch.ones(CLASSES)), "go through `mul` before"),
    (of_mean(lambda x: x[..., torch.arange(CLASSES)]), "go through `__getitem__` before"),
    (of_mean(lambda x: x.double()), "go through `to` before"),
    (of_mean(lambda x: (3 * x.tanh()) * 2), "go through `mul` before"),
    (lambda x, y: F.nll_loss(x.flatten(0, 1), y.flatten()), "nll_loss reads logits"),
    (lambda x, y: x, "loss is computed outside of the model.*pass labels="),
]


@pytest.mark.parametrize(("loss", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_not_matched_says_why(loss: Loss, reason: str) -> None:
    inputs = batch()
    inputs["labels"].clamp_min_(0)
    with joint(Plain(loss).train(), inputs, {"head.logits": HeadCut(32)}) as traced:
        (site,) = traced.heads
        assert "cut_cross_entropy" not in str(traced.graph.graph)
    assert site.key == "head.logits"
    assert site.blocked is not None
    assert re.search(reason, site.blocked)


def test_logits_that_are_written_to_are_seen() -> None:
    """With `out=`, which no gradient passes."""
    head = nn.Linear(FEATURES, CLASSES)
    heads = Heads({}, linear_cross_entropy, lambda: "")
    with heads, torch.no_grad():
        logits = head(torch.randn(ROWS, FEATURES))
        torch.add(torch.zeros_like(logits), 1, out=logits)
        F.cross_entropy(logits, torch.zeros(ROWS, dtype=torch.int64))
    (site,) = heads.sites
    assert site.blocked == "add changes the logits in place before the loss reads them"


def test_logits_beside_a_loss_without_a_name_stay() -> None:
    model = Plain(lambda x, y: (F.cross_entropy(x.flatten(0, 1), y.flatten()), x)).train()
    with joint(model, batch()) as traced:
        (site,) = traced.heads
    assert site.blocked is not None
    assert "a loss that has no name" in site.blocked


class Tied(nn.Module):
    """A loss over what no head made, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(CLASSES, CLASSES))
        self.head = nn.Linear(CLASSES, CLASSES + 1)

    def forward(self, labels: Tensor) -> Tensor:
        rows = F.embedding(labels, self.table)
        loss = F.cross_entropy(rows, labels)
        return loss + sum(F.cross_entropy(self.head(rows.roll(i, 0)), labels) for i in (1, 2))


def test_every_loss_has_its_head() -> None:
    inputs = {"labels": torch.randint(CLASSES, (ROWS,))}
    with joint(Tied().train(), inputs) as traced:
        found = {site.key: site.blocked for site in traced.heads}
    assert list(found) == ["head.logits", "head.logits#1", "cross_entropy"]
    assert "something else than a linear's output" in str(found["cross_entropy"])
    assert found["head.logits"] is found["head.logits#1"] is None
    made, step = without_logits(Tied().train(), inputs, "head.logits#1")
    assert str(step.graph).count("target=torch.ops.fxopt.cut_cross_entropy_sum") == 1
    assert made(**inputs).isfinite()


SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 600, "use_cache": False,
}  # fmt: skip


CAUSAL = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("name", "kind", "config", "key"),
    [
        ("Gemma2", "ForCausalLM", {**CAUSAL, "head_dim": 8}, "lm_head"),  # softcap
        ("Granite", "ForCausalLM", {**CAUSAL, "logits_scaling": 8.0}, "lm_head"),
        ("Bert", "ForMaskedLM", SIZES, "cls.predictions.decoder"),  # a bias, tied
        (
            "T5", "ForConditionalGeneration",
            {
                "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
                "vocab_size": 600, "use_cache": False, "decoder_start_token_id": 0,
            },
            "lm_head",
        ),
    ],
)  # fmt: skip
def test_heads_of_hugging_face(name: str, kind: str, config: dict[str, Any], key: str) -> None:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, name + kind)(made).train()
    ids = torch.randint(600, (2, 40))
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids < 60, -100)}
    module, step = without_logits(model, inputs, f"{key}.logits", 16)
    eager, mine = measure.outcome(model, inputs), measure.outcome(module, inputs)
    assert eager.outputs - mine.outputs == {"output logits"}
    worst, off = eager.without({"output logits"}).difference(mine)
    assert off < 1e-3, worst  # BERT has key biases, whose gradient is rounding alone
    sizes = [step.bytes[o] for o in step.owner.values() if o.op != "placeholder"]
    assert max(sizes) < 2 * 40 * 600 * 4
