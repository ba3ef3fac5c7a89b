"""Padding and packing: what depends on the batch row through a [B, S] tensor or lengths."""

import torch
import torch.nn.functional as F

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
INF = float("-inf")
PADDED = "scale=0.25; keep = pad[b, kv]; empty="
CAUSAL_PADDED = "scale=0.25; keep = kv <= q & pad[b, kv]; empty="
FROM_01 = tuple(
    Means(f"scale=0.25; keep = kv <= q & {pad}; empty=mean")
    for pad in ("pad[b, kv]", "ids[b, kv] != 0", "ids[b, kv] == 1", "ids[b, kv] > 0")
)


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


@spells(PADDED + "nan_cut", *QKV, "right:BN")
def fill_inf(q, k, v, mask):
    s = scores(q, k).masked_fill(~mask[:, None, None, :], INF)
    return s.softmax(-1) @ v


@spells(PADDED + "nan_cut", *QKV, "right:BN")
def where_inf(q, k, v, mask):
    return torch.where(mask.view(4, 1, 1, 41), scores(q, k), INF).softmax(-1) @ v


@spells(PADDED + "mean_cut", *QKV, "right:BN")
def fill_minus_1e9(q, k, v, mask):
    mask = mask.unsqueeze(1).unsqueeze(2)
    return scores(q, k).masked_fill(mask == 0, -1e9).softmax(-1) @ v


@spells(PADDED + "mean_cut", *QKV, "right:BN")
def fill_finfo_min(q, k, v, mask):
    s = scores(q, k)
    return s.masked_fill(~mask[:, None, None], torch.finfo(s.dtype).min).softmax(-1) @ v


@spells(PADDED + "mean", *QKV, "right:BN")
def additive_finfo_min(q, k, v, mask):
    bias = torch.where(mask[:, None, None, :], torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, dim=-1) @ v


@spells((PADDED + "mean", None), *QKV, "right:BN")
def additive_one_minus_mask(q, k, v, mask):
    """As BERT: (1 - mask) * finfo.min."""
    bias = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return F.softmax(scores(q, k) + bias, dim=-1) @ v


@spells(None, *QKV, "right:BN")
def additive_minus_10000(q, k, v, mask):
    """-10000 is a large score, not a mask."""
    bias = (1.0 - mask[:, None, None, :].to(q.dtype)) * -10000.0
    return F.softmax(scores(q, k) + bias, dim=-1) @ v


@spells(PADDED + "nan", *QKV, "right:BN")
def additive_inf(q, k, v, mask):
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, INF)
    return F.softmax(scores(q, k) + bias[:, None, None, :], dim=-1) @ v


@spells(PADDED + "nan_cut", *QKV, "right:BN")
def key_padding_mask_means_blocked(q, k, v, mask):
    blocked = ~mask
    return scores(q, k).masked_fill(blocked[:, None, None], INF).softmax(-1) @ v


@spells(PADDED + "nan_cut", *QKV, "right:BN")
def expanded_over_heads(q, k, v, mask):
    mask = mask[:, None, None, :].expand(-1, 6, 37, -1)
    return scores(q, k).masked_fill(mask.logical_not(), INF).softmax(-1) @ v


@spells(PADDED + "nan_cut", *QKV, "right:BN")
def merged_heads_repeated_mask(q, k, v, mask):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = mask[:, None, None, :].expand(4, 6, 1, 41).reshape(24, 1, 41)
    s = torch.bmm(q, k.mT).div(4).masked_fill(~mask, INF)
    return torch.bmm(s.softmax(-1), v).unflatten(0, (4, 6))


@spells(CAUSAL_PADDED + "mean", *SELF, "left:BM", columns="M")
def causal_and_left_padding(q, k, v, mask):
    i = torch.arange(37)
    keep = (i[None, :] <= i[:, None])[None, None] & mask[:, None, None, :]
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, -1, dtype=torch.float32).to(q.dtype) @ v


@spells(CAUSAL_PADDED + "mean", *SELF, "left:BM", columns="M")
def causal_and_left_padding_gathered(q, k, v, mask):
    """The gather that transformers' vmapped mask functions become."""
    b = torch.arange(4)[:, None, None, None]
    i, j = torch.arange(37)[None, None, :, None], torch.arange(37)[None, None, None, :]
    keep = mask[b, j] & (j <= i)
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, -1) @ v


@spells(FROM_01, *SELF, "left01:BM", columns="M")
def causal_and_int_padding(q, k, v, mask):
    keep = torch.ones(37, 37, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, -1) @ v


@spells(CAUSAL_PADDED + "nan_cut", *SELF, "left:BM", columns="M")
def causal_and_left_padding_fill(q, k, v, mask):
    keep = torch.ones(37, 37, dtype=torch.bool).tril() & mask[:, None, None, :]
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@spells(CAUSAL_PADDED + "nan_cut", *SELF, "left:BM", columns="M")
def two_fills(q, k, v, mask):
    """Two fills with -inf commute: one keep."""
    s = scores(q, k).masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), INF)
    return s.masked_fill(~mask[:, None, None, :], INF).softmax(-1) @ v


@spells(CAUSAL_PADDED + "nan_cut", *SELF, "left:BM", columns="M")
def blocked_or_blocked(q, k, v, mask):
    i = torch.arange(37)
    blocked = (i > i[:, None]) | ~mask[:, None, None, :]
    return scores(q, k).masked_fill(blocked, INF).softmax(-1) @ v


@spells(CAUSAL_PADDED + "nan_cut", *SELF, "left:BM", columns="M")
def mask_product(q, k, v, mask):
    """Masks multiplied as numbers."""
    keep = torch.ones(37, 37).tril() * mask[:, None, None, :].float()
    return scores(q, k).masked_fill(keep == 0, INF).softmax(-1) @ v


@spells(
    Means("scale=0.25; keep = pad[b, q] & pad[b, kv]; empty=mean_cut"),
    *SELF,
    "right:BM",
    columns="M",
)
def outer_product(q, k, v, mask):
    keep = (mask[:, :, None] & mask[:, None, :]).unsqueeze(1)
    return scores(q, k).masked_fill(~keep, -1e9).softmax(-1) @ v


@spells(Means("scale=0.25; keep = ids[b, q] == ids[b, kv]"), *SELF, "ids:BM", columns="M")
def document_ids(q, k, v, ids):
    keep = (ids[:, :, None] == ids[:, None, :])[:, None]
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv <= q & ids[b, q] == ids[b, kv]"), *SELF, "ids:BM", columns="M")
def causal_documents(q, k, v, ids):
    i = torch.arange(37)
    keep = (i[:, None] >= i) & (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(1)
    return torch.where(keep, scores(q, k), INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv <= q & ids[q] == ids[kv]"), *SELF, "ids:M", columns="M")
def causal_documents_shared(q, k, v, ids):
    keep = (ids[:, None] == ids[None, :]).tril()
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv <= q & ids[b, q] == ids[b, kv]"), *SELF, "pos:BM", columns="M")
def packed_positions(q, k, v, position_ids):
    """Document ids from position ids that start again, as transformers builds them."""
    first = position_ids[:, :1] - 1
    ids = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
    b = torch.arange(4)[:, None, None, None]
    i, j = torch.arange(37)[None, None, :, None], torch.arange(37)[None, None, None, :]
    keep = (j <= i) & (ids[b, i] == ids[b, j])
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, -1, dtype=torch.float32).to(q.dtype) @ v


@spells(Means("scale=0.25; keep = kv < ids[b]; empty=nan_cut"), *QKV, "len:B")
def lengths(q, k, v, lens):
    keep = torch.arange(41)[None, :] < lens[:, None]
    return scores(q, k).masked_fill(~keep[:, None, None, :], INF).softmax(-1) @ v


@spells(Means("scale=0.25; keep = kv <= q | kv < ids[b]"), *SELF, "len:B", columns="M")
def prefix_lengths(q, k, v, prefix):
    i = torch.arange(37)
    keep = (i <= i[:, None]) | (i < prefix[:, None, None, None])
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@spells(PADDED + "zero", *QKV, "right:BN")
def cleared_after_a_finite_fill(q, k, v, mask):
    """ESPnet and DeBERTa: a row in which nothing is kept gives zero."""
    hidden = ~mask[:, None, None, :]
    s = scores(q, k).masked_fill(hidden, torch.finfo(q.dtype).min)
    return s.softmax(-1).masked_fill(hidden, 0.0) @ v


@spells(PADDED + "zero", *QKV, "right:BN")
def cleared_after_an_infinite_fill(q, k, v, mask):
    hidden = ~mask[:, None, None, :]
    return scores(q, k).masked_fill(hidden, INF).softmax(-1).masked_fill(hidden, 0.0) @ v


@spells(PADDED + "zero", *QKV, "right:BN")
def cleared_by_a_product(q, k, v, mask):
    kept = mask[:, None, None, :]
    return (scores(q, k).masked_fill(~kept, -1e9).softmax(-1) * kept) @ v


@spells(CAUSAL_PADDED + "zero", *SELF, "left:BM", columns="M")
def cleared_by_where(q, k, v, mask):
    kept = mask[:, None, None, :] & torch.ones(37, 37, dtype=torch.bool).tril()
    return torch.where(kept, scores(q, k).masked_fill(~kept, -1e9).softmax(-1), 0.0) @ v
