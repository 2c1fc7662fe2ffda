"""The script that trains the shipped model: a run that was interrupted ends as one that was not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_tiny_lm

    yield train_tiny_lm
    for name in ("train_tiny_lm", "tiny_lm_data"):
        sys.modules.pop(name)


def test_training_goes_on_where_it_stopped(script, tmp_path: Path) -> None:
    text = bytes(range(32, 127)) * 40
    schedule = replace(
        script.Schedule(5, 1e-3, 0.1), tokens=1024, warmup_steps=2, every=2,
        short_context=512, short_fraction=1.0,
    )  # fmt: skip

    def trained(out: Path, log) -> dict[str, torch.Tensor]:
        out.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = LlamaForCausalLM(script.llama_config(script.Size(1, 64, 96, 2)))
        script.train(model, text, b"x = 1\n" * 1000, schedule, out, log)
        return model.state_dict()

    class Interrupt(Exception):
        pass

    reports: list[str] = []

    def interrupt(message: str) -> None:
        reports.append(message)
        raise Interrupt

    whole = trained(tmp_path / "whole", reports.append)
    assert [r.split()[1] for r in reports] == ["2", "4"]
    for steps in ("2", "4"):
        with pytest.raises(Interrupt):
            trained(tmp_path / "parts", interrupt)
        assert reports[-1].split()[1] == steps
    ended = trained(tmp_path / "parts", reports.append)
    assert len(reports) == 4
    assert all(ended[name].equal(value) for name, value in whole.items())


def test_batches_depend_on_their_step_alone(script) -> None:
    batches = script.Batches(bytes(range(256)) * 20, torch.device("cpu"))
    first = batches.draw(0, 6, 1000)
    assert first.shape == (6, 1000)
    other = batches.draw(1, 6, 1000)
    assert not first.equal(other)
    assert first.equal(script.Batches(batches.text, torch.device("cpu")).draw(0, 6, 1000))
