"""Extra logits in the denominator: learned sinks and softmax-off-by-one."""

import torch
import torch.nn.functional as F

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
SINK = tuple(Means(f"scale=0.25; sink = {name}[h]") for name in ("sink", "slope"))
CAUSAL_SINK = tuple(Means(f"scale=0.25; keep = kv <= q; sink = {n}[h]") for n in ("sink", "slope"))
OFF_BY_ONE = Means("scale=0.25; sink = 0.0")


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


def concatenated(s, sinks):
    return torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[-2], -1)], -1)


@spells(SINK, *QKV, "H")
def concatenation(q, k, v, sinks):
    p = F.softmax(concatenated(scores(q, k), sinks), dim=-1)
    return p[..., :-1] @ v


@spells(CAUSAL_SINK, *SELF, "H", columns="M")
def gpt_oss(q, k, v, sinks):
    s = scores(q, k) + torch.full((37, 37), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    s = concatenated(s, sinks)
    s = s - s.max(dim=-1, keepdim=True).values
    p = F.softmax(s, dim=-1, dtype=s.dtype)
    w = F.dropout(p[..., :-1], p=0.0, training=True).to(v.dtype)
    return (w @ v).transpose(1, 2).contiguous()


@spells(SINK, *QKV, "H")
def concatenated_first(q, k, v, sinks):
    s = scores(q, k)
    s = torch.cat([sinks.view(1, 6, 1, 1).expand(4, 6, 37, 1), s], dim=-1)
    return F.softmax(s, dim=-1)[..., 1:] @ v


@spells(SINK, *QKV, "H")
def split_off(q, k, v, sinks):
    p = F.softmax(concatenated(scores(q, k), sinks), dim=-1)
    p, _ = torch.split(p, [41, 1], dim=-1)
    return p @ v


@spells(SINK, *QKV, "H")
def in_the_denominator(q, k, v, sinks):
    e = torch.exp(scores(q, k))
    return (e / (e.sum(-1, keepdim=True) + sinks.exp().view(6, 1, 1))) @ v


@spells(SINK, *QKV, "H")
def in_the_logsumexp(q, k, v, sinks):
    s = scores(q, k)
    lse = torch.logaddexp(torch.logsumexp(s, -1, keepdim=True), sinks.view(6, 1, 1))
    return torch.exp(s - lse) @ v


@spells(OFF_BY_ONE, *QKV)
def off_by_one(q, k, v):
    e = torch.exp(scores(q, k))
    return (e / (1 + e.sum(dim=-1, keepdim=True))) @ v


@spells(OFF_BY_ONE, *QKV)
def off_by_one_shifted(q, k, v):
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-m))) @ v


@spells(OFF_BY_ONE, *QKV)
def off_by_one_shifted_and_clamped(q, k, v):
    s = scores(q, k)
    m = s.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(s - m)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-m))) @ v


@spells(OFF_BY_ONE, *QKV)
def zero_logit_padded(q, k, v):
    return F.softmax(F.pad(scores(q, k), (0, 1), value=0.0), dim=-1)[..., :-1] @ v


@spells(OFF_BY_ONE, *QKV)
def zero_logit_concatenated(q, k, v):
    s = scores(q, k)
    s = torch.cat([s, torch.zeros_like(s[..., :1])], dim=-1)
    return F.softmax(s, dim=-1)[..., :-1] @ v


@spells(None, *QKV)
def zero_key_and_value(q, k, v):
    """As add_zero_attn: a key and a value of zeros; plain attention over S_kv + 1."""
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return F.softmax(scores(q, k), dim=-1) @ v
