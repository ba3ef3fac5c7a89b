"""Edits of the scaled score: softcap, ALiBi, learned and table biases, temperature."""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
INF = float("-inf")
SOFTCAP = Means("scale=0.25; score = 5.0*tanh(s/5.0)")
ALIBI = Means("scale=0.25; score = s + slope[h]*float(kv - q); keep = kv <= q")


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


def causal(s):
    return s.masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), INF)


@spells(SOFTCAP, *QKV)
def softcap(q, k, v):
    return (5.0 * torch.tanh(scores(q, k) / 5.0)).softmax(-1) @ v


@spells(SOFTCAP, *QKV)
def softcap_steps(q, k, v):
    """As Gemma 2."""
    s = scores(q, k)
    s = s / 5.0
    s = torch.tanh(s)
    s = s * 5.0
    return F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spells(SOFTCAP, *QKV)
def softcap_in_the_scale(q, k, v):
    return (5 * torch.tanh(q @ k.mT / 20)).softmax(-1) @ v


@spells(Means("scale=0.25; score = 5.0*tanh(s/5.0); keep = kv <= q"), *SELF, columns="M")
def softcap_then_causal(q, k, v):
    return causal(5.0 * torch.tanh(scores(q, k) / 5.0)).softmax(-1) @ v


@spells(Means("scale=0.25; score = 5.0*(2*sigmoid(2*s/5.0) - 1)"), *QKV)
def softcap_by_sigmoid(q, k, v):
    return (5.0 * (2 * torch.sigmoid(2 * scores(q, k) / 5.0) - 1)).softmax(-1) @ v


@spells(None, *QKV)
def clamped(q, k, v):
    return scores(q, k).clamp(-2.0, 2.0).softmax(-1) @ v


@spells(ALIBI, *SELF, "H", columns="M")
def alibi_after_scale(q, k, v, slopes):
    i = torch.arange(37)
    distance = (i[None, :] - i[:, None]).to(q.dtype)
    return causal(scores(q, k) + slopes[:, None, None] * distance).softmax(-1) @ v


@spells(ALIBI, *SELF, "H", columns="M")
def alibi_negative_distance(q, k, v, slopes):
    i = torch.arange(37)
    distance = (i.view(-1, 1) - i.view(1, -1)).to(q.dtype)
    return causal(scores(q, k) - distance * slopes.view(1, 6, 1, 1)).softmax(-1) @ v


@spells(ALIBI, *SELF, "H11", columns="M")
def alibi_additive_mask(q, k, v, slopes):
    i = torch.arange(37)
    bias = slopes * (i - i[:, None]) + torch.full((37, 37), INF, dtype=q.dtype).triu(1)
    return F.softmax(scores(q, k) + bias, -1) @ v


@spells(
    (
        Means("scale=0.25; score = s + slope[h]*float(kv - q)*0.25; keep = kv <= q"),
        ALIBI,
    ),
    *SELF,
    "H11",
    columns="M",
)
def alibi_before_scale(q, k, v, slopes):
    i = torch.arange(37)
    s = (q @ k.mT + slopes * (i - i[:, None])) / 4
    return causal(s).softmax(-1) @ v


SLOPES = ALIBI, Means("scale=0.25; score = s + 2.0**(-(h + 1))*float(kv - q); keep = kv <= q")


@spells(SLOPES, *SELF, columns="M")
def alibi_slopes_in_the_graph(q, k, v):
    i = torch.arange(37)
    slopes = 2.0 ** -(torch.arange(6) + 1.0).to(q.dtype)
    return causal(scores(q, k) + slopes[:, None, None] * (i - i[:, None])).softmax(-1) @ v


@spells(SLOPES, *SELF, columns="M")
def alibi_slopes_of_a_list(q, k, v):
    i = torch.arange(37)
    slopes = torch.tensor([2.0**-n for n in range(1, 7)], dtype=q.dtype)
    return causal(scores(q, k) + slopes[:, None, None] * (i - i[:, None])).softmax(-1) @ v


@spells(Means("scale=0.25; score = s + slope[h]*float(kv); keep = kv <= q"), *SELF, "H", columns="M")
def alibi_of_kv_alone(q, k, v, slopes):
    """As Bloom: a row's constant drops out, so only kv counts."""
    bias = slopes[:, None, None] * torch.arange(37).to(q.dtype)[None, None, :]
    return causal(scores(q, k) + bias).softmax(-1) @ v


@spells(None, *SELF, "const:BH1M", columns="M")
def alibi_by_baddbmm(q, k, v, alibi):
    """As Bloom: alibi.baddbmm(q, k^T, beta, alpha), reshaped, then the mask."""
    q, k, v = (x.reshape(24, 37, 16) for x in (q, k, v))
    s = alibi.reshape(24, 1, 37).baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    s = causal(s.view(4, 6, 37, 37))
    p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype).view(24, 37, 37)
    return torch.bmm(p, v).view(4, 6, 37, 16).transpose(1, 2).reshape(4, 37, 96)


@spells(Means("scale=0.25; score = s + slope[h]*float(abs(q - kv))"), *QKV, "H")
def symmetric_alibi(q, k, v, slopes):
    distance = (torch.arange(37)[:, None] - torch.arange(41)).abs()
    return (scores(q, k) + slopes[:, None, None] * distance).softmax(-1) @ v


@spells(Means("scale=0.25; score = s + bias[h, kv]"), *QKV, "HN")
def bias_of_log_probabilities(q, k, v, table):
    """A log_softmax that is computed elsewhere is a tensor like any other."""
    return (scores(q, k) + F.log_softmax(table, -1)[:, None]).softmax(-1) @ v


@spells(None, *QKV, "HN")
def bias_of_probabilities(q, k, v, table):
    return (scores(q, k) + F.log_softmax(table, -1).exp()[:, None]).softmax(-1) @ v


@spells(Means("scale=0.25; score = s + bias[h, q, kv]"), *QKV, "HMN")
def bias_per_head(q, k, v, bias):
    return (scores(q, k) + bias).softmax(-1) @ v


@spells(Means("scale=0.25; score = s + bias[b, h, q, kv]"), *QKV, "BHMN")
def bias_full(q, k, v, bias):
    return (scores(q, k) + bias).softmax(-1) @ v


@spells(Means("scale=0.25; score = s + bias[b, kv]"), *QKV, "BN")
def bias_per_key(q, k, v, bias):
    return (scores(q, k) + bias[:, None, None, :]).softmax(-1) @ v


@spells(Means("scale=0.25; score = s + bias[q, kv] + bias1[h, kv]"), *QKV, "MN", "HN")
def two_biases(q, k, v, bias, more):
    return (scores(q, k) + bias + more[:, None, :]).softmax(-1) @ v


@spells(
    (
        Means("scale=0.25; score = (4*s + bias[h, q, kv])/4"),
        Means("scale=1; score = (s + bias[h, q, kv])*0.25"),
    ),
    *QKV,
    "HMN",
)
def bias_before_scale(q, k, v, bias):
    return ((q @ k.mT + bias) / 4).softmax(-1) @ v


@spells(Means("scale=0.25; score = s*bias[q]"), *QKV, "positive:M1")
def temperature_per_query(q, k, v, temperature):
    return (scores(q, k) * temperature).softmax(-1) @ v


@spells(Means("scale=0.25; score = s/bias[b, q]"), *QKV, "positive:BM")
def temperature_per_row(q, k, v, temperature):
    return (scores(q, k) / temperature[:, None, :, None]).softmax(-1) @ v


@spells(None, *QKV)
def temperature_by_position(q, k, v):
    """As Llama 4: the later the query, the sharper."""
    sharp = torch.log(torch.floor(torch.arange(37) / 8.0) + 1.0) * 0.1 + 1.0
    return (scores(q, k) * sharp[:, None].to(q.dtype)).softmax(-1) @ v


@spells(Means("scale=0.25; score = s*bias[q, kv]"), *QKV, "positive:MN")
def multiplied_by_captured(q, k, v, weight):
    return (scores(q, k) * weight).softmax(-1) @ v


@spells(Means("scale=0.25; score = where(kv <= q, s, 0.5*s)"), *QKV)
def future_halved(q, k, v):
    past = torch.arange(41) <= torch.arange(37)[:, None]
    s = scores(q, k)
    return torch.where(past, s, s * 0.5).softmax(-1) @ v


@spells(Means("scale=0.25; score = s + bias[kv - q + 36, h]"), *QKV, lambda d, g: table(77, d, g))
def relative_position_table(q, k, v, table):
    """Bias by distance, learned: table[kv - q + S_q - 1, h]."""
    distance = torch.arange(41)[None, :] - torch.arange(37)[:, None] + 36
    return (scores(q, k) + table[distance].permute(2, 0, 1)).softmax(-1) @ v


@spells(
    (
        Means("scale=0.25; score = s + bias[h, kv - q + 36]"),
        Means("scale=0.25; score = s + bias[kv - q + 36, h]"),
    ),
    *QKV,
    lambda d, g: table(77, d, g),
)
def relative_position_table_head_first(q, k, v, table):
    distance = torch.arange(41)[None, :] - torch.arange(37)[:, None] + 36
    return (scores(q, k) + table.t().contiguous()[:, distance]).softmax(-1) @ v


@spells(
    Means("scale=0.25; score = s + bias[min(max(kv - q, -8), 8) + 8, h]"),
    *QKV,
    lambda d, g: table(17, d, g),
)
def clipped_relative_position(q, k, v, table):
    distance = (torch.arange(41)[None, :] - torch.arange(37)[:, None]).clamp(-8, 8) + 8
    return (scores(q, k) + F.embedding(distance, table).permute(2, 0, 1)).softmax(-1) @ v


def table(rows, dtype, gen):
    return torch.randn(rows, 6, generator=gen).to(dtype).requires_grad_()


@spells(re.compile(r"scale=1; score = s \+ bias\[.*log.*, h\]"), *QKV)
class T5Bias(nn.Module):
    """T5's bucketed relative position bias, bidirectional, learned, scale 1."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(32, 6)

    def buckets(self, distance):
        bucket = (distance > 0).long() * 16
        distance = distance.abs()
        large = 8 + (torch.log(distance.float() / 8) / math.log(128 / 8) * 8).long()
        large = torch.min(large, torch.full_like(large, 15))
        return bucket + torch.where(distance < 8, distance, large)

    def forward(self, q, k, v):
        distance = torch.arange(41)[None, :] - torch.arange(37)[:, None]
        bias = self.bias(self.buckets(distance)).permute([2, 0, 1]).unsqueeze(0)
        s = torch.matmul(q, k.transpose(3, 2))
        s = s + bias
        return F.softmax(s.float(), dim=-1).type_as(s) @ v


@spells(Means("scale=0.25; score = s + bias[ids[q, kv], h]"), *SELF, columns="M")
class SwinBias(nn.Module):
    """Swin's bias: a learned table gathered by an index buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 6))
        gen = torch.Generator().manual_seed(3)
        self.register_buffer("index", torch.randint(0, 50, (37, 37), generator=gen))

    def forward(self, q, k, v):
        bias = self.table[self.index.view(-1)].view(37, 37, -1)
        bias = bias.permute(2, 0, 1).contiguous()
        return ((q * 0.25) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v


@spells(re.compile(r"scale=0\.25; score = s \+ bias\d?\[.*\] \+ bias\d?\[.*\]"), *SELF, columns="M")
class SwinShiftedBias(SwinBias):
    """The same with the shift mask of four windows, added through a 5-D view."""

    def __init__(self):
        super().__init__()
        windows = torch.arange(4)[:, None] * 0 + (torch.arange(37) > 20)
        windows[0] = False
        mask = torch.where(windows[:, None, :] == windows[:, :, None], 0.0, -100.0)
        self.register_buffer("mask", mask)

    def forward(self, q, k, v):
        bias = self.table[self.index.view(-1)].view(37, 37, -1).permute(2, 0, 1).contiguous()
        s = (q * 0.25) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        s = s.view(1, 4, 6, 37, 37) + self.mask.unsqueeze(1).unsqueeze(0)
        return s.view(-1, 6, 37, 37).softmax(-1) @ v


@spells(
    (
        Means("scale=1; score = s*slope[h]"),
        Means(f"scale=1; score = s*exp(min(slope[h], {math.log(100.0)}))"),
        "scale=1",
    ),
    *QKV,
    "positive:H11",
)
def cosine(q, k, v, logit_scale):
    """As Swin v2: normalised outside, scaled by a learned, clamped number per head."""
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (s * torch.clamp(logit_scale, max=math.log(100.0)).exp()).softmax(-1) @ v


@spells("scale=0.25", *QKV, "positive:D", "positive:D")
def qk_norm(q, k, v, wq, wk):
    q, k = F.rms_norm(q, (16,), wq), F.rms_norm(k, (16,), wk)
    return scores(q, k).softmax(-1) @ v


@spells("scale=0.25", *QKV, "positive:D", "D")
def qk_layer_norm(q, k, v, weight, bias):
    q, k = (F.layer_norm(x, (16,), weight, bias) for x in (q, k))
    return scores(q, k).softmax(-1) @ v


@spells("scale=0.25; keep = kv <= q", *SELF, columns="M")
def rope(q, k, v):
    freqs = 100.0 ** -(torch.arange(0, 16, 2) / 16)
    angles = torch.arange(37)[:, None] * freqs
    cos, sin = (torch.cat([f, f], -1).to(q.dtype) for f in (angles.cos(), angles.sin()))

    def rotate(x):
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], dim=-1) * sin

    return causal(scores(rotate(q), rotate(k))).softmax(-1) @ v
