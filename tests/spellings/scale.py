"""Where the scale may stand: on q, on k, on both, on the scores, as any kind of number."""

import math

import torch
import torch.nn.functional as F

from tests.spellings.base import spells
from tests.spellings.meaning import Means

QKV = ("BHMD", "BHND", "BHND")
PLAIN = "scale=0.25"
LEARNED = (Means("scale=1; score = s*slope[h]"), "scale=1")


@spells(PLAIN, *QKV)
def mul_scores(q, k, v):
    return F.softmax(q @ k.mT * 0.25, dim=-1) @ v


@spells(PLAIN, *QKV)
def number_times_scores(q, k, v):
    return torch.softmax(0.25 * torch.matmul(q, k.transpose(-2, -1)), dim=-1) @ v


@spells(PLAIN, *QKV)
def div_scores_by_sqrt(q, k, v):
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    return torch.matmul(F.softmax(scores, dim=-1), v)


@spells(PLAIN, *QKV)
def div_scores_by_int(q, k, v):
    return (q @ k.mT / 4).softmax(-1) @ v


@spells("scale=0.125", *QKV)
def div_scores_by_int_8(q, k, v):
    return (q @ k.mT / 8).softmax(-1) @ v


@spells(PLAIN, *QKV)
def div_scores_by_float(q, k, v):
    return (q @ k.mT / 4.0).softmax(-1) @ v


@spells(PLAIN, *QKV)
def power_of_shape(q, k, v):
    return F.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


@spells(PLAIN, *QKV)
def power_of_size_method(q, k, v):
    return F.softmax((q @ k.mT) * (k.size(-1) ** (-0.5)), dim=-1) @ v


@spells(PLAIN, *QKV)
def div_by_root(q, k, v):
    return F.softmax(q @ k.mT / q.size(-1) ** 0.5, dim=-1) @ v


@spells(PLAIN, *QKV)
def torch_mul_function(q, k, v):
    return F.softmax(torch.mul(q @ k.mT, 0.25), dim=-1) @ v


@spells(PLAIN, *QKV)
def torch_div_function(q, k, v):
    return F.softmax(torch.div(q @ k.mT, 4.0), dim=-1) @ v


@spells(PLAIN, *QKV)
def on_q(q, k, v):
    q = q * 0.25
    return F.softmax(q @ k.mT, dim=-1) @ v


@spells(PLAIN, *QKV)
def div_q(q, k, v):
    return F.softmax((q / math.sqrt(q.shape[-1])) @ k.mT, dim=-1) @ v


@spells(PLAIN, *QKV)
def div_q_by_int(q, k, v):
    return F.softmax((q / 4) @ k.mT, dim=-1) @ v


@spells(PLAIN, *QKV)
def on_k(q, k, v):
    return F.softmax(q @ (k * 0.25).mT, dim=-1) @ v


@spells(PLAIN, *QKV)
def on_k_after_transpose(q, k, v):
    return F.softmax(q @ (k.transpose(2, 3) * 0.25), dim=-1) @ v


@spells(PLAIN, *QKV)
def half_on_q_half_on_k(q, k, v):
    return F.softmax((q * 0.5) @ (k * 0.5).mT, dim=-1) @ v


@spells(PLAIN, *QKV)
def fourth_root_on_both(q, k, v):
    root = math.sqrt(math.sqrt(q.size(-1)))
    return F.softmax((q / root) @ (k / root).transpose(-1, -2), dim=-1) @ v


@spells(PLAIN, *QKV)
def fourth_root_before_permute(q, k, v):
    root = 1 / math.sqrt(math.sqrt(q.size(-1)))
    weight = (q * root) @ (k.permute(0, 1, 3, 2) * root)
    return torch.softmax(weight.float(), dim=-1).type(weight.dtype) @ v


@spells(PLAIN, *QKV)
def on_q_and_scores(q, k, v):
    return F.softmax((q * 0.5) @ k.mT / 2, dim=-1) @ v


@spells(PLAIN, *QKV)
def twice_on_scores(q, k, v):
    return F.softmax(q @ k.mT * 2.0 / 8.0, dim=-1) @ v


@spells(PLAIN, "BMHD", "BNHD", "BNHD")
def on_q_before_transpose(q, k, v):
    q = (q * q.shape[-1] ** -0.5).transpose(1, 2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return (F.softmax(q @ k.transpose(-1, -2), dim=-1) @ v).transpose(1, 2)


@spells(PLAIN, "BMC", "BNC", "BNC")
def on_q_before_heads(q, k, v):
    B, M, C = q.shape
    q = (q * 0.25).view(B, M, 6, 16).transpose(1, 2)
    k = k.view(B, -1, 6, 16).transpose(1, 2)
    v = v.view(B, -1, 6, 16).transpose(1, 2)
    return (F.softmax(q @ k.mT, dim=-1) @ v).transpose(1, 2).reshape(B, M, C)


@spells("scale=1", *QKV)
def none(q, k, v):
    return F.softmax(q @ k.mT, dim=-1) @ v


@spells("scale=1", *QKV)
def one(q, k, v):
    return F.softmax(q @ k.mT * 1.0, dim=-1) @ v


@spells("scale=-0.25", *QKV)
def negative(q, k, v):
    return F.softmax(-(q @ k.mT) / 4, dim=-1) @ v


@spells(PLAIN, *QKV)
def twice_negated(q, k, v):
    return F.softmax(-(-q @ k.mT) * 0.25, dim=-1) @ v


@spells(None, *QKV)
def tensor_root(q, k, v):
    d_k = torch.tensor(q.size(-1), dtype=q.dtype)
    return F.softmax(q @ k.mT / torch.sqrt(d_k), dim=-1) @ v


@spells(None, *QKV)
def constant_tensor(q, k, v):
    return F.softmax(q @ k.mT * torch.tensor(0.25, dtype=q.dtype), dim=-1) @ v


@spells(LEARNED, *QKV, "positive:H11")
def learned_per_head_on_scores(q, k, v, g):
    return F.softmax(q @ k.mT * g, dim=-1) @ v


@spells(LEARNED, *QKV, "positive:H")
def learned_per_head_viewed(q, k, v, g):
    return F.softmax(q @ k.mT * g.view(1, -1, 1, 1), dim=-1) @ v


@spells("scale=1", *QKV, "positive:H11")
def learned_per_head_on_q(q, k, v, g):
    return F.softmax((q * g) @ k.mT, dim=-1) @ v


@spells((Means("scale=0.25; score = s/slope[h]"), PLAIN), *QKV, "positive:H11")
def learned_temperature_per_head(q, k, v, temperature):
    return F.softmax(q @ k.mT / 4 / temperature, dim=-1) @ v


@spells(None, *QKV, "positive:1")
def learned_scalar(q, k, v, g):
    return F.softmax(q @ k.mT * g, dim=-1) @ v


@spells(None, *QKV, lambda dtype, gen: torch.tensor(0.3, dtype=dtype, requires_grad=True))
def learned_log_scale(q, k, v, log_scale):
    return F.softmax(q @ k.mT * log_scale.exp(), dim=-1) @ v


@spells("scale=0.25", *QKV, 4.0)
def python_argument(q, k, v, divisor):
    return F.softmax(q @ k.mT / divisor, dim=-1) @ v
