"""Modules as users write and import them: nn.MultiheadAttention, layers, known models."""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.base import spells
from tests.spellings.meaning import Means

X = "BMC"
PLAIN = "scale=0.25"
CAUSAL = "scale=0.25; keep = kv <= q"
PADDED = re.compile(r"scale=0\.25; keep = ~?\(?\b(pad|mask)\[b, (0, 0, )?kv\]\)?; empty=zero")
INF = float("-inf")


class MHA(nn.Module):
    """nn.MultiheadAttention of 96 channels and 6 heads."""

    options: dict = {"batch_first": True}

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(96, 6, **self.options)


@spells(PLAIN, X, columns="M")
class NeedWeightsFalse(MHA):
    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


@spells(PLAIN, X, columns="M")
class WeightsUnused(MHA):
    """need_weights is True, but nobody reads the weights."""

    def forward(self, x):
        out, _ = self.mha(x, x, x)
        return out


@spells(PLAIN, "MBC", columns="M")
class SequenceFirst(MHA):
    options = {}

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


@spells(PLAIN, X, "BNC")
class Cross(MHA):
    def forward(self, x, y):
        return self.mha(x, y, y, need_weights=False)[0]


@spells(PLAIN, "MC", columns="M")
class Unbatched(MHA):
    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


@spells(PLAIN, X, "BNC", "BNC")
class OtherKeyDims(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(96, 6, kdim=96, vdim=96, bias=False, batch_first=True)

    def forward(self, x, y, z):
        return self.mha(x, y, z, need_weights=False)[0]


@spells(CAUSAL, X, columns="M")
class IsCausal(MHA):
    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(37, dtype=x.dtype)
        return self.mha(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


@spells(CAUSAL, X, columns="M")
class CausalMask(MHA):
    def forward(self, x):
        blocked = torch.ones(37, 37, dtype=torch.bool).triu(1)
        return self.mha(x, x, x, attn_mask=blocked, need_weights=False)[0]


@spells(re.compile(r"scale=0\.25; keep = .*mask\d?\[.*; empty=zero"), X, "allowed:MM", columns="M")
class BoolMask(MHA):
    def forward(self, x, allowed):
        return self.mha(x, x, x, attn_mask=~allowed, need_weights=False)[0]


@spells(
    tuple(Means(f"scale=0.25; score = s + bias[q, kv]{empty}") for empty in ("", "; empty=zero")),
    X,
    "additive:MM",
    columns="M",
)
class FloatMask(MHA):
    def forward(self, x, mask):
        return self.mha(x, x, x, attn_mask=mask, need_weights=False)[0]


@spells(PADDED, X, "right:BM", columns="M")
class KeyPadding(MHA):
    def forward(self, x, mask):
        return self.mha(x, x, x, key_padding_mask=~mask, need_weights=False)[0]


@spells(
    re.compile(r"scale=0\.25; keep = .*(pad|mask)\[b, (0, 0, )?kv\].*; empty=zero"),
    X,
    "right:BM",
    columns="M",
)
class CausalAndKeyPadding(MHA):
    def forward(self, x, mask):
        blocked = torch.ones(37, 37, dtype=torch.bool).triu(1)
        return self.mha(x, x, x, key_padding_mask=~mask, attn_mask=blocked, need_weights=False)[0]


@spells(None, X, "right:BM", columns="M")
class KeyPaddingNeedWeights(MHA):
    """The baddbmm path of need_weights=True with the weights unused."""

    def forward(self, x, mask):
        return self.mha(x, x, x, key_padding_mask=~mask)[0]


@spells(PLAIN, X, columns="M")
class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(96, 6, 64, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


@spells(CAUSAL, X, columns="M")
class CausalEncoderLayer(EncoderLayer):
    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(37, dtype=x.dtype)
        return self.layer(x, src_mask=mask, is_causal=True)


@spells(re.compile(r"scale=0\.25(; keep = kv <= q)?"), X, "BMC", columns="M", sites=2)
class DecoderLayer(nn.Module):
    """Causal self attention, then cross attention."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(96, 6, 64, dropout=0.0, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(37, dtype=x.dtype)
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


@spells("scale=0.25; keep = bias[q, kv] != 0; empty=nan_cut", X, columns="M")
class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(96, 288)
        self.c_proj = nn.Linear(96, 96)
        self.attn_dropout = nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, 6, C // 6).transpose(1, 2)
        q = q.view(B, T, 6, C // 6).transpose(1, 2)
        v = v.view(B, T, 6, C // 6).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, INF)
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


@spells(PLAIN, X, columns="M")
class Timm(nn.Module):
    """Vision transformer attention with its fused QKV."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(96, 288), nn.Linear(96, 96)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, 6, C // 6).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * 16**-0.5) @ k.transpose(-2, -1)
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


@spells(None, X, "right:BM", columns="M")
class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(96, 96) for _ in range(3))
        self.dropout = nn.Dropout(0.0)

    def heads(self, x):
        return x.view(x.size()[:-1] + (6, 16)).permute(0, 2, 1, 3)

    def forward(self, x, mask):
        extended = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(16) + extended
        probs = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
        return context.view(context.size()[:-2] + (96,))


@spells(CAUSAL, X, columns="M", kv_heads=2)
class Llama(nn.Module):
    """Grouped heads, RoPE, the eager path of transformers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(96, 96), nn.Linear(96, 32), nn.Linear(96, 32)
        inv = 1 / 100.0 ** (torch.arange(0, 16, 2) / 16)
        self.register_buffer("inv", inv)

    def rope(self, x, cos, sin):
        return x * cos + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin

    def forward(self, x):
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, -1, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
        freqs = torch.arange(S)[:, None].to(self.inv.dtype) * self.inv
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos().to(x.dtype), emb.sin().to(x.dtype)
        q, k = self.rope(q, cos, sin), self.rope(k, cos, sin)
        k, v = (t[:, :, None].expand(B, 2, 3, S, 16).reshape(B, 6, S, 16) for t in (k, v))
        i = torch.arange(S)
        keep = i[None, :] <= i[:, None]
        mask = torch.where(keep, torch.tensor(0.0, dtype=x.dtype), torch.finfo(x.dtype).min)[None, None]
        w = torch.matmul(q, k.transpose(2, 3)) * 16**-0.5 + mask
        w = F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype)
        w = F.dropout(w, p=0.0, training=self.training)
        return torch.matmul(w, v).transpose(1, 2).contiguous().reshape(B, S, -1)


@spells("scale=0.204124145232", X, columns="M")
class LatentHeads(nn.Module):
    """As DeepSeek: k is a part per head and a part that all heads share; D = 24, D_v = 16."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.rot = nn.Linear(96, 144), nn.Linear(96, 192), nn.Linear(96, 8)

    def forward(self, x):
        B, S, _ = x.shape
        q = self.q(x).view(B, S, 6, 24).transpose(1, 2)
        k_own, v = self.kv(x).view(B, S, 6, 32).transpose(1, 2).split([16, 16], dim=-1)
        k_rot = self.rot(x).view(B, 1, S, 8).expand(-1, 6, -1, -1)
        k = torch.cat([k_own, k_rot], dim=-1)
        w = F.softmax(q @ k.transpose(2, 3) * 24**-0.5, dim=-1)
        return (w @ v).transpose(1, 2).reshape(B, S, 96)


@spells(re.compile(r"scale=0\.25(; keep = kv <= q)?"), X, columns="M", sites=2)
class TwoLayers(nn.Module):
    """One mask shared by two layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 288) for _ in range(2))

    def forward(self, x):
        mask = torch.full((37, 37), INF, dtype=x.dtype).triu(1)
        for layer in self.layers:
            q, k, v = (y.view(4, 37, 6, 16).transpose(1, 2) for y in layer(x).chunk(3, -1))
            p = F.softmax(q @ k.mT / 4 + mask, dim=-1)
            x = x + (p @ v).transpose(1, 2).reshape(4, 37, 96)
        return x


@spells(
    PLAIN,
    "BHMD",
    lambda d, g: torch.randn(16, 3, 3, generator=g).to(d).requires_grad_(),
    columns="N",
    rows="M",
)
def spatial(x, w):
    """Pixels of a feature map attend to each other, channels first; 6 x 37 positions, one head."""
    h = x.permute(0, 3, 1, 2).reshape(4, 16, 222)
    p = F.softmax(torch.bmm(h.transpose(1, 2), h) / 4, dim=-1)
    return torch.bmm(p, (h * w.sum((1, 2))[:, None]).transpose(1, 2)).transpose(1, 2)
