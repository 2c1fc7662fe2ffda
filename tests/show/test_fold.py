from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.show.fold import fold_keys, merge_sentences, sentence_shape


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], []),
        (["lm_head"], ["lm_head"]),
        ([f"l.{i}.q" for i in range(6)], ["l.{0..5}.q"]),
        (["l.0.q", "l.2.q", "l.3.q"], ["l.{0,2..3}.q"]),
        ([f"l.{i}/kv={h}" for i in range(3) for h in range(4)], ["l.{0..2}/kv={0..3}"]),
        (["l.0/kv=0", "l.0/kv=1", "l.1/kv=0"], ["l.0/kv={0..1}", "l.1/kv=0"]),
        (["l.0.q", "l.0.k", "l.1.q", "l.1.k"], ["l.{0..1}.q", "l.{0..1}.k"]),
        (["a#0", "a#1"], ["a#{0..1}"]),
        (["0.fc", "1.fc"], ["{0..1}.fc"]),
        (["fc1", "fc2"], ["fc1", "fc2"]),
        (["l.9.q", "l.10.q"], ["l.{9..10}.q"]),
    ],
    ids=str,
)
def test_examples(keys: list[str], expected: list[str]) -> None:
    assert fold_keys(keys) == expected


def unfold(pattern: str) -> list[str]:
    """All names that a folded one stands for."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [
        [
            str(number)
            for run in part.split(",")
            for number in range(int(run.split("..")[0]), int(run.split("..")[-1]) + 1)
        ]
        if i % 2
        else [part]
        for i, part in enumerate(parts)
    ]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


index = st.integers(0, 12)


@given(st.lists(st.tuples(index, index, st.sampled_from("qk")), unique=True))
def test_folded_names_stand_for_exactly_the_names_given(sites: list[tuple[int, int, str]]) -> None:
    keys = [f"layers.{layer}.{name}/kv={head}" for layer, head, name in sites]
    unfolded = [name for pattern in fold_keys(keys) for name in unfold(pattern)]
    assert sorted(unfolded) == sorted(keys)


@pytest.mark.parametrize(
    ("texts", "merged"),
    [
        (["x"], "x"),
        (["error 0.10", "error 0.2"], "error 0.10..0.2"),
        (["rank 9 of 64", "rank 10 of 64"], "rank 9..10 of 64"),
        (["-3 dB", "2 dB"], "-3..2 dB"),
        (["saves 64 KiB here", "saves 192 KiB here"], "saves 64..192 KiB here"),
        (["for 919 µs here", "for 1.2 ms here"], "for 919 µs..1.2 ms here"),
        (["1 MiB of weights", "900 KiB of weights"], "900 KiB..1 MiB of weights"),
        (["1.10x speed (measured)", "1.05x speed (measured)"], "1.05..1.10x speed (measured)"),
    ],
)
def test_merged_sentences(texts: list[str], merged: str) -> None:
    assert merge_sentences(texts) == merged


@pytest.mark.parametrize("name", ["r64", "int4", "layers.3.mlp", "model.0", "v2.1", "h2o"])
def test_numbers_inside_names_are_no_quantities(name: str) -> None:
    assert sentence_shape(name) == name
