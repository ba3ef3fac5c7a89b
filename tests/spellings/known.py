"""Attention as well-known code writes it."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import einsum, nn

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
X = "BMC"
PLAIN = "scale=0.25"
CAUSAL = "scale=0.25; keep = kv <= q"
INF = float("-inf")


def split(x, heads=6):
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


class Projected(nn.Module):
    """Three projections of [B, S, 96] and one back."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(96, 96, bias=False) for _ in range(4))


@spells(Means("scale=0.25; keep = mask[b, q, kv]; empty=mean_cut"), *QKV, "allowed:BMN")
def annotated_transformer(query, key, value, mask):
    mask = mask.unsqueeze(1)
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    return torch.matmul(p_attn, value)


@spells("scale=0.25; keep = pad[b, kv]; empty=mean_cut", *QKV, "right:BN")
def vit_pytorch(q, k, v, mask):
    sim = einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
    sim = sim.masked_fill(~mask[:, None, None, :], -torch.finfo(sim.dtype).max)
    attn = sim.softmax(dim=-1)
    return einsum("b h i j, b h j d -> b h i d", attn, v)


@spells(Means("scale=0.25; keep = kv <= q + 4"), *QKV)
def x_transformers_causal(q, k, v):
    dots = einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    i, j = dots.shape[-2:]
    causal_mask = torch.ones((i, j), device=q.device, dtype=torch.bool).triu(j - i + 1)
    dots = dots.masked_fill(causal_mask, -torch.finfo(dots.dtype).max)
    attn = F.softmax(dots, dim=-1, dtype=torch.float32).type(dots.dtype)
    return einsum("b h i j, b h j d -> b h i d", attn, v)


@spells(CAUSAL, "BHMD", "BMD", "BMD", columns="M", kv_heads=1)
def palm(q, k, v):
    """Multi-query, with the largest score subtracted and detached."""
    q = q * 16**-0.5
    sim = einsum("b h i d, b j d -> b h i j", q, k)
    sim = sim.masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), -torch.finfo(q.dtype).max)
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    return einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v)


@spells(PLAIN, "BMC", "BNC", "BNC")
def latent_diffusion(q, k, v):
    q, k, v = (split(x).reshape(24, -1, 16) for x in (q, k, v))
    sim = einsum("b i d, b j d -> b i j", q, k) * 0.25
    out = einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
    return out.view(4, 6, 37, 16).transpose(1, 2).reshape(4, 37, 96)


@spells(PLAIN, "BMC", "BNC", "BNC")
def diffusers_baddbmm(query, key, value):
    query, key, value = (x.reshape(4, -1, 6, 16).permute(0, 2, 1, 3).reshape(24, -1, 16) for x in (query, key, value))
    scores = torch.baddbmm(
        torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype),
        query,
        key.transpose(-1, -2),
        beta=0,
        alpha=0.25,
    )
    probs = scores.softmax(dim=-1).to(query.dtype)
    hidden = torch.bmm(probs, value)
    return hidden.reshape(4, 6, 37, 16).permute(0, 2, 1, 3).reshape(4, 37, 96)


@spells(None, "MBC", "right:BM", "additive:MM", columns="M")
class Fairseq(Projected):
    def forward(self, x, keep, attn_mask):
        T, B, C = x.shape
        q = self.q(x) * 16**-0.5
        q = q.contiguous().view(T, B * 6, 16).transpose(0, 1)
        k = self.k(x).contiguous().view(-1, B * 6, 16).transpose(0, 1)
        v = self.v(x).contiguous().view(-1, B * 6, 16).transpose(0, 1)
        w = torch.bmm(q, k.transpose(1, 2))
        w += attn_mask.unsqueeze(0)
        w = w.view(B, 6, T, T).masked_fill((~keep).unsqueeze(1).unsqueeze(2), INF)
        w = w.view(B * 6, T, T)
        p = F.softmax(w, dim=-1, dtype=torch.float32).type_as(w)
        p = F.dropout(p, p=0.1, training=False)
        attn = torch.bmm(p, v).transpose(0, 1).contiguous().view(T, B, C)
        return self.o(attn)


@spells("scale=0.25; score = s + bias[q, kv]", X, columns="M")
class Whisper(Projected):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.empty(64, 64).fill_(-np.inf).triu_(1), persistent=False)

    def forward(self, x):
        n_batch, n_ctx, n_state = x.shape
        scale = (n_state // 6) ** -0.25
        q = self.q(x).view(n_batch, n_ctx, 6, -1).permute(0, 2, 1, 3)
        k = self.k(x).view(n_batch, n_ctx, 6, -1).permute(0, 2, 1, 3)
        v = self.v(x).view(n_batch, n_ctx, 6, -1).permute(0, 2, 1, 3)
        qk = (q * scale) @ (k * scale).transpose(-1, -2)
        qk = (qk + self.mask[:n_ctx, :n_ctx]).float()
        w = F.softmax(qk, dim=-1).to(q.dtype)
        return self.o((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))


@spells(CAUSAL, X, columns="M")
class LlamaReference(Projected):
    def forward(self, x):
        B, S, _ = x.shape
        mask = torch.full((S, S), INF).triu(diagonal=1).type_as(x)
        q, k, v = (p(x).view(B, S, 6, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(16)
        scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        out = torch.matmul(scores, v).transpose(1, 2).contiguous().view(B, S, -1)
        return self.o(out)


@spells("scale=0.25; keep = bias[q, kv] != 0; empty=nan_cut", "BMC", columns="M")
class OneHeadOfALecture(nn.Module):
    """A single head with its tril buffer."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(96, 16, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(64, 64)))

    def forward(self, x):
        B, T, C = x.shape
        k, q, v = self.key(x), self.query(x), self.value(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, INF)
        wei = F.softmax(wei, dim=-1)
        return wei @ v


@spells(PLAIN, *QKV)
def numpy_root(q, k, v):
    return F.softmax(torch.matmul(q, k.transpose(-1, -2)) / np.sqrt(16), dim=-1) @ v


@spells("scale=0.102062072616", X, "BNC")
class SetTransformer(nn.Module):
    """Heads split along the batch by cat of split; the query is added to the output."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(96, 96) for _ in range(3))

    def forward(self, Q, K):
        Q, K, V = self.q(Q), self.k(K), self.v(K)
        Q_ = torch.cat(Q.split(16, 2), 0)
        K_ = torch.cat(K.split(16, 2), 0)
        V_ = torch.cat(V.split(16, 2), 0)
        A = torch.softmax(Q_.bmm(K_.transpose(1, 2)) / math.sqrt(96), 2)
        return torch.cat((Q_ + A.bmm(V_)).split(Q.size(0), 0), 2)


@spells("scale=1", lambda d, g: torch.randn(4, 16, 6, 6, generator=g).to(d).requires_grad_())
class Sagan(nn.Module):
    """Self attention of an image, channels first, values on the left."""

    def __init__(self):
        super().__init__()
        self.f, self.g, self.h = (nn.Conv2d(16, n, 1) for n in (4, 4, 16))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        B, C, W, H = x.size()
        query = self.f(x).view(B, -1, W * H).permute(0, 2, 1)
        key = self.g(x).view(B, -1, W * H)
        attention = F.softmax(torch.bmm(query, key), dim=-1)
        value = self.h(x).view(B, -1, W * H)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(B, C, W, H)
        return self.gamma * out + x


@spells("scale=1", lambda d, g: torch.randn(4, 16, 6, 6, generator=g).to(d).requires_grad_())
class NonLocal(Sagan):
    """The same as a non-local block: theta^T phi, then a sum over positions last first."""

    def forward(self, x):
        theta = self.f(x).flatten(2).transpose(1, 2)
        phi, g = self.g(x).flatten(2), self.h(x).flatten(2).transpose(1, 2)
        y = torch.matmul(F.softmax(torch.matmul(theta, phi), dim=-1), g)
        return x + y.permute(0, 2, 1).contiguous().view(x.shape)


@spells("scale=1", "BMD", "BND")
def luong(decoder, encoder):
    energies = torch.bmm(decoder, encoder.transpose(1, 2))
    context = F.softmax(energies, dim=2).bmm(encoder)
    return torch.cat([decoder, context], dim=-1)


@spells(PLAIN, "1MC", "BNC", "BNC")
def perceiver_latents(latents, k, v):
    """Learned queries shared by the batch."""
    q = split(latents.expand(4, -1, -1))
    return (F.softmax(q @ split(k).mT / 4, dim=-1) @ split(v)).transpose(1, 2).flatten(2)


@spells(PLAIN, "MC", "BNC", "BNC")
def perceiver_latents_repeated(latents, k, v):
    q = split(latents.unsqueeze(0).repeat(4, 1, 1))
    return (F.softmax(q @ split(k).mT / 4, dim=-1) @ split(v)).transpose(1, 2).flatten(2)


@spells(PLAIN, X, columns="M")
class Dino(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(96, 288)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, 6, C // 6).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * 0.25
        return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)


@spells(PLAIN, lambda d, g: torch.randn(2, 8, 8, 96, generator=g).to(d).requires_grad_())
class WindowedImage(Dino):
    """Windows of 4 x 4 pixels as extra batch rows."""

    def forward(self, x):
        B, H, W, C = x.shape
        x = x.view(B, H // 4, 4, W // 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, C)
        x = super().forward(x)
        x = x.view(B, H // 4, W // 4, 4, 4, C).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(B, H, W, C)


@spells(PLAIN, lambda d, g: torch.randn(2, 5, 7, 96, generator=g).to(d).requires_grad_())
class Axial(Dino):
    """Attention along the rows of an image."""

    def forward(self, x):
        B, H, W, C = x.shape
        return super().forward(x.reshape(B * H, W, C)).view(B, H, W, C)


@spells(CAUSAL, *SELF, columns="M")
def mpt(q, k, v):
    s = q.matmul(k.transpose(-1, -2)) * 0.25
    s_q, s_k = s.size(-2), s.size(-1)
    causal = torch.ones(max(s_q, s_k), max(s_q, s_k), dtype=torch.float32)
    causal = causal.tril().to(torch.bool)
    causal = ~causal[-s_q:, -s_k:]
    s = s.masked_fill(causal.view(1, 1, s_q, s_k), torch.finfo(q.dtype).min)
    return torch.softmax(s, dim=-1).matmul(v)


@spells(CAUSAL, *SELF, columns="M")
def gpt_j(query, key, value):
    """Upcast queries and keys, where with a tensor, divided by a tensor."""
    bias = torch.tril(torch.ones((64, 64), dtype=torch.bool)).view(1, 1, 64, 64)
    causal_mask = bias[:, :, 37 - 37 : 37, :37]
    scale_attn = torch.sqrt(torch.tensor(16, dtype=torch.float32)).to(torch.get_default_dtype())
    w = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2))
    mask_value = torch.tensor(torch.finfo(w.dtype).min, dtype=w.dtype)
    w = torch.where(causal_mask, w, mask_value)
    w = w / scale_attn
    w = nn.functional.softmax(w, dim=-1).to(value.dtype)
    return torch.matmul(w, value)
