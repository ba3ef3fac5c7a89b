"""Every way to contract q with k and the probabilities with v."""

import torch
import torch.nn.functional as F

from tests.spellings.base import spells

QKV = ("BHMD", "BHND", "BHND")
BSHD = ("BMHD", "BNHD", "BNHD")
PLAIN = "scale=0.25"


@spells(PLAIN, *QKV)
def matmul_function(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, -1), v)


@spells(PLAIN, *QKV)
def matmul_method(q, k, v):
    return q.matmul(k.transpose(-1, -2)).mul(0.25).softmax(dim=-1).matmul(v)


@spells(PLAIN, *QKV)
def at_permute(q, k, v):
    return F.softmax(q @ k.permute(0, 1, 3, 2) / 4, -1) @ v


@spells(PLAIN, *QKV)
def swapaxes(q, k, v):
    return F.softmax(q @ k.swapaxes(-2, -1) / 4, -1) @ v


@spells(PLAIN, *QKV)
def movedim(q, k, v):
    return F.softmax(q @ k.movedim(-1, -2) / 4, -1) @ v


@spells(PLAIN, *QKV)
def contiguous_everywhere(q, k, v):
    scores = q.contiguous() @ k.transpose(-1, -2).contiguous() / 4
    return (F.softmax(scores, -1).contiguous() @ v.contiguous()).transpose(1, 2).contiguous()


@spells(PLAIN, "BHMD", "BHDN", "BHND")
def pre_transposed_k(q, k, v):
    return F.softmax(q @ k / 4, -1) @ v


@spells(PLAIN, "BHMD", "BHND", "BHNE")
def different_value_dim(q, k, v):
    return F.softmax(q @ k.mT * 0.25, -1) @ v


@spells(PLAIN, "BHMD", "BHND", "BHEN")
def pre_transposed_v(q, k, v):
    return F.softmax(q @ k.mT * 0.25, -1) @ v.mT


@spells(PLAIN, *QKV)
def three_dims_merged_bmm(q, k, v):
    B, H = q.shape[:2]
    q, k, v = (x.reshape(B * H, -1, 16) for x in (q, k, v))
    out = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / 4, -1), v)
    return out.view(B, H, -1, 16)


@spells(PLAIN, "BMC", "BNC", "BNC")
def heads_merged_into_batch(q, k, v):
    B, M, C = q.shape
    q, k, v = (x.view(B, -1, 6, 16).transpose(1, 2).reshape(B * 6, -1, 16) for x in (q, k, v))
    attn = torch.bmm(q * 0.25, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(attn, v).view(B, 6, M, 16).transpose(1, 2).reshape(B, M, C)


@spells(PLAIN, "BMD", "BND", "BND", rows="M")
def three_dims_one_head(q, k, v):
    return F.softmax(q @ k.transpose(1, 2) / 4, -1) @ v


@spells(PLAIN, "MD", "ND", "ND")
def two_dims(q, k, v):
    return F.softmax(q @ k.T / 4, dim=-1) @ v


@spells(PLAIN, "BMD", "BND", "BND")
def baddbmm_beta_zero(q, k, v):
    scores = torch.baddbmm(torch.empty(4, 37, 41, dtype=q.dtype), q, k.transpose(1, 2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v)


@spells(PLAIN, *QKV)
def baddbmm_zeros_merged(q, k, v):
    B, H = q.shape[:2]
    q, k, v = (x.reshape(B * H, -1, 16) for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1), q, k.mT, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).view(B, H, -1, 16)


@spells(PLAIN, *QKV)
def einsum_bhqd(q, k, v):
    p = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", p, v)


@spells(PLAIN, *QKV)
def einsum_other_letters(q, k, v):
    p = F.softmax(torch.einsum("nhlc,nhsc->nhls", q, k) / 4, dim=-1)
    return torch.einsum("nhls,nhse->nhle", p, v)


@spells(PLAIN, *BSHD)
def einsum_bqhd(q, k, v):
    p = F.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4, dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@spells(PLAIN, *QKV)
def einsum_output_bqhd(q, k, v):
    p = F.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 4, dim=-1)
    return torch.einsum("bhqk,bhkd->bqhd", p, v)


@spells(PLAIN, *QKV)
def einsum_ellipsis(q, k, v):
    p = F.softmax(torch.einsum("...qd,...kd->...qk", q, k) / 4, dim=-1)
    return torch.einsum("...qk,...kd->...qd", p, v)


@spells(PLAIN, *BSHD)
def einsum_kv_first(q, k, v):
    """Softmax over the scores' second to last dim, which is kv here."""
    p = F.softmax(torch.einsum("bqhd,bkhd->bhkq", q, k) / 4, dim=-2)
    return torch.einsum("bhkq,bkhd->bqhd", p, v)


@spells(PLAIN, *QKV)
def einsum_head_last(q, k, v):
    p = F.softmax(torch.einsum("bhqd,bhkd->bqkh", q, k) / 4, dim=2)
    return torch.einsum("bqkh,bhkd->bhqd", p, v)


@spells(PLAIN, "MBHD", "NBHD", "NBHD")
def einsum_sequence_first(q, k, v):
    p = F.softmax(torch.einsum("ibnd,jbnd->ijbn", q, k) / 4, dim=1)
    return torch.einsum("ijbn,jbnd->ibnd", p, v)


@spells(PLAIN, *QKV)
def einsum_arguments_swapped(q, k, v):
    p = F.softmax(torch.einsum("bhkd,bhqd->bhqk", k, q) / 4, dim=-1)
    return torch.einsum("bhkd,bhqk->bhqd", v, p)


@spells(PLAIN, "BHMD", "BHND", "BHNE")
def einsum_value_dim(q, k, v):
    p = torch.einsum("bhid,bhjd->bhij", q, k * 0.25).softmax(dim=-1)
    return torch.einsum("bhij,bhje->bihe", p, v)


@spells(PLAIN, *QKV)
def einsum_then_matmul(q, k, v):
    return F.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 4, dim=-1) @ v


@spells(PLAIN, *QKV)
def einsum_scale_operand(q, k, v):
    p = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q * 0.25, k), dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", p, v)


@spells(PLAIN, "HMD", "HND", "HND")
def einsum_no_batch(q, k, v):
    p = torch.einsum("hqd,hkd->hqk", q, k).div(4).softmax(-1)
    return torch.einsum("hqk,hkd->qhd", p, v)


@spells(PLAIN, *QKV)
def k_times_q_transposed(q, k, v):
    """k @ q^T, softmax over the rows, then transposed back."""
    p = F.softmax(k @ q.mT / 4, dim=-2)
    return p.transpose(-1, -2) @ v


@spells(PLAIN, *QKV)
def k_times_q_transposed_before(q, k, v):
    return F.softmax((k @ q.mT / 4).transpose(-1, -2), dim=-1) @ v


@spells(PLAIN, *QKV)
def v_transposed_times_p(q, k, v):
    """(v^T p^T)^T."""
    p = F.softmax(k @ q.mT / 4, dim=-2)
    return (v.mT @ p).mT


@spells(PLAIN, *QKV)
def multiply_and_sum(q, k, v):
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / 4
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


@spells(PLAIN, "BH1D", "BHND", "BHND", rows="1")
def one_query(q, k, v):
    return F.softmax(q @ k.mT / 4, dim=-1) @ v


@spells(PLAIN, "BHD", "BHND", "BHND", rows="1")
def one_query_einsum(q, k, v):
    p = torch.einsum("bhd,bhkd->bhk", q, k).div(4).softmax(-1)
    return torch.einsum("bhk,bhkd->bhd", p, v)


@spells(PLAIN, "BMC", "BMC", "BMC", columns="M")
def unflatten_flatten(q, k, v):
    q, k, v = (x.unflatten(-1, (6, 16)).transpose(1, 2) for x in (q, k, v))
    return (F.softmax(q @ k.mT / 4, -1) @ v).transpose(1, 2).flatten(-2)


@spells(
    PLAIN,
    "BMC",
    lambda dtype, gen: torch.randn(96, 288, generator=gen).div(10).to(dtype).requires_grad_(),
    columns="M",
)
def packed_projection(x, w):
    B, M, C = x.shape
    q, k, v = (x @ w).view(B, M, 3, 6, 16).permute(2, 0, 3, 1, 4)
    return (F.softmax(q @ k.mT / 4, -1) @ v).transpose(1, 2).reshape(B, M, C)


@spells(
    PLAIN,
    "BMC",
    lambda dtype, gen: torch.randn(96, 288, generator=gen).div(10).to(dtype).requires_grad_(),
    columns="M",
)
def packed_projection_unbind(x, w):
    qkv = (x @ w).reshape(4, 37, 3, 6, 16)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return (F.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1) @ v).transpose(1, 2)


@spells(
    PLAIN,
    "BMC",
    lambda dtype, gen: torch.randn(96, 288, generator=gen).div(10).to(dtype).requires_grad_(),
    columns="M",
)
def packed_projection_chunk(x, w):
    q, k, v = (x @ w).chunk(3, dim=-1)
    q, k, v = (y.view(4, 37, 6, 16).transpose(1, 2) for y in (q, k, v))
    return (F.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1) @ v).transpose(1, 2)


@spells(PLAIN, "BHMD", "BHMD", columns="M")
def keys_are_values(q, k):
    return F.softmax(q @ k.mT / 4, -1) @ k
