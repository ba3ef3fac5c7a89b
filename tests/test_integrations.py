"""Models of `transformers` with experts_implementation="tv" and attn_implementation="tv", forward and backward."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers

import tvcompile
from tests.zoo_base import DECODER, sliding_pair
from tests.zoo_entry import Entry
from tests.zoo_run import Case, Result, _compare, reference, run, to
from tvcompile.integrations import transformers as integration

transformers.logging.set_verbosity_error()
integration.register()

# A router flips where two experts score alike; in float32 the seeds below have no such token.
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ENTRIES = (
    Entry("llama", "LlamaForCausalLM", DECODER, 2),
    Entry("mixtral", "MixtralForCausalLM", dict(sliding_pair(), **EXPERTS), 2),
    Entry("gpt_oss", "GptOssForCausalLM", dict(sliding_pair(head_dim=16), **EXPERTS), 2),
    Entry(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        dict(DECODER, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
        2,
    ),
    Entry("gemma2", "Gemma2ForCausalLM", sliding_pair(head_dim=16, query_pre_attn_scalar=16), 2),
)
BY_NAME = {e.name: e for e in ENTRIES}


def tv_model(entry: Entry, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = entry.model("tv", dtype)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("tv")
    return model


def eager_model(entry: Entry, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = entry.model("eager", dtype)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def judge(entry: Entry, train: bool, compiled: bool, dtype: torch.dtype = torch.float32, pad: str = "") -> Result:
    """Errors of tv beside eager's, both to eager in float64."""
    case = Case(entry, "eager", pad, train, dtype)
    eager, ours = eager_model(entry, dtype), tv_model(entry, dtype)
    inputs = to(entry.inputs(pad=pad), dtype)
    exact = reference(case, eager, inputs)
    own = run(eager, eager, inputs, train)
    result = Result(case)
    if compiled:
        got = run(ours, torch.compile(ours, backend=noting(result.sites), fullgraph=True), inputs, train)
    else:
        with noted(result.sites):
            got = run(ours, ours, inputs, train)
    _compare(result, exact, own, got)
    return result


@contextlib.contextmanager
def noted(names: list[str]) -> Iterator[None]:
    """Notes the tv ops that run in the block."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    names.extend(e.name.removeprefix("tv::") for e in profile.events() if e.name.startswith("tv::"))


def noting(names: list[str]) -> Callable:
    """A Dynamo backend that runs the graph and notes its tv ops."""

    def backend(gm, inputs):
        targets = [str(n.target) for n in gm.graph.nodes]
        names.extend(t.split(".")[1] for t in targets if t.startswith("tv."))
        return gm.forward

    return backend


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_a_model_is_right_with_the_ops(entry, train, compiled):
    result = judge(entry, train, compiled)
    moe = 2 if entry.name in ("mixtral", "gpt_oss", "qwen3_moe") else 0
    assert result.sites.count("attention") == 2 and result.sites.count("moe") == moe, result.sites
    assert result.sites.count("moe_backward") == (moe if train and not compiled else 0), result.sites
    assert not result.wrong(), result.wrong()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_bfloat16(name):
    result = judge(BY_NAME[name], False, False, torch.bfloat16)
    assert not result.wrong(), result.wrong()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_what_padding_hides_changes_nothing(name):
    entry = BY_NAME[name]
    inputs = entry.inputs(pad="left")
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, eager = (m.eval()(**inputs).logits[kept] for m in (tv_model(entry), eager_model(entry)))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_tokens_are_generated_with_a_cache():
    entry = BY_NAME["gpt_oss"]
    inputs = entry.inputs(seq=12, pad="left")
    tokens = [
        m.eval().generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for m in (tv_model(entry), eager_model(entry))
    ]
    assert torch.equal(*tokens)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    module = torch.nn.Module()
    outs = [integration.attention(module, q, k, v, None, dropout=0.5, scaling=0.25)[0] for _ in range(400)]
    exact = integration.attention(module, q, k, v, None, scaling=0.25)[0]
    mean = torch.stack(outs).mean(0)
    assert (mean - exact).abs().max() < 0.5 and not torch.equal(outs[0], outs[1])


class Experts(torch.nn.Module):
    """As the library's decorator leaves an experts module."""

    has_gate, has_bias, has_post_expert_norm, is_transposed, _is_expert_parallel = True, False, False, False, False

    def __init__(self, gate=None, act="silu"):
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 16, 8))
        self.up_proj = torch.nn.Parameter(torch.randn(3, 16, 8))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 8, 8))
        self.act_fn = transformers.activations.ACT2FN[act]
        self._apply_gate = gate or (lambda x: self.act_fn(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])


ACTIVATIONS = {
    "silu": "act = g*sigmoid(g)*u; layout=chunk",
    "relu2": "act = where(g <= 0, 0.0, g)*where(g <= 0, 0.0, g)*u; layout=chunk",
    "quick_gelu": "act = g*sigmoid(g*1.702)*u; layout=chunk",
}


@pytest.mark.parametrize(
    "name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "tanh"]
)
def test_an_activation_of_the_library_is_read(name):
    module = Experts(act=name).double()
    text = integration.spec_of(module)
    assert text and text == ACTIVATIONS.get(name, text)
    x, ids, w = torch.randn(9, 8).double(), torch.randint(0, 3, (9, 2)), torch.rand(9, 2).double()
    exact = transformers.integrations.moe.batched_mm_experts_forward(module, x, ids, w)
    torch.testing.assert_close(integration.experts(module, x, ids, w), exact)


def test_a_clamped_gate_in_pairs_is_read():
    def gate(x):
        g, u = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (u + 1) * (g * torch.sigmoid(g * 1.702))

    assert integration.spec_of(Experts(gate)).endswith("layout=interleave")


@pytest.mark.parametrize(
    "gate, why",
    [
        (lambda x: x.chunk(2, -1)[0].flip(-1) * x.chunk(2, -1)[1], "no formula of one gate"),
        (lambda x: x.chunk(2, -1)[0].softmax(-1) * x.chunk(2, -1)[1], ""),
        (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].mean(0), ""),
        (lambda x: x.chunk(2, -1)[0].bfloat16().float() * x.chunk(2, -1)[1], "16 bits"),
        (lambda x: x.chunk(2, -1)[0] * torch.arange(8.0) * x.chunk(2, -1)[1], ""),
    ],
    ids=["flipped", "over the features", "over the tokens", "rounded", "by the feature"],
)
def test_what_is_no_activation_is_left_to_the_library(gate, why):
    module = Experts(gate)
    integration._warned.clear()
    x, ids, w = torch.randn(9, 8), torch.randint(0, 3, (9, 2)), torch.rand(9, 2)
    with pytest.warns(UserWarning, match="runs as grouped_mm.*" + why):
        got = integration.experts(module, x, ids, w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration.experts(module, x, ids, w)
    torch.testing.assert_close(got, transformers.integrations.moe.grouped_mm_experts_forward(module, x, ids, w))


def test_a_changed_activation_is_read_again():
    module = Experts()
    before = integration.spec_of(module)
    module.act_fn = torch.nn.ReLU()
    assert integration.spec_of(module) != before


def test_experts_of_other_processes_give_nothing():
    module = Experts()
    module._is_expert_parallel = True
    x, ids, w = torch.randn(9, 8), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    w = w.masked_fill(ids == 3, 0.0)
    exact = transformers.integrations.moe.batched_mm_experts_forward(module, x, ids, w)
    torch.testing.assert_close(integration.experts(module, x, ids, w), exact)


def test_a_position_bias_goes_to_the_library():
    q, k, v, bias = (torch.randn(1, 2, 6, n) for n in (8, 8, 8, 6))
    integration._warned.clear()
    with pytest.warns(UserWarning, match="runs as sdpa: position_bias"):
        out, _ = integration.attention(
            torch.nn.Module(), q, k, v, None, scaling=1.0, position_bias=bias, is_causal=False
        )
    exact = ((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 1, 5, 5), (1, 4, 1, 5), (2, 4, 5, 5)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_shape(shape, kind):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape)
    out, _ = integration.attention(torch.nn.Module(), q, k, v, mask, scaling=0.3)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(out, exact.transpose(1, 2))


def test_the_package_does_not_import_transformers():
    code = (
        "import sys, tvcompile.backend, tvcompile.integrations.transformers; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_switches_can_be_given_to_from_config():
    config = transformers.MixtralConfig(**dict(DECODER, **EXPERTS))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="tv", experts_implementation="tv")
    assert model.config._experts_implementation == model.config._attn_implementation == "tv"
    names: list[str] = []
    with noted(names), torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    assert names == ["attention", "moe"] * 2


def test_the_backend_leaves_the_ops_in_place():
    entry = BY_NAME["mixtral"]
    model, inputs = tv_model(entry).eval(), entry.inputs()
    with torch.no_grad(), tvcompile.collect() as report:
        options = {"tv.strict": True, "tv.codegen": "none"}
        got = torch.compile(model, backend="tv", options=options, fullgraph=True)(**inputs, use_cache=False).logits
        torch.testing.assert_close(got, model(**inputs).logits)
    assert report.graphs == 1 and not report.sites
