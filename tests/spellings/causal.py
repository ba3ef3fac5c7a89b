"""Causal masks: by tril, triu, arange, buffers; filled or added; bottom-right too."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
CAUSAL = "scale=0.25; keep = kv <= q"
INF = float("-inf")


def causal(program):
    return spells(CAUSAL, *SELF, columns="M")(program)


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


@causal
def tril_masked_fill(q, k, v):
    mask = torch.tril(torch.ones(37, 37, dtype=torch.bool))
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@causal
def tril_equals_zero(q, k, v):
    T = q.size(-2)
    mask = torch.tril(torch.ones(T, T))
    return F.softmax(scores(q, k).masked_fill(mask == 0, INF), dim=-1) @ v


@causal
def tril_view_1_1(q, k, v):
    T = q.size(-2)
    mask = torch.ones(T, T).tril().view(1, 1, T, T)
    return F.softmax(scores(q, k).masked_fill(mask[:, :, :T, :T] == 0, INF), dim=-1) @ v


@causal
def triu_bool(q, k, v):
    blocked = torch.ones(37, 37, dtype=torch.bool).triu(1)
    return scores(q, k).masked_fill(blocked, INF).softmax(-1) @ v


@causal
def triu_of_ones_bool(q, k, v):
    blocked = torch.triu(torch.ones(q.shape[2], k.shape[2]), diagonal=1).bool()
    return scores(q, k).masked_fill(blocked, INF).softmax(-1) @ v


@causal
def triu_ones_like(q, k, v):
    s = scores(q, k)
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), INF).softmax(-1) @ v


@causal
def triu_full_additive(q, k, v):
    mask = torch.full((37, 37), INF, dtype=q.dtype).triu(diagonal=1)
    return F.softmax(scores(q, k) + mask, dim=-1) @ v


@causal
def triu_full_finfo_min(q, k, v):
    mask = torch.triu(torch.full((37, 37), torch.finfo(q.dtype).min, dtype=q.dtype), diagonal=1)
    return F.softmax(scores(q, k) + mask[None, None], dim=-1) @ v


@causal
def triu_full_minus_1e9(q, k, v):
    mask = torch.full((1, 1, 37, 37), -1e9, dtype=q.dtype).triu(1)
    return F.softmax(scores(q, k) + mask, dim=-1) @ v


@causal
def one_minus_tril_times_minus_1e9(q, k, v):
    mask = torch.tril(torch.ones(37, 37, dtype=q.dtype))
    return F.softmax(scores(q, k) + (1.0 - mask) * -1e9, dim=-1) @ v


@causal
def fill_finfo_min(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    return scores(q, k).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v


@causal
def fill_minus_1e9(q, k, v):
    mask = torch.ones(37, 37).tril()
    return scores(q, k).masked_fill(mask == 0, -1e9).softmax(-1) @ v


@causal
def where_scores_inf(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    return torch.where(mask, scores(q, k), INF).softmax(-1) @ v


@causal
def where_full_tensor(q, k, v):
    """As GPT-2: where with a full() of the smallest number."""
    s = scores(q, k)
    mask_value = torch.full([], torch.finfo(s.dtype).min, dtype=s.dtype)
    mask = torch.tril(torch.ones((37, 37), dtype=torch.bool)).view(1, 1, 37, 37)
    return torch.where(mask, s, mask_value).softmax(-1) @ v


@causal
def where_method(q, k, v):
    s = scores(q, k)
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    return s.where(mask, torch.tensor(INF, dtype=s.dtype)).softmax(-1) @ v


@causal
def where_blocked(q, k, v):
    blocked = torch.ones(37, 37, dtype=torch.bool).triu(1)
    return torch.where(blocked, INF, scores(q, k)).softmax(-1) @ v


@causal
def additive_where(q, k, v):
    keep = torch.ones(37, 37, dtype=torch.bool).tril()
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, dim=-1) @ v


@causal
def additive_zeros_masked_fill(q, k, v):
    keep = torch.ones(37, 37, dtype=torch.bool).tril()
    bias = torch.zeros(37, 37, dtype=q.dtype).masked_fill(keep.logical_not(), INF)
    return F.softmax(scores(q, k) + bias, dim=-1) @ v


@causal
def additive_zeros_masked_fill_in_place(q, k, v):
    """As in the reference code of scaled_dot_product_attention."""
    bias = torch.zeros(37, 37, dtype=q.dtype)
    keep = torch.ones(37, 37, dtype=torch.bool).tril(diagonal=0)
    bias.masked_fill_(keep.logical_not(), INF)
    return F.softmax(scores(q, k) + bias, dim=-1) @ v


@causal
def additive_log_of_tril(q, k, v):
    return F.softmax(scores(q, k) + torch.ones(37, 37, dtype=q.dtype).tril().log(), dim=-1) @ v


@causal
def arange_ge(q, k, v):
    i = torch.arange(37)
    return scores(q, k).masked_fill(~(i[:, None] >= i[None, :]), INF).softmax(-1) @ v


@causal
def arange_lt(q, k, v):
    i = torch.arange(q.shape[-2]).unsqueeze(-1)
    j = torch.arange(k.shape[-2]).unsqueeze(0)
    return scores(q, k).masked_fill(i < j, INF).softmax(-1) @ v


@causal
def arange_views(q, k, v):
    i = torch.arange(37).view(-1, 1)
    j = torch.arange(37).view(1, -1)
    return torch.where(j <= i, scores(q, k), INF).softmax(-1) @ v


@causal
def arange_difference(q, k, v):
    i = torch.arange(37)
    return torch.where(i[:, None] - i >= 0, scores(q, k), INF).softmax(-1) @ v


@causal
def arange_shifted_both(q, k, v):
    i = torch.arange(100, 137)
    return scores(q, k).masked_fill(i[:, None] + 1 <= i, INF).softmax(-1) @ v


@causal
def arange_of_ones_cumsum(q, k, v):
    i = torch.ones(37, dtype=torch.long).cumsum(0)
    return scores(q, k).masked_fill(i[:, None] < i, INF).softmax(-1) @ v


@causal
def tril_indices_of_mask_to(q, k, v):
    mask = torch.ones(37, 37).tril_().to(torch.bool)
    return scores(q, k).masked_fill(torch.logical_not(mask), INF).softmax(-1) @ v


@causal
def expanded_over_batch(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).tril()[None, None].expand(4, 6, 37, 37)
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@causal
def filled_twice(q, k, v):
    """Both fills are -inf and both say the same."""
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    s = scores(q, k).masked_fill(~mask, INF).masked_fill(mask.logical_not(), INF)
    return s.softmax(-1) @ v


@causal
def mask_before_scale(q, k, v):
    """A positive scale commutes with a -inf fill."""
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    return ((q @ k.mT).masked_fill(~mask, INF) / 4).softmax(-1) @ v


@causal
def mask_before_upcast(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    s = scores(q, k).masked_fill(~mask, INF)
    return F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype) @ v


@causal
def constant_true_part(q, k, v):
    i = torch.arange(37)
    keep = (i[:, None] >= i) & (i >= 0) & torch.ones(37, 37, dtype=torch.bool)
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@causal
def handwritten_softmax(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    s = scores(q, k).masked_fill(~mask, INF)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@causal
def exp_times_mask(q, k, v):
    """Multiplying e^s by the mask before the sum is a -inf mask."""
    mask = torch.ones(37, 37, dtype=q.dtype).tril()
    e = torch.exp(scores(q, k)) * mask
    return (e / e.sum(-1, keepdim=True)) @ v


@spells("scale=0.25; keep = bias[q, kv] != 0; empty=nan_cut", *SELF)  # a buffer may change between calls
class RegisteredBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, q, k, v):
        T = q.size(2)
        s = scores(q, k).masked_fill(self.bias[:, :, :T, :T] == 0, INF)
        return F.softmax(s, dim=-1) @ v


@spells("scale=0.25; keep = ~mask[q, kv]; empty=nan_cut", *SELF)
class RegisteredBoolBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, q, k, v):
        s = scores(q, k).masked_fill(self.mask[: q.size(2), : k.size(2)], INF)
        return F.softmax(s, dim=-1) @ v


@spells(Means("scale=0.25; keep = kv <= q + 4"), *QKV)
def bottom_right_tril(q, k, v):
    mask = torch.ones(37, 41, dtype=torch.bool).tril(diagonal=4)
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv <= q + 4"), *QKV)
def bottom_right_triu(q, k, v):
    S_q, S_kv = q.size(-2), k.size(-2)
    blocked = torch.ones(S_q, S_kv, dtype=torch.bool).triu(S_kv - S_q + 1)
    return scores(q, k).masked_fill(blocked, INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv <= q + 4"), *QKV)
def bottom_right_arange(q, k, v):
    i = torch.arange(k.size(-2) - q.size(-2), k.size(-2))
    return scores(q, k).masked_fill(torch.arange(41) > i[:, None], INF).softmax(-1) @ v


@spells("scale=0.25; keep = mask[q + 4, kv]; empty=mean_cut", *QKV)
class BottomRightBuffer(nn.Module):
    """As GPT-2 with a cache: rows S_kv - S_q .. S_kv of a square buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(64, 64, dtype=torch.bool))[None, None])

    def forward(self, q, k, v):
        S_q, S_kv = q.size(-2), k.size(-2)
        mask = self.bias[:, :, S_kv - S_q : S_kv, :S_kv]
        return torch.where(mask, scores(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


@spells("scale=0.25; keep = kv <= q", *QKV)
def top_left(q, k, v):
    mask = torch.ones(37, 41, dtype=torch.bool).tril()
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@spells(
    Means("scale=0.25; keep = kv <= q - 4; empty=nan_cut"),
    "BHND",
    "BHMD",
    "BHMD",
    rows="N",
    columns="M",
)
def bottom_right_more_queries(q, k, v):
    """The first four rows see nothing: NaN, as in eager."""
    mask = torch.ones(41, 37, dtype=torch.bool).tril(-4)
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv < q; empty=mean"), *SELF, columns="M")
def strictly_causal_additive(q, k, v):
    mask = torch.full((37, 37), torch.finfo(q.dtype).min, dtype=q.dtype).triu(0)
    return F.softmax(scores(q, k) + mask, dim=-1) @ v


@spells(Means("scale=0.25; keep = kv < q; empty=mean_cut"), *SELF, columns="M")
def strictly_causal_fill(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).tril(-1)
    return scores(q, k).masked_fill(~mask, -1e9).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv < q; empty=nan"), *SELF, columns="M")
def strictly_causal_additive_inf(q, k, v):
    mask = torch.full((37, 37), INF, dtype=q.dtype).triu(0)
    return F.softmax(scores(q, k) + mask, dim=-1) @ v


@spells(Means("scale=0.25; keep = kv >= q"), *SELF, columns="M")
def anti_causal(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).triu()
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@spells("scale=0.25", "BH1D", "BHND", "BHND", rows="1")
def one_query_sees_all(q, k, v):
    mask = torch.ones(1, 41, dtype=torch.bool).tril(40)
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv <= q"), *SELF, columns="M")
def key_by_query_layout(q, k, v):
    """Scores as [kv, q]; the causal mask is the upper triangle there."""
    mask = torch.ones(37, 37, dtype=torch.bool).triu()
    s = (k @ q.mT / 4).masked_fill(~mask, INF)
    return F.softmax(s, dim=-2).mT @ v
