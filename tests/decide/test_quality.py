"""Quality measures against straightforward float64 computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import stdtrit
from torch import Tensor

from fxopt.decide.quality import (
    Quality,
    Reference,
    divergence,
    half_width,
    kl_divergence,
    runs,
    upper_bound,
)
from fxopt.ir.errors import FxoptError


def test_kl_agrees_with_float64() -> None:
    p, q = torch.randn(501, 63), torch.randn(501, 63)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q).double(), expected, rtol=1e-5, atol=1e-6)


def test_kl_of_a_model_with_itself_is_zero() -> None:
    p = torch.randn(7, 11) * 30
    assert kl_divergence(p, p).abs().max() == 0


def test_relative_error_is_additive_in_squares() -> None:
    y, d = torch.randn(3, 5), torch.randn(3, 5) * 0.1
    quality = Quality("relative_error", per_position=False)
    squared = divergence(quality, y, y + d, {}, None).item()
    assert quality.measured(squared) == pytest.approx((d.norm() / y.norm()).item(), rel=1e-5)
    assert quality.additive(quality.measured(squared)) == pytest.approx(squared)


@pytest.mark.parametrize(
    ("prompt", "new", "length", "expected"),
    [(0, 0, 8, 0), (3, 5, 8, 3), (100, 4, 8, 4), (100, 128, 8, 4), (6, 4, 9, 5), (5, 1, 1, 0)],
)
def test_prompt_leaves_what_is_generated(prompt: int, new: int, length: int, expected: int) -> None:
    assert Quality("kl", True, prompt, new).prompt_of(length) == expected


def test_positions_skip_the_prompt_and_padding() -> None:
    quality = Quality("kl", per_position=True, prompt=3, new_tokens=5)
    batch = {
        "input_ids": torch.zeros(1, 8, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]),
    }
    positions = quality.positions(batch)
    assert positions is not None
    assert positions.tolist() == [4, 5, 6, 7]


def test_loss_increase_is_the_difference_of_cross_entropies() -> None:
    ids = torch.randint(11, (1, 9))
    positions = torch.arange(2, 9)
    p, q = torch.randn(1, 7, 11), torch.randn(1, 7, 11)
    labels = ids[0, 3:]
    loss = torch.nn.functional.cross_entropy
    expected = loss(q[0, :-1], labels) - loss(p[0, :-1], labels)
    quality = Quality("loss_increase", per_position=True)
    # by name, whatever comes first
    batch = {"attention_mask": torch.ones_like(ids), "input_ids": ids}
    found = divergence(quality, p, q, batch, positions).mean()
    torch.testing.assert_close(found, expected)


def test_labels_that_do_not_count_are_left_out() -> None:
    quality = Quality("loss_increase", per_position=True)
    ids = torch.randint(11, (1, 9))
    labels = torch.full_like(ids, -100)
    labels[0, [4, 7]] = ids[0, [4, 7]]
    rows, found = quality.labels({"input_ids": ids, "labels": labels}, torch.arange(2, 9))
    assert rows.tolist() == [1, 4]
    assert found.tolist() == ids[0, [4, 7]].tolist()
    # what follows the last token is padding
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    positions = quality.positions(batch)
    rows, found = quality.labels(batch, positions)
    assert found.tolist() == ids[0, 1:6].tolist()


def test_labels_of_models_that_are_not_causal() -> None:
    masked = Quality("loss_increase", per_position=False)
    ids, mask = torch.randint(11, (1, 6)), torch.tensor([[1, 1, 1, 1, 0, 0]])
    labels = torch.tensor([[5, -100, 7, 8, -100, -100]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    rows, found = masked.labels(batch, None)
    assert (rows.tolist(), found.tolist()) == ([0, 2, 3], [5, 7, 8])
    with pytest.raises(FxoptError, match="no labels; add `labels`"):
        masked.labels({"input_ids": ids}, None)
    both = Quality("loss_increase", per_position=False, encoder_decoder=True)
    decoded = torch.tensor([[1, 4, 6, 9]])
    rows, found = both.labels({"input_ids": ids, "decoder_input_ids": decoded}, None)
    assert (rows.tolist(), found.tolist()) == ([0, 1, 2], [4, 6, 9])
    p = torch.randn(1, 2, 11)
    with pytest.raises(FxoptError, match="labels for 3 positions"):
        divergence(both, p, p, {"input_ids": ids, "decoder_input_ids": decoded}, None)


def test_a_part_in_which_nothing_counts_certifies_nothing() -> None:
    def evaluate(module, batch, positions):
        return torch.zeros(1, len(positions), 5)

    quality = Quality("kl", per_position=True, prompt=6, new_tokens=2)
    ids, mask = torch.zeros(1, 8, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    short, whole = {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}
    with pytest.raises(FxoptError, match="no sequence of a part of it has a token past the prompt"):
        Reference(quality, evaluate, "old", [short]).measure("new")
    # the first that counts is the one that is measured
    assert Reference(quality, evaluate, "old", [short, whole]).measure("new", 1).count == 2


def test_reference_keeps_the_original_outputs_and_weighs_positions_equally() -> None:
    calls = []

    def evaluate(module, batch, positions):
        calls.append(module)
        ids = batch["input_ids"][0, positions]
        logits = torch.nn.functional.one_hot(ids, 5).float()
        return (logits * (2.0 if module == "new" else 1.0))[None]

    quality = Quality("kl", per_position=True)
    batches = [{"input_ids": torch.randint(5, (1, n))} for n in (3, 9)]
    reference = Reference(quality, evaluate, "old", batches)
    first, second = reference.measure("new"), reference.measure("new")
    assert first == second
    assert calls.count("old") == 2
    assert first.count == 12
    one, two = torch.zeros(5), torch.zeros(5)
    one[0], two[0] = 1.0, 2.0
    assert first.mean == pytest.approx(kl_divergence(one[None], two[None]).item(), rel=1e-5)


def test_reference_computes_again_what_it_may_not_keep() -> None:
    calls = []

    def evaluate(module, batch, positions):
        calls.append(module)
        return torch.zeros(1, len(positions), 5)

    quality = Quality("kl", per_position=True)
    batches = [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
    reference = Reference(quality, evaluate, "old", batches, limit=0)
    reference.measure("new")
    reference.measure("new")
    assert calls.count("old") == 2


@pytest.mark.parametrize("sequences", [2, 4, 12])
def test_the_bound_holds_as_often_as_it_says(sequences: int) -> None:
    """Sequences differ, positions within one hardly: the bound is by sequences."""
    rng = np.random.default_rng(sequences)
    held = 0
    for _ in range(800):
        counts = rng.integers(40, 60, sequences)
        means = rng.normal(1.0, 0.3, sequences)
        bound = upper_bound(list(zip(means.tolist(), counts.tolist(), strict=True)))
        assert bound is not None
        held += bound >= 1.0
    assert 0.92 <= held / 800 <= 0.98


@pytest.mark.parametrize(("sequences", "length"), [(1, 512), (3, 170), (1, 12)])
def test_the_interval_holds_as_often_as_it_says(sequences: int, length: int) -> None:
    """Errors of neighbours go together, as those of tokens do."""
    rng = np.random.default_rng(length)
    held, widths, count = 0, list[float](), 600
    for _ in range(count):
        noise = rng.normal(0.0, 1.0, (sequences, length + 3))
        errors = 1.0 + sum(noise[:, i : length + i] for i in range(4)) / 4
        parts = [torch.from_numpy(e) for e in errors]
        within = half_width([(run.mean().item(), len(run)) for run in runs(parts)])
        assert within is not None
        widths.append(within)
        held += abs(errors.mean() - 1.0) <= within
    assert (0.90 if length > 100 else 0.75) <= held / count <= 0.99
    assert sum(map(len, runs(parts))) == sequences * length


def test_an_error_comes_with_the_interval_of_its_mean() -> None:
    quality, generator = Quality("kl", per_position=True), torch.Generator().manual_seed(2)
    batches = [{"input_ids": torch.zeros(1, 64, dtype=torch.long)} for _ in range(2)]
    logits = torch.randn(64, 9, generator=generator)
    noise = torch.randn(64, 9, generator=generator)

    def evaluate(module: Any, batch: Any, positions: Any) -> Tensor:
        return logits + module * noise

    found = Reference(quality, evaluate, 0.0, batches).measure(0.3, batches=1)
    errors = kl_divergence(logits, logits + 0.3 * noise)
    means = errors.double().reshape(16, 4).mean(1)
    expected = float(stdtrit(15, 0.975)) * (means.std() / 4).item()
    assert found.within == pytest.approx(expected)
    assert found.upper is None
    whole = Reference(Quality("relative_error", per_position=False), evaluate, 0.0, batches)
    assert whole.measure(0.3).within is None  # two numbers tell nothing


def test_one_sequence_bounds_nothing() -> None:
    assert upper_bound([(0.3, 100)]) is None
