"""The documents of the tiny model's yardstick: what they ask is told in them, once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import tiny_lm_data

    yield tiny_lm_data
    sys.modules.pop("tiny_lm_data")


@pytest.mark.parametrize(("turns", "length"), [(1, 300), (4, 1000), (7, 4096)])
def test_each_turn_asks_for_another_name(data, turns: int, length: int) -> None:
    documents, answers = data.retrieval_turns(5, turns, length, seed=turns)
    assert documents.shape == (5, length)
    for ids in documents:
        text = bytes(ids.tolist()).decode()
        told = dict(re.findall(r"^(k[0-9a-f]{4}) = '([0-9a-f]{6})'$", text, re.MULTILINE))
        asked = re.findall(r"^assert (k[0-9a-f]{4}) == '([0-9a-f]{6})'$", text, re.MULTILINE)
        assert len(asked) == len(told) == turns
        assert dict(asked) == told
        assert [text[answer] for answer in answers] == [value for _, value in asked]
        first = text.index(f"assert {asked[0][0]}")
        assert all(text.index(f"{name} = ") < first for name in told)
        assert text.endswith(f"'{asked[-1][1]}'\n")


def test_documents_are_those_of_their_seed(data) -> None:
    one, other, again = (data.retrieval_turns(2, 2, 300, seed)[0] for seed in (0, 1, 0))
    assert one.equal(again)
    assert not one.equal(other)
    ids, answer = data.retrieval_documents(3, 500)
    assert answer == slice(492, 498)
    text = bytes(ids[0].tolist()).decode()
    assert text.count(text[answer]) == 2
