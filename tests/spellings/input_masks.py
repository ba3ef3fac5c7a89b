"""Masks that come in as graph inputs: captured as they are, never expanded to [B, H, S_q, S_kv]."""

import torch
import torch.nn.functional as F

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
INF = float("-inf")


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


def keeps(*index, empty):
    return Means(f"scale=0.25; keep = mask[{', '.join(index)}]; empty={empty}")


def adds(*index):
    return Means(f"scale=0.25; score = s + bias[{', '.join(index)}]")


@spells(keeps("q", "kv", empty="nan_cut"), *QKV, "allowed:MN")
def bool_two_dims(q, k, v, mask):
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@spells(keeps("b", "q", "kv", empty="nan_cut"), *QKV, "allowed:BMN")
def bool_three_dims(q, k, v, mask):
    return scores(q, k).masked_fill(~mask.unsqueeze(1), INF).softmax(-1) @ v


@spells(keeps("b", "q", "kv", empty="mean_cut"), *QKV, "allowed:B1MN")
def bool_four_dims(q, k, v, mask):
    return scores(q, k).masked_fill(mask == 0, -1e9).softmax(-1) @ v


@spells(keeps("b", "q", "kv", empty="mean"), *QKV, "allowed:B1MN")
def bool_four_dims_additive(q, k, v, mask):
    bias = torch.where(mask, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(scores(q, k) + bias, -1) @ v


@spells(keeps("b", "h", "q", "kv", empty="nan_cut"), *QKV, "allowed:BHMN")
def bool_per_head(q, k, v, mask):
    return torch.where(mask, scores(q, k), INF).softmax(-1) @ v


@spells(keeps("h", "q", "kv", empty="nan_cut"), *QKV, "allowed:HMN")
def bool_per_head_shared_by_batch(q, k, v, mask):
    return torch.where(mask[None], scores(q, k), INF).softmax(-1) @ v


@spells(
    (Means("scale=0.25; keep = pad[b, kv]; empty=nan_cut"), keeps("b", "kv", empty="nan_cut")),
    *QKV,
    "allowed:B11N",
)
def bool_padding_four_dims(q, k, v, mask):
    return scores(q, k).masked_fill(~mask, INF).softmax(-1) @ v


@spells(
    Means("scale=0.25; keep = kv <= q & mask[b, q, kv]; empty=nan_cut"),
    *("BHMD",) * 3,
    "allowed:B1MM",
    columns="M",
)
def bool_and_causal(q, k, v, mask):
    keep = torch.ones(37, 37, dtype=torch.bool).tril() & mask
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@spells(
    tuple(Means(f"scale=0.25; keep = {test}; empty=mean_cut") for test in ("ids[b, q, kv] != 0", "mask[b, q, kv]")),
    *QKV,
    lambda dtype, gen: (torch.rand(4, 1, 37, 41, generator=gen) < 0.7).long(),
)
def integers(q, k, v, mask):
    return scores(q, k).masked_fill(mask == 0, -1e9).softmax(-1) @ v


@spells(None, *QKV, lambda dtype, gen: (torch.rand(37, 41, generator=gen) < 0.7).to(dtype))
def floats_compared_to_zero(q, k, v, mask):
    return scores(q, k).masked_fill(mask == 0, -1e9).softmax(-1) @ v


@spells(adds("q", "kv"), *QKV, "additive:MN")
def float_two_dims(q, k, v, mask):
    return F.softmax(scores(q, k) + mask, -1) @ v


@spells(adds("b", "q", "kv"), *QKV, "additive:B1MN")
def float_four_dims(q, k, v, mask):
    p = F.softmax(scores(q, k) + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return p @ v


@spells(adds("b", "kv"), "BH1D", "BHND", "BHND", "additive:B11N", rows="1")
def float_four_dims_decode(q, k, v, mask):
    return F.softmax(scores(q, k) + mask, -1) @ v


@spells(adds("b", "kv"), *QKV, "additive:B11N")
def float_padding(q, k, v, mask):
    return F.softmax(scores(q, k) + mask, -1) @ v


@spells(adds("b", "q", "kv"), *QKV, "additive:B1MN")
def float_expanded(q, k, v, mask):
    return F.softmax(scores(q, k) + mask.expand(-1, 6, -1, -1), -1) @ v


@spells(adds("b", "q", "kv"), *QKV, "additive:B1MN")
def float_sliced_by_length(q, k, v, mask):
    """As transformers' decoders: attention_mask[:, :, :, :S_kv]."""
    return F.softmax(scores(q, k) + mask[:, :, :, : k.shape[-2]], -1) @ v


@spells(
    Means("scale=0.25; score = s + bias[b, q, kv]"),
    *QKV,
    lambda dtype, gen: torch.where(torch.rand(4, 1, 37, 60, generator=gen) < 0.7, 0.0, -3e4).to(dtype),
)
def float_longer_than_kv(q, k, v, mask):
    return F.softmax(scores(q, k) + mask[..., :41], -1) @ v


@spells(adds("b", "q", "kv"), *QKV, "additive:BMN")
def float_merged_heads(q, k, v, mask):
    """bmm over B * H with the mask repeated for the heads."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = mask.repeat_interleave(6, dim=0)
    return (F.softmax(torch.bmm(q, k.mT) / 4 + mask, -1) @ v).view(4, 6, 37, 16)


@spells(adds("b", "q", "kv"), *QKV, "additive:B1MN")
def float_baddbmm(q, k, v, mask):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = mask.expand(4, 6, 37, 41).reshape(24, 37, 41)
    s = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=0.25)
    return torch.bmm(s.softmax(-1), v).view(4, 6, 37, 16)
