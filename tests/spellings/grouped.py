"""Grouped and multi-query attention: K and V reach the op unexpanded."""

import torch
import torch.nn.functional as F

from tests.spellings.base import spells

GQA = ("BHMD", "BGND", "BGND")
MQA = ("BHMD", "B1ND", "B1ND")
PLAIN = "scale=0.25"


def attend(q, k, v):
    return F.softmax(q @ k.mT / 4, dim=-1) @ v


@spells(PLAIN, *GQA, kv_heads=2)
def repeat_interleave(q, k, v):
    return attend(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1))


@spells(PLAIN, *GQA, kv_heads=2)
def repeat_interleave_function(q, k, v):
    groups = q.size(1) // k.size(1)
    return attend(q, torch.repeat_interleave(k, groups, 1), torch.repeat_interleave(v, groups, 1))


@spells(PLAIN, *GQA, kv_heads=2)
def repeat_kv(q, k, v):
    def repeat(x, n):
        B, G, N, D = x.shape
        return x[:, :, None, :, :].expand(B, G, n, N, D).reshape(B, G * n, N, D)

    return attend(q, repeat(k, 3), repeat(v, 3))


@spells(PLAIN, "BMHD", "BNGD", "BNGD", kv_heads=2)
def repeat_kv_bshd(q, k, v):
    """As Llama's first release: repeated before the heads move to the front."""

    def repeat(x, n):
        B, N, G, D = x.shape
        return x[:, :, :, None, :].expand(B, N, G, n, D).reshape(B, N, G * n, D)

    q, k, v = q.transpose(1, 2), repeat(k, 3).transpose(1, 2), repeat(v, 3).transpose(1, 2)
    return attend(q, k, v).transpose(1, 2).contiguous()


@spells(PLAIN, "BMHD", "BNGD", "BNGD", kv_heads=2)
def repeat_interleave_bshd(q, k, v):
    k, v = k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
    p = F.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4, -1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@spells(PLAIN, *GQA, kv_heads=2)
def unsqueeze_repeat_flatten(q, k, v):
    k, v = (x.unsqueeze(2).repeat(1, 1, 3, 1, 1).flatten(1, 2) for x in (k, v))
    return attend(q, k, v)


@spells(PLAIN, *GQA, kv_heads=2)
def stack_flatten(q, k, v):
    k, v = (torch.stack([x, x, x], dim=2).flatten(1, 2) for x in (k, v))
    return attend(q, k, v)


@spells(PLAIN, *GQA, kv_heads=2)
def index_heads(q, k, v):
    heads = torch.arange(6) // 3
    return attend(q, k[:, heads], v[:, heads])


@spells(PLAIN, *GQA, kv_heads=2)
def grouped_queries_broadcast(q, k, v):
    """q as [B, G, R, S, D] against k with a head dim of 1."""
    B, H, M, D = q.shape
    out = attend(q.view(B, 2, 3, M, D), k.unsqueeze(2), v.unsqueeze(2))
    return out.reshape(B, H, M, D)


@spells(PLAIN, *GQA, kv_heads=2)
def grouped_queries_expanded(q, k, v):
    B, H, M, D = q.shape
    k, v = (x[:, :, None].expand(-1, -1, 3, -1, -1) for x in (k, v))
    return attend(q.reshape(B, 2, 3, M, D), k, v).flatten(1, 2)


@spells(PLAIN, *GQA, kv_heads=2)
def grouped_einsum(q, k, v):
    B, H, M, D = q.shape
    q = q.view(B, 2, 3, M, D)
    p = F.softmax(torch.einsum("bgrqd,bgkd->bgrqk", q, k) / 4, -1)
    return torch.einsum("bgrqk,bgkd->bgrqd", p, v).reshape(B, H, M, D)


@spells(PLAIN, "BMHD", "BNGD", "BNGD", kv_heads=2)
def grouped_einsum_bshd(q, k, v):
    B, M, H, D = q.shape
    q = q.reshape(B, M, 2, 3, D)
    p = F.softmax(torch.einsum("bqkgd,bskd->bkgqs", q, k) * D**-0.5, dim=-1)
    return torch.einsum("bkgqs,bskd->bqkgd", p, v).reshape(B, M, H, D)


@spells(PLAIN, "BGRMD", "BNGD", "BNGD", kv_heads=2)
def grouped_einsum_five_dims(q, k, v):
    p = torch.einsum("bkgqd,bskd->bkgqs", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bkgqs,bskd->bkgqd", p, v)


@spells(PLAIN, *GQA, kv_heads=2)
def rows_folded(q, k, v):
    """The queries of a group as extra rows of one head."""
    B, H, M, D = q.shape
    q = q.reshape(B, 2, 3 * M, D)
    return attend(q, k, v).reshape(B, H, M, D)


@spells(PLAIN, *MQA, kv_heads=1)
def one_head_broadcast(q, k, v):
    return attend(q, k, v)


@spells(PLAIN, *MQA, kv_heads=1)
def one_head_expanded(q, k, v):
    return attend(q, k.expand(-1, 6, -1, -1), v.expand(-1, 6, -1, -1))


@spells(PLAIN, "BHMD", "BND", "BND", kv_heads=1)
def one_head_einsum(q, k, v):
    p = F.softmax(torch.einsum("bhqd,bkd->bhqk", q, k) / 4, dim=-1)
    return torch.einsum("bhqk,bkd->bhqd", p, v)


@spells(PLAIN, "BHMD", "BND", "BND", kv_heads=1)
def one_head_unsqueezed(q, k, v):
    return attend(q, k.unsqueeze(1), v.unsqueeze(1))


@spells(PLAIN, "BHMD", "B1ND", "BHND")
def one_key_head_many_value_heads(q, k, v):
    return attend(q, k, v)


@spells(PLAIN, "BHMD", "1GND", "1GND", kv_heads=2)
def shared_by_the_batch(q, k, v):
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    return attend(q, k, v)


@spells("scale=0.25; keep = kv <= q", "BHMD", "BGMD", "BGMD", columns="M", kv_heads=2)
def causal_decoder(q, k, v):
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    w = torch.matmul(q, k.transpose(2, 3)) * 0.25
    mask = torch.full((37, 37), float("-inf"), dtype=q.dtype).triu(1)
    w = F.softmax(w + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(w, v).transpose(1, 2).reshape(4, 37, 96)


@spells("scale=0.25; keep = kv <= q", "BHMD", "BGMD", "BGMD", columns="M", kv_heads=2)
def causal_grouped_einsum(q, k, v):
    q = q.view(4, 2, 3, 37, 16)
    s = torch.einsum("bgrqd,bgkd->bgrqk", q, k) / 4
    keep = torch.arange(37)[:, None] >= torch.arange(37)
    p = s.masked_fill(~keep, float("-inf")).softmax(-1)
    return torch.einsum("bgrqk,bgkd->bgrqd", p, v).flatten(1, 2)


@spells(PLAIN, "BHMD", "BGND", "BGNE", kv_heads=2)
def different_value_dim(q, k, v):
    return attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
