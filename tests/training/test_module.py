"""The module that trains, used as people use modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.training import TrainingModule, measure

Example = tuple[nn.Module, dict[str, Any]]


def optimised(example: Example, share: str = "75%") -> TrainingModule:
    model, inputs = example
    first = next(iter(inputs.values()))
    work = fxopt.Train(batch=first.shape[0], seq=first.shape[1])
    made = fxopt.optimize(model, fxopt.Budget(activations=share), inputs, workload=work)
    assert isinstance(made, TrainingModule)
    assert made.plan.rewritten
    return made


def trained(module: nn.Module, model: nn.Module, batches: list[Any], **options: Any) -> list[float]:
    """Losses of a few steps with accumulation and clipping; ends with the parameters moved."""
    torch.manual_seed(1)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2, **options)
    losses: list[float] = []
    for i, ids in enumerate(batches):
        logits: Tensor = module(ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.t().flatten())
        loss.backward()
        losses.append(loss.item())
        if i % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return losses


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_training_is_eager_training_bit_for_bit(small: Example, options: dict[str, Any]) -> None:
    model, _ = small
    module = optimised(small)
    start = copy.deepcopy(model.state_dict())
    # two shapes: the second is planned when it is met
    batches = [torch.randint(40, (4, 24 if i < 4 else 17)) for i in range(6)]
    mine = trained(module, module, batches, **options)
    mine_state = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    assert trained(model, model, batches, **options) == mine
    assert mine[-1] != mine[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, mine_state[name]), name


def test_parameters_and_names_are_the_originals(small: Example) -> None:
    model, inputs = small
    module = optimised(small)
    assert list(module.state_dict()) == list(model.state_dict())
    for name, parameter in model.named_parameters():
        assert module.get_parameter(name) is parameter
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    module.eval()
    assert model.training
    assert not module.training
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model.eval()(**inputs)
        torch.manual_seed(0)
        assert torch.equal(module(**inputs), expected)
    model.train()
    assert not module.get_submodule("blocks.0.3").training


def test_evaluation_mode_with_gradients_and_frozen_parameters(small: Example) -> None:
    model, inputs = small
    module = optimised(small)
    module.eval()
    model.eval()
    assert measure.outcome(module, inputs).difference(measure.outcome(model, inputs)) == ("", 0.0)
    module.train()
    model.train()
    model.get_submodule("blocks").requires_grad_(False)
    eager = measure.outcome(model, inputs)
    assert "gradient of blocks.0.1.weight" not in eager.tensors
    assert measure.outcome(module, inputs).difference(eager) == ("", 0.0)


def test_autocast_is_part_of_the_step(conv: Example) -> None:
    model, inputs = conv
    module = optimised(conv)
    with torch.autocast("cpu", torch.bfloat16):
        eager = measure.outcome(model, inputs)
        assert measure.outcome(module, inputs).difference(eager) == ("", 0.0)
    assert eager.tensors["output 0"].dtype == torch.bfloat16


def test_copies_train(small: Example) -> None:
    _, inputs = small
    module = optimised(small)
    expected = measure.outcome(module, inputs)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.get_parameter("mix.bias") is not module.get_parameter("mix.bias")
        assert measure.outcome(other, inputs).difference(expected) == ("", 0.0)


def test_under_torch_compile_the_planned_step_runs(small: Example) -> None:
    _, inputs = small
    module = optimised(small)
    compiled = torch.compile(module, backend="eager")
    expected = measure.outcome(module, inputs)
    name = "gradient of _orig_mod.mix.bias"
    found = measure.outcome(compiled, inputs).tensors  # pyright: ignore[reportArgumentType]
    assert torch.equal(found[name], expected.tensors["gradient of mix.bias"])


def test_a_graph_can_be_kept_and_hooks_run(small: Example) -> None:
    _, inputs = small
    module = optimised(small)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.get_parameter("mix.bias").register_hook(lambda _: seen.append("gradient"))
    loss = module(**inputs).square().sum()
    loss.backward(retain_graph=True)
    first = module.get_parameter("mix.bias").grad
    assert first is not None
    first = first.clone()
    loss.backward()
    assert torch.equal(module.get_parameter("mix.bias").grad, 2 * first)  # pyright: ignore
    assert seen == ["forward", "gradient", "gradient"]


class WithLoss(nn.Module):
    """Returns its loss beside logits, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.GELU(), nn.Tanh())]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_loss_inside_refuses_gradients_of_what_stands_beside_it() -> None:
    inputs = {"x": torch.randn(256, 16), "labels": torch.randint(16, (256,))}
    module = optimised((WithLoss(), inputs), "85%")
    output = module(**inputs)
    assert output["logits"].requires_grad
    with pytest.raises(fxopt.FxoptError, match="starts from `loss` alone"):
        (output["loss"] + output["logits"].mean()).backward()
    alone = module(x=inputs["x"])["logits"]
    alone.mean().backward()
    assert module.get_parameter("body.0.weight").grad is not None


def test_inputs_that_need_gradients_get_them() -> None:
    inputs = {"x": torch.randn(256, 16), "labels": torch.randint(16, (256,))}
    model = WithLoss().train()
    module = optimised((model, inputs), "85%")
    ours, eager = (inputs["x"].clone().requires_grad_() for _ in range(2))
    module(ours, labels=inputs["labels"])["loss"].backward()
    model(eager, inputs["labels"])["loss"].backward()
    assert ours.grad is not None
    assert eager.grad is not None
    assert torch.equal(ours.grad, eager.grad)


def test_a_mask_of_ones_is_no_mask() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(50, (2, 32))
    module = optimised((model, {"input_ids": ids, "labels": ids}), "90%")
    for mask in (torch.ones_like(ids), torch.tensor([[0] * 5 + [1] * 27, [1] * 32])):
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask}
        name, off = measure.outcome(module, inputs).difference(measure.outcome(model, inputs))
        assert off < 1e-5, name
        if bool(mask.all()):
            assert off == 0.0


def test_a_model_that_returns_a_cache_unasked_is_trained_without_one() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=61,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config), torch.randint(61, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    assert model(**batch).past_key_values is not None
    opt = fxopt.optimize(
        model, fxopt.Budget(activations="90%"), batch, workload=fxopt.Train(2, 16),
        rewrites=["activation.recompute"],
    )  # fmt: skip
    output = opt(**batch)
    output.loss.backward()
    assert output.past_key_values is None
    torch.testing.assert_close(output.loss, model(**batch).loss)
