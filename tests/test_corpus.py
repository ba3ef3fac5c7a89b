"""Every spelling lifts to its text and computes what eager does; impostors are refused or right.

Spellings run in training in float32 and in inference in bfloat16; the text must be the same.
"""

import re

import pytest
import torch
import torch.nn.functional as F

import tvcompile
from tests import harness
from tests.impostors import IMPOSTORS
from tests.spellings import CORPUS, clauses, same_meaning
from tests.spellings.meaning import Means, evaluate, positions

MODES = {"train": (True, torch.float32), "infer": (False, torch.bfloat16)}
DYNAMIC = (
    "scale.div_scores_by_sqrt",
    "contractions.einsum_bqhd",
    "softmaxes.upcast_and_dropout_zero",
    "grouped.repeat_kv",
    "causal.tril_masked_fill",
    "causal.bottom_right_arange",
    "padding.causal_and_left_padding",
    "sdpa.is_causal",
    "sinks.gpt_oss",
    "modules.NanoGPT",
)
MORE_THAN_ATTENTION = (
    "scores.rope",
    "regions.all_without_grad",
    "regions.output_mutated_after",
    "regions.residual_and_norm",
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CORPUS)
def test_spelling(name, mode):
    spelling = CORPUS[name]
    train, dtype = MODES[mode]
    train = train and spelling.train
    report = harness.run(spelling.build(dtype), spelling.make_inputs(dtype), train)
    assert len(report.sites) == spelling.sites, [str(r) for r in report.refusals]
    for site in report.sites:
        assert spelling.accepts(site.spec), f"{site.spec!r}, expected {spelling.spec!r}"
    _, _, rows, columns = spelling.sizes
    if rows > 1:
        assert not harness.square_nodes(report, rows, columns)
    if spelling.kv_heads is not None:
        given = [x.meta["val"] for n in harness.attention_nodes(report) for x in n.args[1:3]]
        assert {int(x.shape[1]) for x in given} == {spelling.kv_heads}


@pytest.mark.parametrize("name", DYNAMIC)
def test_spelling_with_dynamic_shapes(name):
    spelling = CORPUS[name]
    inputs = spelling.make_inputs(torch.float32)
    report = harness.run(spelling.build(torch.float32), inputs, True, dynamic=True)
    assert len(report.sites) == spelling.sites, [str(r) for r in report.refusals]


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostor(name):
    impostor = IMPOSTORS[name]
    report = harness.run(impostor.program, impostor.make_inputs(torch.float32), impostor.train)
    if impostor.reason is None:
        return
    assert not report.sites, [site.spec for site in report.sites]
    reasons = [refusal.reason for refusal in report.refusals]
    assert any(re.search(impostor.reason, reason) for reason in reasons), reasons
    assert all("impostors" in refusal.where for refusal in report.refusals)


def plainly_attention():
    """Spellings of q, k, v in [B, H, S, D] alone, whose text says everything."""
    layouts = [("BHMD", "BHND", "BHND"), ("BHMD", "BHMD", "BHMD"), ("BHND", "BHMD", "BHMD")]
    for spelling in CORPUS.values():
        text = spelling.spec.text if isinstance(spelling.spec, Means) else spelling.spec
        if isinstance(text, str) and spelling.inputs in layouts and spelling.sites == 1:
            outside = "autocast" in spelling.name or spelling.name in MORE_THAN_ATTENTION
            if not isinstance(spelling.program, type) and "[" not in text and not outside:
                yield pytest.param(spelling, text, id=spelling.name)


@pytest.mark.parametrize("spelling, text", list(plainly_attention()))
def test_expected_text_is_what_the_program_computes(spelling, text):
    """The corpus itself: the text, evaluated over every pair, gives the program's output."""
    q, k, v = spelling.make_inputs(torch.float64)
    with torch.no_grad():
        out = spelling.build(torch.float64)(q, k, v)
        expected = evaluate_attention(text, q, k, v)
    out = out[0] if isinstance(out, tuple) else out
    if out.shape != expected.shape:
        expected = expected.transpose(1, 2).reshape(out.shape)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def evaluate_attention(text: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """Attention as a spec text defines it, in plain steps. [B, H, S, D] -> [B, H, S_q, D_v]"""
    parts = clauses(text)
    scope = positions((q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    scope["s"] = q @ k.mT * float(parts["scale"])
    logits = evaluate(parts.get("score", "s"), scope)
    if "keep" in parts:
        fill = torch.finfo(q.dtype).min if parts.get("empty", "").startswith("mean") else -torch.inf
        logits = logits.masked_fill(~evaluate(parts["keep"], scope), fill)
    if "sink" not in parts:
        return logits.softmax(-1) @ v
    sink = torch.as_tensor(evaluate(parts["sink"], scope)).to(q.dtype)
    weights = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], -1).softmax(-1)
    return weights[..., :-1] @ v


def dropped_weights(q, k, v):
    return F.dropout(F.softmax(q @ k.mT / 4, -1), 0.25) @ v


def dropped_by_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)


def dropped_scores(q, k, v):
    return F.softmax(F.dropout(q @ k.mT / 4, 0.25), -1) @ v


@pytest.mark.parametrize("program", [dropped_weights, dropped_by_sdpa])
def test_dropout_is_unbiased_and_its_gradient_sees_the_same_weights(program):
    """out is linear in v: sum(out * d) == sum(v * grad of v), if both drop the same weights."""
    make = CORPUS["softmaxes.functional"].make_inputs
    inputs = [harness.fresh(x, None, True) for x in make(torch.float32)]
    call = torch.compile(program, backend="tv", options=harness.STRICT, fullgraph=True)
    with tvcompile.collect() as report:
        out = call(*inputs)
    assert [site.spec for site in report.sites] == ["scale=0.25; dropout=0.25"]
    direction = torch.randn(out.shape)
    (grad,) = torch.autograd.grad(out, inputs[2:], direction)
    torch.testing.assert_close((out * direction).sum(), (inputs[2] * grad).sum(), rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        plain = F.scaled_dot_product_attention(*inputs)
        draws = torch.stack([call(*inputs) for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    assert float((draws.mean(0) - plain).abs().mean()) < 3 * float(draws.std(0).mean()) / 200**0.5


def test_dropped_scores_are_refused():
    inputs = CORPUS["softmaxes.functional"].make_inputs(torch.float32)
    _, report = harness.compiled(dropped_scores, inputs, True)
    assert not report.sites and report.refusals


def test_meaning_tells_texts_apart():
    sizes = (2, 3, 5, 7)
    assert same_meaning("scale=0.25; keep = kv <= q", "scale=0.25; keep = q - kv >= 0", sizes)
    assert same_meaning("scale=1; score = s*0.5/bias[q]", "scale=0.5; score = s/bias[0, q]", sizes)
    assert not same_meaning("scale=0.25; keep = kv <= q", "scale=0.25; keep = kv < q", sizes)
    assert not same_meaning("scale=0.25; keep = pad[b, kv]", "scale=0.25; keep = pad[b, q]", sizes)
    assert not same_meaning("scale=0.25", "scale=0.25; empty=nan", sizes)
    with pytest.raises(ValueError, match="out of order"):
        clauses("keep = kv <= q; scale=1")


def test_tolerance_is_twice_eager():
    def row(last, first=1.0):
        return torch.tensor([first, *[1.0] * harness.FEW, last])

    exact, eager = row(2.0).double(), row(2.0 + 1e-3)
    assert not harness.tolerated(row(2.0 - 1.9e-3), eager, exact)
    assert harness.tolerated(row(2.0 - 2.1e-3), eager, exact)
    assert harness.tolerated(row(2.0, torch.nan), eager, exact)
    assert harness.tolerated(row(2.0), row(2.0, torch.nan), exact)
