"""Every CPU kernel against the formula in float64: outputs, lse and all gradients, tile by tile."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernel_cases import H_KV, SHAPES, SPECS, B, D, H, captures_of, compare, results
from tvcompile import syntax
from tvcompile.kernels import KERNELS, Problem, mods, tiles
from tvcompile.kernels.attention import attention_ref, choose
from tvcompile.kernels.experts import Units
from tvcompile.kernels.problem import Given, Need
from tvcompile.spec import AttentionSpec
from tvcompile.tuning.cpu import Config


def cut_by(monkeypatch, config):
    """Every problem from here on has this config."""
    made = Problem.of
    monkeypatch.setattr(Problem, "of", staticmethod(lambda *args: dataclasses.replace(made(*args), config=config)))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of many heights and stacks although the problems are small."""
    cut_by(monkeypatch, Config(scores=4000))
    monkeypatch.setattr(tiles, "TILE_COST", 300)
    monkeypatch.setattr(tiles, "LARGE", 0)
    tiles._static_tiles.cache_clear()
    yield
    tiles._static_tiles.cache_clear()


by_name = pytest.mark.parametrize("kernel", [k for k in KERNELS if k.device == "cpu"], ids=lambda k: k.name)


@by_name
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_outputs_and_gradients_agree_with_the_formula(kernel, spec, shape):
    compare(kernel, spec, shape, torch.float32)


@by_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_other_dtypes_keep_eagers_accuracy(kernel, spec, dtype):
    compare(kernel, spec, SHAPES["square"], dtype)


@by_name
@pytest.mark.parametrize("D_v", [8, 24])
@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["window"]], ids=["plain", "window"])
def test_values_may_be_narrower_or_wider_than_keys(kernel, spec, D_v):
    compare(kernel, spec, SHAPES["odd"], torch.float32, D_v)


@by_name
def test_rows_shifted_to_finfo_min_keep_their_gradients(kernel):
    """Softmax of equal scores is uniform however low they are; lse alone cannot tell."""
    S = 64
    bias = torch.zeros(S)
    bias[: S // 2] = torch.finfo(torch.float32).min
    spec = "scale=0.25; score = s + bias[q]"
    q, k, v = (torch.randn(1, 1, S, D) for _ in range(3))
    direction = torch.randn(1, 1, S, D)
    exact = results(lambda a, b, c, d: attention_ref(a, b, c, d, [], spec), q, k, v, [bias], direction)
    p = Problem.of(q, k, v, [bias], [], spec, None)
    out, lse = kernel.forward(p)
    g = kernel.backward(p, Given(direction, out, lse), ())
    for got, want in zip((out, g.dq, g.dk, g.dv), (exact[0], *exact[2:5])):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@by_name
@pytest.mark.parametrize("spec", [SPECS["causal"], SPECS["padded_mean"]], ids=["causal", "padded"])
def test_strided_and_expanded_inputs(kernel, spec):
    S = 70
    q = torch.randn(B, S, H, D).transpose(1, 2)
    k = torch.randn(1, 1, S, D).expand(B, H_KV, S, D)
    v = torch.randn(B, H_KV, D, S).mT
    captures = captures_of(spec, S, S, torch.float32)
    p = Problem.of(q, k, v, captures, [], spec, None)
    out, lse = kernel.forward(p)
    want = attention_ref(q, k, v, captures, [], spec)
    torch.testing.assert_close((out, lse), want)
    direction = torch.randn(B, H, 1, 1).expand(B, H, S, D)
    g = kernel.backward(p, Given(direction, out, lse), ())
    exact = results(lambda a, b, c, d: attention_ref(a, b, c, d, [], spec), q, k, v, captures, direction)
    torch.testing.assert_close([g.dq, g.dk, g.dv], exact[2:5])


def test_a_sliding_window_is_a_stack_of_equal_blocks(monkeypatch):
    cut_by(monkeypatch, Config(scores=1 << 30))
    monkeypatch.setattr(tiles, "TILE_COST", 40_000)
    q, k = torch.empty(1, 8, 4096, 64), torch.empty(1, 2, 4096, 64)
    p = Problem.of(q, k, k, [], [], "scale=1; keep = kv <= q & q - kv < 256", None)
    found = tiles.tiles(p)
    rows = sum(t.stack * t.height for t in found)
    area = sum(t.stack * t.height * t.width for t in found)
    assert rows == 4096 and max(t.stack for t in found) > 10
    assert area < 1.3 * 4096 * 256


def test_left_padding_is_skipped_per_batch_element():
    pad = torch.ones(2, 512, dtype=torch.bool)
    pad[0, :384] = False
    q = torch.empty(2, 2, 512, 16)
    p = Problem.of(q, q, q, [pad], [], "scale=1; keep = kv <= q & pad[b, kv]; empty=mean", None)
    seen = [sum(t.height * t.width * t.stack for t in tiles.tiles(p) if t.b[0] <= b < t.b[1]) for b in (0, 1)]
    assert seen[0] < 0.15 * seen[1]


def test_dropout_keeps_the_right_share_independently_in_every_direction():
    from tvcompile.kernels.dropout import keep_weights

    p = Problem.of(*[torch.empty(4, 4, 256, 8)] * 3, [], [], "scale=1; dropout=0.25", None)
    found = [keep_weights(torch.tensor(s), p.scope, 0.25) for s in (0, 1, 2**40)]
    kept = [(f > 0).float() for f in found]
    assert found[0].unique().tolist() == pytest.approx([0.0, 4 / 3])
    for i, x in enumerate(kept):
        assert abs(float(x.mean()) - 0.75) < 2e-3
        for dim in range(4):
            near = (x * x.roll(1, dim)).mean()
            assert abs(float(near) - 0.75**2) < 3e-3
            spread = x.mean([d for d in range(4) if d != dim])
            assert float((spread - 0.75).abs().max()) < 0.03
        for other in kept[:i]:
            assert abs(float((x * other).mean()) - 0.75**2) < 3e-3


def test_a_dropout_block_is_a_part_of_the_whole():
    from tvcompile.kernels.dropout import keep_weights

    p = Problem.of(*[torch.empty(2, 3, 40, 8)] * 3, [], [], "scale=1; dropout=0.5", None)
    whole = keep_weights(torch.tensor(9), p.scope, 0.5)
    part = keep_weights(torch.tensor(9), p.scope.at(b=(1, 2), q=(7, 20), kv=(3, 33)), 0.5)
    assert torch.equal(part, whole[1:2, :, 7:20, 3:33])


def test_a_formula_over_a_stack_is_that_over_its_blocks():
    from tvcompile import syntax

    p = Problem.of(*[torch.empty(2, 3, 40, 8)] * 3, [], [], "scale=1", None)
    ids = torch.arange(80).view(2, 40)
    e = syntax.parse("ids[b, kv] + 100*q + 7*h")
    scope = p.scope.at(q=(4, 8), kv=(2, 12), captures={"ids": ids}, stack=3)
    blocks = [
        mods.tensor(e, p.scope.at(q=(4 + i, 8 + i), kv=(2 + i, 12 + i), captures={"ids": ids})) for i in (0, 4, 8)
    ]
    assert torch.equal(mods.tensor(e, scope), torch.stack(blocks, 1).flatten(0, 1))


@pytest.mark.parametrize(
    ("spec", "keys", "kernel"),
    [
        ("scale=1", 512, "cpu.flash"),
        ("scale=1; keep = kv <= q", 512, "cpu.products"),
        ("scale=1; keep = kv <= q", 2048, "cpu.flash"),
        ("scale=1; keep = kv <= q & q - kv < 256", 2048, "cpu.products"),
    ],
)
def test_large_float32_problems_go_whole_to_flash_where_it_computes_little_in_vain(spec, keys, kernel):
    need = Need(AttentionSpec.parse(spec), torch.float32, None, 1 << 26, keys)
    assert choose(need).name == kernel


@pytest.mark.parametrize(
    "formula, function",
    [
        ("pow(u, 2.2)", lambda u: u**2.2),
        ("pow(2.2, u)", lambda u: 2.2**u),
        ("logaddexp(u, 2.2)", lambda u: torch.logaddexp(u, torch.tensor(2.2, dtype=u.dtype))),
        ("max(u, 2.2)", lambda u: u.clamp(min=2.2)),
        ("where(u < 2.2, 1.1, u)", lambda u: torch.where(u < 2.2, torch.tensor(1.1, dtype=u.dtype), u)),
    ],
)
def test_numbers_of_a_formula_are_as_precise_as_what_they_meet(formula, function):
    u = torch.rand(50, dtype=torch.float64) * 4
    torch.testing.assert_close(mods.evaluate(syntax.parse(formula), Units(u)), function(u), rtol=1e-15, atol=0)
    assert mods.evaluate(syntax.parse(formula), Units(u.float())).dtype == torch.float32
