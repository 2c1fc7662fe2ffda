"""Generated source: equal to the graph to the bit, readable, independent of depth."""

from __future__ import annotations

import ast
import copy
import pickle
import traceback
from itertools import pairwise

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.decide.verify import peak_live_bytes
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import emit
from fxopt.emit.source import places

MODELS = ["llama", "gpt2", "gemma3", "bert", "vit"]


def optimised(model, *example, **named):
    captured = capture(model, named or example)
    return emit(captured, GraphEditor(captured), model), captured


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_interpreted_graph_to_the_bit(case, name):
    found = case(name)
    opt, values = found.emit(), found.captured.arguments(**found.example)
    with torch.no_grad():
        want = torch.fx.Interpreter(found.captured.graph).run(*values, enable_io_processing=False)
        got = opt.run_flat(dict(zip(opt.program.placeholders, values, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_rewritten_model_equals_its_graph_to_the_bit(case, rewritten):
    opt = rewritten()
    values = case("llama").captured.arguments(**case("llama").example)
    with torch.no_grad():
        graph = opt.editor.graph
        want = torch.fx.Interpreter(graph).run(*values, enable_io_processing=False)
        got = opt.run_flat(dict(zip(opt.program.placeholders, values, strict=True)))
    assert torch.equal(want[0], got[0])


class Wide(nn.Module):
    """What is read last stands within the call that follows."""

    def __init__(self):
        super().__init__()
        self.up_projection_of_the_tokens = nn.Linear(6, 50)
        self.gate_projection_of_the_tokens = nn.Linear(6, 50)
        self.down = nn.Linear(50, 6)

    def forward(self, x):
        gate = self.gate_projection_of_the_tokens(x)
        return self.down(gate * self.up_projection_of_the_tokens(x))


class Hourglass(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 40), nn.Linear(40, 6), nn.Linear(6, 90)

    def forward(self, x):
        wide = self.up(x)
        return self.out(self.down(wide * wide.tanh()))


@pytest.mark.parametrize("model", [Hourglass(), Wide()], ids=["hourglass", "wide"])
def test_no_value_outlives_its_last_reader(model):
    """As much is alive as in a walk of the graph that frees each value after its last reader."""
    x = torch.randn(50, 6)
    opt, captured = optimised(model, x)
    walk, device = torch.fx.Interpreter(captured.graph), torch.device("cpu")
    with torch.no_grad():
        least = peak_live_bytes(lambda: walk.run(x), device)
        assert peak_live_bytes(lambda: opt(x), device) == least
    assert "del " in opt.source
    torch.compile(opt, fullgraph=True, backend="eager")(x).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_keeps_names_order_and_objects(case, name):
    model, opt = case(name).model, case(name).emit()
    assert list(opt.state_dict()) == list(model.state_dict())
    theirs, ours = dict(model.named_parameters()), dict(opt.named_parameters())
    assert list(theirs) == list(ours)
    assert all(theirs[key] is ours[key] for key in theirs)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in opt.named_modules()]


def test_depth_does_not_show(case):
    import transformers as hf

    shallow = case("llama")
    config = copy.deepcopy(shallow.model.config)
    config.num_hidden_layers = 6
    deep = hf.LlamaForCausalLM(config).eval()
    opt, _ = optimised(deep, **shallow.example)
    lines = opt.source.splitlines()
    assert len(lines) == len(shallow.emit().source.splitlines())
    assert len(lines) <= 100
    assert "for layer, state in zip(self.layers, past, strict=True):" in opt.source
    ids = shallow.example["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(opt(ids).logits, deep(ids).logits)


def test_reads_as_a_person_would_write_it(case):
    source = case("llama").emit().source
    assert "inner = gated(F.linear(x, self.gate_proj.weight), F.linear(x, self.up_" in source
    assert "x, normed = add_rms_norm(x, o_proj, self.post_attention_layernorm.weight" in source
    assert "input_layernorm = F.rms_norm(x, [32], self.input_layernorm.weight, 1e-06)" in source
    assert "return x + self.mlp(normed)" in source
    assert '"""model.layers.{0-2}.mlp"""' in source
    assert max(map(len, source.splitlines())) <= 100
    assert source.count("class ") == 6
    ast.parse(source)


def test_only_layers_that_differ_get_their_own_class(rewritten):
    source = rewritten().source
    assert '"""model.layers.0.mlp"""' in source
    assert "class LlamaMLP_1(nn.Module):" in source
    assert "torch.ops.fxopt.chunked.default" in source
    assert "torch.ops.fxopt.low_rank_linear" in source
    assert 'layout="0:k8v8g32r0s0|1:kf8vf8g32r0s0"' in source
    # A module whose forward became one call is written where it was called.
    assert source.count("class LlamaDecoderLayer") == 2
    assert "for layer, state in zip(self.layers, past, strict=True):" in source


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_copies_pickles_and_compiles(case, name):
    found = case(name)
    opt = found.emit()
    with torch.no_grad():
        want = opt(**found.example)[0]
        for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert torch.equal(other(**found.example)[0], want)
            assert other.source == opt.source
            own = {id(p) for p in opt.parameters()}
            assert not own & {id(p) for p in other.parameters()}
        compiled = torch.compile(opt, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**found.example)[0], want)


@pytest.mark.parametrize("hidden", [0, 35])
@pytest.mark.parametrize("pool_tokens", [None, 100])
def test_compiles_with_a_cache(rewritten, pool_tokens, hidden):
    opt = rewritten()
    ids = torch.randint(3, 61, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :hidden] = 0
    seen = {high: mask[:, :high] if hidden else None for high in range(41)}
    torch.compiler.reset()  # so many compilations of one function are allowed
    compiled = torch.compile(opt, fullgraph=True, backend="aot_eager")
    outputs = []
    for run in (opt, compiled):
        cache = opt.make_cache(2, 48, pool_tokens=pool_tokens)
        with torch.no_grad():
            steps = [run(input_ids=ids[:, low:high], attention_mask=seen[high], use_cache=True,
                         past_key_values=cache).logits
                     for low, high in pairwise([0, 37, 38, 39, 40])]  # fmt: skip
        outputs.append(torch.cat(steps, 1))
    torch.testing.assert_close(*outputs)


def test_tracebacks_show_generated_lines():
    opt, _ = optimised(nn.Sequential(Block(), Block()), torch.randn(3, 6))
    with pytest.raises(RuntimeError) as caught:
        opt(torch.randn(3, 5))
    text = "".join(traceback.format_exception(caught.value))
    assert "F.layer_norm(x, [6], self.norm.weight, self.norm.bias, 1e-05)" in text


class Shared(nn.Module):
    """One block under two names and called three times, a loop that skips one, odd names."""

    def __init__(self):
        super().__init__()
        self.a = Block()
        self.b = self.a
        self.stack = nn.ModuleList(Block() for _ in range(4))
        self.by_name = nn.ModuleDict({"one-two": Block(), "plan": nn.Linear(6, 6)})
        self.program = nn.Linear(6, 6)
        self.source = nn.Parameter(torch.randn(6))
        self.weights = nn.ParameterList([torch.randn(6), torch.randn(6)])

    def forward(self, x):
        x = self.b(self.a(self.a(x)))
        for block in self.stack[1:]:
            x = block(x)
        x = self.by_name["plan"](self.by_name["one-two"](x))
        return self.program(x) * self.source + self.weights[0] - self.weights[1]


class Interleaved(nn.Module):
    """The inner call needs a value that is computed between its own nodes."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))

        def forward(self, x, between):
            y = torch.sin(x * self.scale)
            return between(y) * self.scale

    def __init__(self):
        super().__init__()
        self.inner, self.mid = self.Inner(), nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x, lambda y: torch.cos(self.mid(y)) + y.mean())


class Borrowed(nn.Module):
    """A child that multiplies by a parameter of its sibling."""

    class Head(nn.Module):
        def forward(self, x, table):
            return torch.relu(x @ table.T) + 1

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), self.Head()

    def forward(self, ids):
        return self.head(self.table(ids), self.table.weight)


class Hostile(nn.Module):
    """Names that generated code needs for itself, and the same value in two places."""

    def __init__(self):
        super().__init__()
        self.self, self.attend, self.torch = (nn.Linear(6, 6) for _ in range(3))
        self.F = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, zip, float):
        a = self.self(zip)
        b = self.attend(a) + a.float()
        c = self.torch(b) * float.clamp(max=torch.inf)
        for layer in self.F:
            c = layer(c)
        return c + self.F[0](a), a.unbind(-1)[0], zip


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Shared(), torch.randn(3, 6)),
        (Interleaved(), torch.randn(3, 6)),
        (Borrowed(), torch.tensor([[1, 2, 3], [4, 5, 10]])),
        (nn.Sequential(Block(), nn.Sequential(nn.Linear(6, 6), nn.GELU()), Block()),
         torch.randn(3, 6)),
    ],
    ids=["shared", "interleaved", "borrowed", "sequential"],
)  # fmt: skip
def test_module_trees_of_all_kinds(model, example):
    model = model.eval()
    opt, captured = optimised(model, example)
    with torch.no_grad():
        assert torch.equal(opt(example), captured.run(example))
        torch.testing.assert_close(opt(example), model(example))
        other = pickle.loads(pickle.dumps(opt))
        assert torch.equal(other(example), opt(example))
    assert list(opt.state_dict()) == list(model.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in opt.named_modules()]


def test_names_that_generated_code_needs():
    inputs = (torch.randn(3, 6), torch.randn(3, 6))
    opt, captured = optimised(Hostile().eval(), *inputs)
    with torch.no_grad():
        for got, want in zip(opt(*inputs), captured.run(*inputs), strict=True):
            assert torch.equal(got, want)


def test_shared_modules_stay_shared():
    opt, _ = optimised(Shared().eval(), torch.randn(3, 6))
    assert opt.a is opt.b
    assert copy.deepcopy(opt).a is not opt.a
    assert "for layer in self.stack[1:]:" in opt.source


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (["a"], "a"),
        (["h.0.mlp", "h.1.mlp", "h.2.mlp"], "h.{0-2}.mlp"),
        (["h.0", "h.2", "h.3"], "h.{0,2-3}"),
        (["h.4"], "h.4"),
        ([""], ""),
    ],
)
def test_places(modules, text):
    assert places(modules) == text
