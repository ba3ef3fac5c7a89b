"""Around the attention: in-place edits, autocast, grad modes, caches, detached parts."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
PLAIN = "scale=0.25"
CAUSAL = "scale=0.25; keep = kv <= q"
INF = float("-inf")


@spells(PLAIN, *QKV)
def div_in_place(q, k, v):
    s = q @ k.mT
    s /= 4
    return s.softmax(-1) @ v


@spells(PLAIN, *QKV)
def mul_in_place_method(q, k, v):
    s = q @ k.mT
    s.mul_(0.25)
    return s.softmax(-1) @ v


@spells(CAUSAL, *SELF, columns="M")
def masked_fill_in_place(q, k, v):
    s = q @ k.mT / 4
    s.masked_fill_(torch.ones(37, 37, dtype=torch.bool).triu(1), INF)
    return s.softmax(-1) @ v


@spells(CAUSAL, *SELF, columns="M")
def add_mask_in_place(q, k, v):
    s = q @ k.mT / 4
    s += torch.full((37, 37), INF, dtype=q.dtype).triu(1)
    return s.softmax(-1) @ v


@spells(CAUSAL, *SELF, columns="M")
def assign_masked_scores(q, k, v):
    s = q @ k.mT / 4
    s[:, :, torch.ones(37, 37, dtype=torch.bool).triu(1)] = INF
    return s.softmax(-1) @ v


@spells(CAUSAL, *SELF, columns="M")
def everything_in_place(q, k, v):
    s = torch.matmul(q, k.transpose(-1, -2))
    s.div_(4).add_(torch.full((37, 37), INF, dtype=q.dtype).triu(1))
    p = F.softmax(s, dim=-1)
    return torch.matmul(p, v)


@spells(
    Means("scale=0.25; score = s + slope[h]*float(kv - q); keep = kv <= q"),
    *SELF,
    "H11",
    columns="M",
)
def alibi_in_place(q, k, v, slopes):
    """As Falcon: added in place, then the mask."""
    i = torch.arange(37)
    s = q @ k.mT
    s *= 0.25
    s += slopes * (i - i[:, None])
    return s.masked_fill_(i > i[:, None], INF).softmax(-1) @ v


@spells(CAUSAL, *SELF, columns="M")
def mask_made_without_grad(q, k, v):
    with torch.no_grad():
        mask = torch.full((37, 37), INF, dtype=q.dtype).triu(1)
    return F.softmax(q @ k.mT / 4 + mask, -1) @ v


@spells(CAUSAL, *SELF, columns="M")
def mask_without_grad_between(q, k, v):
    s = q @ k.mT / 4
    with torch.no_grad():
        mask = torch.ones(37, 37, dtype=torch.bool).tril()
    return s.masked_fill(~mask, INF).softmax(-1) @ v


@spells(PLAIN, *QKV)
def all_without_grad(q, k, v):
    with torch.no_grad():
        out = F.softmax(q @ k.mT / 4, -1) @ v
    return out + q


@spells(PLAIN, *QKV)
def keys_detached(q, k, v):
    return F.softmax(q @ k.detach().mT / 4, -1) @ v


@spells(PLAIN, *QKV)
def output_detached_too(q, k, v):
    out = F.softmax(q @ k.mT / 4, -1) @ v
    return out, out.detach().sum()


@spells(PLAIN, *QKV)
def autocast_bf16(q, k, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.softmax(q @ k.mT / 4, -1) @ v


@spells(CAUSAL, *SELF, columns="M")
def autocast_causal(q, k, v):
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = torch.matmul(q, k.transpose(-2, -1)) * 0.25
        p = s.masked_fill(~mask, INF).softmax(-1)
        return torch.matmul(p, v)


@spells(PLAIN, *QKV)
def autocast_scores_without(q, k, v):
    """The scores in full precision inside an autocast region, as many models insist."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            s = q @ k.mT / 4
        return F.softmax(s, dim=-1) @ v


@spells(PLAIN, *QKV)
def autocast_sdpa(q, k, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)


@spells(PLAIN, "BMC", columns="M")
class AutocastModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(96, 288)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q, k, v = (y.view(4, 37, 6, 16).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            return (F.softmax(q @ k.mT / 4, -1) @ v).transpose(1, 2).reshape(4, 37, 96)


CACHE = ("const:BGND", "const:BGND")


@spells(
    (
        Means("scale=0.25; keep = kv <= 20"),
        Means("scale=0.25; keep = kv <= ids[0]; empty=nan_cut"),
    ),
    *("BH1D", "const:BG1D", "const:BG1D", *CACHE),
    rows="1",
    kv_heads=2,
    train=False,
)
def static_cache(q, k, v, k_cache, v_cache):
    """One new key and value written at position 20, then all up to there are seen."""
    position = torch.tensor([20])
    k_cache.index_copy_(2, position, k)
    v_cache.index_copy_(2, position, v)
    keep = torch.arange(41)[None, :] <= position[:, None]
    k, v = (x.repeat_interleave(3, dim=1) for x in (k_cache, v_cache))
    s = (q @ k.mT / 4).masked_fill(~keep, INF)
    return s.softmax(-1) @ v


@spells(
    tuple(Means(f"scale=0.25; keep = kv <= ids[{i}]; empty=mean") for i in ("q", "0")),
    *("BH1D", "const:BG1D", "const:BG1D", *CACHE, lambda d, g: torch.tensor([20])),
    rows="1",
    kv_heads=2,
    train=False,
)
def static_cache_position_tensor(q, k, v, k_cache, v_cache, position):
    k_cache.index_copy_(2, position, k)
    v_cache.index_copy_(2, position, v)
    keep = torch.arange(41)[None, :] <= position[:, None]
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    k, v = (x.repeat_interleave(3, dim=1) for x in (k_cache, v_cache))
    return F.softmax(q @ k.mT / 4 + bias, dim=-1) @ v


@spells(PLAIN, "BH1D", "const:BH1D", "const:BH1D", "const:BHND", "const:BHND", rows="1", train=False)
def cache_by_slice(q, k, v, k_cache, v_cache):
    k_cache[:, :, 20:21] = k
    v_cache[:, :, 20:21] = v
    return F.softmax(q @ k_cache[:, :, :21].mT / 4, -1) @ v_cache[:, :, :21]


@spells(PLAIN, "BH1D", "BH1D", "BH1D", "BHND", "BHND", rows="1")
def cache_by_concatenation(q, k, v, k_past, v_past):
    k, v = torch.cat([k_past, k], dim=2), torch.cat([v_past, v], dim=2)
    return F.softmax(q @ k.mT / 4, dim=-1) @ v, k, v


@spells(CAUSAL, *SELF, columns="M")
def mask_assigned_by_rows(q, k, v):
    keep = torch.zeros(37, 37, dtype=torch.bool)
    keep |= torch.arange(37)[:, None] >= torch.arange(37)
    return (q @ k.mT / 4).masked_fill(~keep, INF).softmax(-1) @ v


@spells(PLAIN, *QKV, sites=2)
def two_sites(q, k, v):
    out = F.softmax(q @ k.mT / 4, -1) @ v
    return F.softmax(out @ k.mT / 4, -1) @ v


@spells(PLAIN, *QKV)
def output_mutated_after(q, k, v):
    out = F.softmax(q @ k.mT / 4, -1) @ v
    out *= 2
    return out


@spells(PLAIN, *QKV)
def residual_and_norm(q, k, v):
    out = q + F.softmax(q @ k.mT / 4, -1) @ v
    return F.layer_norm(out, (16,))
