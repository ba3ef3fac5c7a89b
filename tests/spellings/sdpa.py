"""scaled_dot_product_attention with every argument."""

import torch
import torch.nn.functional as F

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
SELF = ("BHMD", "BHMD", "BHMD")
PLAIN = "scale=0.25"
CAUSAL = "scale=0.25; keep = kv <= q"
INF = float("-inf")
sdpa = F.scaled_dot_product_attention


@spells(PLAIN, *QKV)
def plain(q, k, v):
    return sdpa(q, k, v)


@spells(PLAIN, *QKV)
def arguments_by_position(q, k, v):
    return sdpa(q, k, v, None, 0.0, False)


@spells(PLAIN, *QKV)
def through_torch_nn(q, k, v):
    return torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0)


@spells("scale=0.5", *QKV)
def scale(q, k, v):
    return sdpa(q, k, v, scale=0.5)


@spells("scale=0.5", *QKV)
def scale_on_q_too(q, k, v):
    return sdpa(q * 2.0, k, v)


@spells("scale=1", *QKV)
def scale_one(q, k, v):
    return sdpa(q, k, v, scale=1)


@spells(CAUSAL, *SELF, columns="M")
def is_causal(q, k, v):
    return sdpa(q, k, v, is_causal=True)


@spells(CAUSAL, *QKV)
def is_causal_more_keys(q, k, v):
    """SDPA's causal is top-left."""
    return sdpa(q, k, v, is_causal=True)


@spells(PLAIN, "BHMD", "BHND", "BHNE")
def different_value_dim(q, k, v):
    return sdpa(q, k, v)


@spells(PLAIN, "BMHD", "BNHD", "BNHD")
def transposed_views(q, k, v):
    return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@spells(PLAIN, "BHMD", "BGND", "BGND", kv_heads=2)
def enable_gqa(q, k, v):
    return sdpa(q, k, v, enable_gqa=True)


@spells(PLAIN, "BHMD", "BGND", "BGND", kv_heads=2)
def expanded_heads(q, k, v):
    k, v = (x[:, :, None].expand(4, 2, 3, 41, 16).reshape(4, 6, 41, 16) for x in (k, v))
    return sdpa(q, k, v)


@spells(CAUSAL, "BHMD", "BGMD", "BGMD", columns="M", kv_heads=2)
def enable_gqa_causal(q, k, v):
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


@spells(CAUSAL, *SELF, columns="M")
def computed_bool_mask(q, k, v):
    return sdpa(q, k, v, attn_mask=torch.ones(37, 37, dtype=torch.bool).tril())


@spells(CAUSAL, *SELF, columns="M")
def computed_float_mask(q, k, v):
    return sdpa(q, k, v, attn_mask=torch.full((37, 37), INF, dtype=q.dtype).triu(1))


@spells(Means("scale=0.25; keep = kv <= q + 4"), *QKV)
def computed_bottom_right(q, k, v):
    return sdpa(q, k, v, attn_mask=torch.ones(37, 41, dtype=torch.bool).tril(4))


@spells(Means("scale=0.25; keep = mask[q, kv]; empty=zero"), *QKV, "allowed:MN")
def bool_mask(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask)


@spells(Means("scale=0.25; keep = mask[b, q, kv]; empty=zero"), *QKV, "allowed:B1MN")
def bool_mask_four_dims(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask)


@spells("scale=0.25; keep = pad[b, kv]; empty=zero", *QKV, "right:BN")
def padding(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask[:, None, None, :])


@spells("scale=0.25; keep = pad[b, kv]; empty=zero", *QKV, "right:BN")
def padding_expanded(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask[:, None, None, :].expand(-1, -1, 37, -1))


@spells("scale=0.25; keep = kv <= q & pad[b, kv]; empty=zero", *SELF, "left:BM", columns="M")
def causal_and_left_padding(q, k, v, mask):
    i = torch.arange(37)
    keep = (i <= i[:, None]) & mask[:, None, None, :]
    return sdpa(q, k, v, attn_mask=keep)


@spells("scale=0.25; keep = kv <= q & pad[b, kv]; empty=mean", *SELF, "left:BM", columns="M")
def causal_and_left_padding_float(q, k, v, mask):
    i = torch.arange(37)
    keep = (i <= i[:, None]) & mask[:, None, None, :]
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return sdpa(q, k, v, attn_mask=bias)


@spells(
    (
        Means("scale=0.25; score = s + bias[q, kv]; empty=zero"),
        Means("scale=0.25; score = s + bias[q, kv]"),
    ),
    *QKV,
    "additive:MN",
)
def float_mask(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask)


@spells(
    (
        Means("scale=0.25; score = s + bias[b, h, q, kv]; empty=zero"),
        Means("scale=0.25; score = s + bias[b, h, q, kv]"),
    ),
    *QKV,
    "BHMN",
)
def learned_bias(q, k, v, bias):
    return sdpa(q, k, v, attn_mask=bias)


@spells(
    (
        Means("scale=0.25; score = s + bias[h, q, kv]; empty=zero"),
        Means("scale=0.25; score = s + bias[h, q, kv]"),
    ),
    *QKV,
    "HMN",
)
def learned_bias_per_head(q, k, v, bias):
    return sdpa(q, k, v, attn_mask=bias)


@spells(Means("scale=0.25; keep = kv <= q & ids[b, q] == ids[b, kv]"), *SELF, "ids:BM", columns="M")
def causal_documents(q, k, v, ids):
    keep = (ids[:, :, None] == ids[:, None, :]).tril()
    return sdpa(q, k, v, attn_mask=keep[:, None])


@spells("scale=0.25; keep = kv <= q & q - kv < 8", "BHMD", "BGMD", "BGMD", columns="M", kv_heads=2)
def window_and_groups(q, k, v):
    i = torch.arange(37)
    keep = (i <= i[:, None]) & (i > i[:, None] - 8)
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    return sdpa(q, k, v, attn_mask=keep[None, None], scale=16**-0.5)


@spells(PLAIN, "BH1D", "BHND", "BHND", rows="1")
def one_query(q, k, v):
    return sdpa(q, k, v)


@spells(PLAIN, "BMD", "BND", "BND")
def three_dims(q, k, v):
    return sdpa(q, k, v)


@spells(PLAIN, "MD", "ND", "ND")
def two_dims(q, k, v):
    return sdpa(q, k, v)


@spells(PLAIN, "BGRMD", "BG1ND", "BG1ND")
def five_dims(q, k, v):
    return sdpa(q, k.expand(-1, -1, 3, -1, -1), v.expand(-1, -1, 3, -1, -1))


@spells(PLAIN, *QKV)
def dropout_in_eval(q, k, v):
    return sdpa(q, k, v, dropout_p=0.1 if not q.is_floating_point() else 0.0)
