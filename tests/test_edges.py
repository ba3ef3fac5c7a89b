"""Where formulas and programs may part: places that count from the end, integers that wrap, rows that two masks hide.

Every program is fused or refused and gives eager's numbers and gradients, also when it is called with other sizes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tvcompile

INF, LOWEST = float("-inf"), torch.finfo(torch.float32).min
STRICT = {"tv.strict": True, "tv.codegen": "none"}
GREATEST = torch.iinfo(torch.int64).max


def masked(q, k, v, keep, fill=INF):
    return (q @ k.mT / 4).masked_fill(~keep, fill).softmax(-1) @ v


def biased(q, k, v, bias):
    return (q @ k.mT / 4 + bias).softmax(-1) @ v


def operands(S_q=9, S_kv=17):
    gen = torch.Generator().manual_seed(S_q)
    return [torch.randn(2, 3, S, 16, generator=gen) for S in (S_q, S_kv, S_kv)]


def copied(x, trains):
    return x.clone().requires_grad_(trains) if torch.is_tensor(x) else x


def same(f, calls, dynamic=None, fused=True):
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="tv", dynamic=dynamic, options=STRICT)
    with tvcompile.collect() as report:
        for given in calls:
            own, ours = ([copied(x, i < 3) for i, x in enumerate(given)] for _ in range(2))
            expected, got = f(*own), compiled(*ours)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
            for out in (expected, got):
                out.square().sum().backward()
            for a, b in zip(own[:3], ours[:3]):
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, equal_nan=True)
    specs = [site.spec for site in report.sites]
    assert bool(specs) == fused, (specs, [r.reason for r in report.refusals])
    return specs


# Places that count from the end


def cached(q, k, v):
    """The last S_q positions of a cache."""
    at = torch.arange(k.shape[2])
    return masked(q, k, v, at[-q.shape[2] :, None] >= at)


def cached_triangle(q, k, v):
    S = k.shape[2]
    return masked(q, k, v, torch.ones(S, S, dtype=torch.bool).tril()[-q.shape[2] :])


def cached_alibi(q, k, v):
    at = torch.arange(k.shape[2])
    return biased(q, k, v, -0.1 * (at[-q.shape[2] :, None] - at).abs())


def sink_and_last(q, k, v, w):
    keep = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    keep[:, :2] = True
    keep[:, -w:] = True
    return masked(q, k, v, keep)


def last_hidden(q, k, v, w):
    s = q @ k.mT / 4
    s[..., -w:] = -1e9
    return s.softmax(-1) @ v


def row_from_the_end(q, k, v, w):
    S = k.shape[2]
    return masked(q, k, v, torch.ones(S, S, dtype=torch.bool).tril()[-w], -1e9)


SIZES = ((9, 17), (7, 20), (12, 33))


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize(
    "f, widths",
    [(cached, ()), (cached_triangle, ()), (cached_alibi, ())]
    + [(f, (5, 3, 4)) for f in (sink_and_last, last_hidden, row_from_the_end)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_place_that_counts_from_the_end(f, widths, dynamic):
    calls = [[*operands(*sizes), *widths[i : i + 1]] for i, sizes in enumerate(SIZES)]
    assert all("S_kv" in spec or "kv" in spec for spec in same(f, calls, dynamic))


def test_more_than_there_are_from_the_end():
    same(sink_and_last, [[*operands(5, 5), 12], [*operands(6, 6), 12]], dynamic=True)


# Integers that wrap around


def at(x):
    return x[:, None, :, None], x[:, None, None, :]


def bytes_less_one(q, k, v, ids):
    a, b = at(ids)
    return masked(q, k, v, a - 1 >= b - 1, -1e9)


def compared(q, k, v, ids):
    a, b = at(ids)
    return masked(q, k, v, a > b, -1e9)


def beside_a_number_that_wraps(q, k, v, ids):
    return masked(q, k, v, at(ids)[1] == -1, -1e9)


def window(q, k, v, ids):
    """Positions padded by the greatest number: no difference of them wraps, 3 more than the greatest would."""
    a, b = at(ids)
    return masked(q, k, v, (a - b >= 0) & (a - b <= 3), -1e9)


def positions_in_few_bits(q, k, v):
    i, j = (torch.arange(x.shape[2], dtype=torch.uint8) for x in (q, k))
    return masked(q, k, v, (i[:, None] - j) < 200, -1e9)


def powers(q, k, v):
    i, j = (torch.arange(x.shape[2], dtype=torch.int32) << 28 for x in (q, k))
    return masked(q, k, v, i[:, None] >= j, -1e9)


def products(q, k, v):
    i, j = (torch.arange(x.shape[2], dtype=torch.int32) * (1 << 28) for x in (q, k))
    return masked(q, k, v, i[:, None] >= j, -1e9)


EXTREMES = [(torch.uint8, 250, 256), (torch.int8, 124, 128), (torch.int8, -128, -124)]
EXTREMES += [(torch.int32, 2**31 - 3, 2**31), (torch.int64, 2**63 - 3, 2**63)]


@pytest.mark.parametrize("dtype, low, high", EXTREMES, ids=str)
@pytest.mark.parametrize("f", [compared, bytes_less_one, beside_a_number_that_wraps], ids=lambda f: f.__name__)
def test_integers_at_the_ends_of_their_dtype(f, dtype, low, high):
    gen = torch.Generator().manual_seed(0)
    less = (torch.randint(1, high - low + 1, (2, 17), generator=gen) for _ in range(2))
    same(f, [[*operands(17, 17), (high - 1) - (x - 1).to(dtype)] for x in less])


def test_positions_padded_by_the_greatest_number():
    ids = torch.arange(17).expand(2, 17).clone()
    ids[0, 5:9] = ids[1, 14:] = GREATEST
    (spec,) = same(window, [[*operands(17, 17), ids]])
    assert "mask[" not in spec


def test_few_bits_that_are_cast_before_they_are_added():
    """Of a part the cast is not captured, but what is cast."""

    def f(q, k, v, ids):
        a, b = at(ids[:, :17].long())
        return masked(q, k, v, 2 * a - b >= 250, -1e9)

    (spec,) = same(f, [[*operands(17, 17), torch.arange(236, 256, dtype=torch.uint8).expand(2, 20).contiguous()]])
    assert "mask[" not in spec


def dilated(q, k, v, ids):
    """Three more than the greatest number is no other position."""
    a, b = at(ids)
    return masked(q, k, v, (a - b == 3) | (a == 0), -1e9)


def test_no_position_is_three_more_than_the_greatest_number():
    ids = torch.arange(17).expand(2, 17).clone()
    ids[0, 5:9] = ids[1, 14:] = GREATEST
    same(dilated, [[*operands(17, 17), ids]])


def below(q, k, v, ids, n):
    return masked(q, k, v, at(ids)[1] < n, -1e9)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_number_that_few_bits_do_not_hold(dynamic):
    """In uint8 300 is 44."""
    ids = torch.arange(17, dtype=torch.uint8).mul(15).expand(2, 17).contiguous()
    same(below, [[*operands(17, 17), ids, n] for n in (300, 310)], dynamic)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("f", [positions_in_few_bits, powers, products], ids=lambda f: f.__name__)
def test_positions_that_wrap(f, dynamic):
    same(f, [operands(17, 17), operands(33, 33)], dynamic)


# Floats that a formula in float32 rounds otherwise


def halves(q, k, v, ids):
    a, b = at(ids.bfloat16() + 1)
    return masked(q, k, v, a == b, -1e9)


def doubles(q, k, v, ids):
    a, b = at(ids.double())
    return masked(q, k, v, a + 1e-12 > b, -1e9)


@pytest.mark.parametrize("f", [halves, doubles], ids=lambda f: f.__name__)
def test_comparisons_in_another_precision(f):
    gen = torch.Generator().manual_seed(0)
    same(f, [[*operands(17, 17), torch.randint(0, 3, (2, 17), generator=gen) * 0.001 + 1.0]])


def test_a_bound_that_is_a_tensor_shares_the_gradient():
    def f(q, k, v):
        return (q @ k.mT).round().detach().add(q @ k.mT - (q @ k.mT).detach()).clamp(min=torch.tensor(1.0)).softmax(
            -1
        ) @ v

    torch._dynamo.reset()
    q, k, v = (x.round() for x in operands(9, 9))

    def g(q, k, v):
        return (q @ k.mT).clamp(min=torch.tensor(1.0)).softmax(-1) @ v

    assert same(g, [[q, k, v]]) == ["scale=1; score = max(s, 1.0)"]


# Rows that two masks hide


def padded_left(S=17):
    ids = torch.ones(2, S, dtype=torch.int64)
    ids[0, :6] = 0
    return ids


def causal(q, k):
    return torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])


def filled_then_added(q, k, v, ids):
    s = torch.where(causal(q, k), q @ k.mT / 4, LOWEST)
    return (s + (1.0 - ids[:, None, None, :].float()) * LOWEST).softmax(-1) @ v


def added_then_filled(q, k, v, ids):
    return masked_scores(q @ k.mT / 4 + (1.0 - ids[:, None, None, :].float()) * -1e9, causal(q, k), -1e9) @ v


def masked_scores(s, keep, fill):
    return s.masked_fill(~keep, fill).softmax(-1)


def given_and_filled(q, k, v, bias):
    return masked_scores(q @ k.mT / 4 + bias, causal(q, k), LOWEST) @ v


@pytest.mark.parametrize("f", [filled_then_added, added_then_filled], ids=lambda f: f.__name__)
def test_a_row_whose_kept_pairs_are_as_low_as_the_masked_ones(f):
    (spec,) = same(f, [[*operands(17, 17), padded_left()]])
    assert "keep" not in spec


@pytest.mark.parametrize("low", [LOWEST, INF, -1e9])
def test_a_given_mask_beside_a_finite_fill(low):
    bias = torch.where(padded_left()[:, None, None, :] > 0, 0.0, low)
    (spec,) = same(given_and_filled, [[*operands(17, 17), bias]])
    assert "keep" not in spec


def less_what_is_not_negative(q, k, v, bias):
    """A clamp bounds one side, and it is the other that counts."""
    return masked_scores(q @ k.mT / 4 - bias.clamp(min=0.0), causal(q, k), -1e9) @ v


def test_a_clamped_mask_beside_a_finite_fill():
    bias = torch.where(padded_left()[:, None, None, :] > 0, 0.0, 1e12)
    same(less_what_is_not_negative, [[*operands(17, 17), bias]])


class LearnedBias(torch.nn.Module):
    """What is learned is no mask: blocks that the causal fill hides are skipped."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(3, 17))

    def forward(self, q, k, v):
        distance = (torch.arange(17)[:, None] - torch.arange(17)).abs()
        return masked_scores(q @ k.mT / 4 + self.table[:, distance], causal(q, k), LOWEST) @ v


def slopes(q, k, v, slope):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return masked_scores(q @ k.mT / 4 - slope.view(-1, 1, 1) * distance, causal(q, k), LOWEST) @ v


def test_weights_and_slopes_leave_the_mask_a_predicate():
    (spec,) = same(LearnedBias(), [operands(17, 17)])
    assert "keep = kv <= q" in spec
    (spec,) = same(slopes, [[*operands(17, 17), torch.tensor([0.5, 0.25, 0.1])]])
    assert "keep = kv <= q" in spec


def test_a_fill_that_is_an_argument_is_a_mask_with_dynamic_shapes_too():
    def f(q, k, v, fill):
        return masked(q, k, v, causal(q, k), fill)

    for spec in same(f, [[*operands(n, n), -1e9] for n in (9, 12)], dynamic=True):
        assert "keep = kv <= q" in spec


# What is never fused


def test_nothing_may_attend():
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((9, 17), INF))

    same(f, [operands()], fused=False)


def test_nothing_is_kept():
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=1.0)

    same(f, [operands()], fused=False)


def test_booleans_in_order():
    def f(q, k, v, ids):
        a, b = at(ids > 0)
        return masked(q, k, v, ~(a < b), -1e9)

    same(f, [[*operands(17, 17), padded_left()]])


# Masks that are set step by step


def test_blocks_that_are_set_one_by_one_are_one_term_each():
    def f(q, k, v):
        keep = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
        for i in range(0, q.shape[2], 5):
            keep[i : i + 5, i : i + 5] = True
        return masked(q, k, v, keep)

    (spec,) = same(f, [operands(100, 100)])
    assert "mask[" not in spec and len(spec) < 20 * 70, spec  # of 20 blocks


def test_integers_that_weights_are_summed_with():
    """A router's probabilities at ids, as a sum over a one-hot."""

    def f(q, k, v, ids):
        probabilities = (q @ k.mT).softmax(-1)
        return (probabilities.unsqueeze(-2) * F.one_hot(ids, 17)).sum(-1) + v.sum()

    same(f, [[*operands(), torch.arange(27).view(9, 3) % 17]], fused=False)


def test_what_another_fused_site_makes_superfluous():
    """A router's probabilities at ids are a sum with a one-hot, of which the mixture needs nothing."""

    def f(x, router, up, down, ids):
        w = (F.one_hot(ids, 4).float() * (x @ router).softmax(-1)[:, None]).sum(-1)
        h = torch.einsum("th,tkhf->tkf", x, up[ids]).relu()
        return (torch.einsum("tkf,tkfh->tkh", h, down[ids]) * w[..., None]).sum(1)

    gen = torch.Generator().manual_seed(0)
    x, router, up, down = (torch.randn(*n, generator=gen) for n in ((11, 8), (8, 4), (4, 8, 12), (4, 12, 8)))
    ids = torch.arange(22).view(11, 2) % 4
    torch._dynamo.reset()
    with tvcompile.collect() as report:
        got = torch.compile(f, backend="tv", options=STRICT)(x, router, up, down, ids)
    torch.testing.assert_close(got, f(x, router, up, down, ids), rtol=1e-4, atol=1e-5)
    assert "act = relu(u)" in [site.spec for site in report.sites]


# What is written to later


def test_what_backward_reads_again_is_written_to():
    def f(q, k, v, start):
        out = masked(q, k, v, torch.arange(9)[:, None] + start >= torch.arange(17))
        start -= 5
        return out

    same(f, [[*operands(), torch.tensor(8)]])
