"""Sparse patterns of q and kv alone: windows, chunks, dilation, global tokens, prefixes."""

import torch
import torch.nn.functional as F

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
INF = float("-inf")
WINDOW = "scale=0.25; keep = kv <= q & q - kv < 8"


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


def square(spec):
    return spells(spec, *SELF, columns="M")


def fill(q, k, v, keep):
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


def rows_and_columns():
    return torch.arange(37)[:, None], torch.arange(37)[None, :]


@square(WINDOW)
def window_difference(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, (j <= i) & (i - j < 8))


@square(WINDOW)
def window_greater(q, k, v):
    i, j = rows_and_columns()
    keep = (j <= i) & (j > i - 8)
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, -1, dtype=torch.float32).to(q.dtype) @ v


@square(WINDOW)
def window_range(q, k, v):
    i, j = rows_and_columns()
    distance = i - j
    return fill(q, k, v, (distance >= 0) & (distance <= 7))


@square(WINDOW)
def window_tril_triu(q, k, v):
    return fill(q, k, v, torch.ones(37, 37, dtype=torch.bool).tril().triu(-7))


@square(WINDOW)
def window_tril_minus_tril(q, k, v):
    ones = torch.ones(37, 37)
    return fill(q, k, v, (ones.tril() - ones.tril(-8)).bool())


@square(WINDOW)
def window_tril_xor(q, k, v):
    ones = torch.ones(37, 37, dtype=torch.bool)
    return fill(q, k, v, ones.tril() ^ ones.tril(-8))


@square(WINDOW)
def window_not_or(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, ~((j > i) | (i - j >= 8)))


@square(WINDOW)
def window_two_additive(q, k, v):
    """A causal mask and a window mask, added one after the other."""
    causal = torch.full((37, 37), INF, dtype=q.dtype).triu(1)
    window = torch.full((37, 37), INF, dtype=q.dtype).tril(-8)
    return F.softmax(scores(q, k) + causal + window, -1) @ v


@square(WINDOW)
def window_where_of_where(q, k, v):
    i, j = rows_and_columns()
    s = torch.where(j <= i, scores(q, k), INF)
    return torch.where(i - j < 8, s, INF).softmax(-1) @ v


@square(Means("scale=0.25; keep = abs(q - kv) <= 5"))
def window_both_sides(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, (i - j).abs() <= 5)


@square(Means("scale=0.25; keep = abs(q - kv) <= 5"))
def window_both_sides_triangles(q, k, v):
    return fill(q, k, v, torch.ones(37, 37, dtype=torch.bool).tril(5).triu(-5))


@square(Means("scale=0.25; keep = kv <= q & q // 8 == kv // 8"))
def chunks(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, (i // 8 == j // 8) & (j <= i))


@square(Means("scale=0.25; keep = q // 8 == kv // 8"))
def blocks(q, k, v):
    i = torch.arange(37).div(8, rounding_mode="floor")
    return fill(q, k, v, i[:, None] == i[None, :])


@square(Means("scale=0.25; keep = kv // 8 <= q // 8"))
def block_causal(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, torch.floor_divide(j, 8) <= torch.floor_divide(i, 8))


@square(Means("scale=0.25; keep = kv <= q & (q - kv) % 2 == 0"))
def dilated(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, ((i - j) % 2 == 0) & (i >= j))


@square(Means("scale=0.25; keep = kv <= q & (q - kv) % 3 == 0"))
def dilated_remainder(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, (torch.remainder(i - j, 3) == 0) & (i >= j))


@square(Means("scale=0.25; keep = abs(q - kv) <= 4 | kv < 2 | q < 2"))
def global_and_local(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, ((i - j).abs() <= 4) | (j < 2) | (i < 2))


@square(Means("scale=0.25; keep = kv <= q & (q - kv < 8 | kv < 4)"))
def sink_tokens_and_window(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, (j <= i) & ((i - j < 8) | (j < 4)))


@square(Means("scale=0.25; keep = kv <= q & (q - kv < 4 | (q - kv) % 4 == 0)"))
def strided(q, k, v):
    i, j = rows_and_columns()
    d = i - j
    return fill(q, k, v, (d >= 0) & ((d < 4) | (d % 4 == 0)))


@square(Means("scale=0.25; keep = kv <= q | kv < 10"))
def prefix(q, k, v):
    i, j = rows_and_columns()
    return fill(q, k, v, (j <= i) | (j < 10))


@square(Means("scale=0.25; keep = kv <= q | kv < 10"))
def prefix_by_assignment(q, k, v):
    keep = torch.ones(37, 37, dtype=torch.bool).tril()
    keep[:, :10] = True
    return fill(q, k, v, keep)


@square(Means("scale=0.25; keep = q == kv"))
def diagonal(q, k, v):
    return fill(q, k, v, torch.eye(37, dtype=torch.bool))


@square((Means("scale=0.25; keep = q != kv"), Means("scale=0.25; keep = q != kv; empty=nan_cut")))
def all_but_itself(q, k, v):
    return fill(q, k, v, ~torch.eye(37, dtype=torch.bool))


@spells(Means("scale=0.25; keep = q % 3 == kv % 3"), *QKV)
def interleaved_streams(q, k, v):
    return fill(q, k, v, torch.arange(37)[:, None] % 3 == torch.arange(41) % 3)


@spells(Means("scale=0.25; keep = kv <= q + 4 & q + 4 - kv < 8"), *QKV)
def window_with_cache(q, k, v):
    """Queries are the last 37 of 41 positions."""
    i, j = torch.arange(4, 41)[:, None], torch.arange(41)
    return fill(q, k, v, (j <= i) & (j > i - 8))


@spells(Means("scale=0.25; keep = 33 < kv"), "BH1D", "BHND", "BHND", rows="1")
def window_of_one_query(q, k, v):
    return fill(q, k, v, (torch.arange(41) > 40 - 7)[None, :])


@square(Means("scale=0.25; keep = kv <= q & (q - kv < 4 | h < 3)"))
def heads_differ(q, k, v):
    """Half of the heads see all of the past, half a window."""
    i, j = rows_and_columns()
    full = torch.arange(6)[:, None, None] < 3
    return fill(q, k, v, (j <= i) & ((i - j < 4) | full))


@square(Means("scale=0.25; keep = kv <= q & q - kv < 2 * (h + 1)"))
def window_per_head(q, k, v):
    i, j = rows_and_columns()
    width = 2 * (torch.arange(6) + 1).view(6, 1, 1)
    return fill(q, k, v, (j <= i) & (i - j < width))


@square(Means("scale=0.25; keep = abs(kv // 6 - q // 6) <= 1 & abs(kv % 6 - q % 6) <= 1"))
def two_dimensional_window(q, k, v):
    """Neighbours on a grid six wide."""
    i, j = rows_and_columns()
    return fill(q, k, v, ((i // 6 - j // 6).abs() <= 1) & ((i % 6 - j % 6).abs() <= 1))
