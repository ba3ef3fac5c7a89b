"""Every way to write the softmax."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.base import spells

QKV = ("BHMD", "BHND", "BHND")
PLAIN = "scale=0.25"


@spells(PLAIN, *QKV)
def functional(q, k, v):
    return F.softmax(q @ k.mT / 4, dim=-1) @ v


@spells(PLAIN, *QKV)
def torch_function(q, k, v):
    return torch.softmax(q @ k.mT / 4, dim=-1) @ v


@spells(PLAIN, *QKV)
def method_positive_dim(q, k, v):
    return (q @ k.mT / 4).softmax(3) @ v


@spells(PLAIN, *QKV)
class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.0)

    def forward(self, q, k, v):
        return self.dropout(self.softmax(q @ k.mT / 4)) @ v


@spells(PLAIN, *QKV)
def upcast(q, k, v):
    p = F.softmax(q @ k.mT / 4, dim=-1, dtype=torch.float32).to(q.dtype)
    return p @ v


@spells(PLAIN, *QKV)
def upcast_scores(q, k, v):
    p = torch.softmax((q @ k.mT / 4).float(), dim=-1)
    return p.type_as(q) @ v


@spells(PLAIN, *QKV)
def upcast_q_and_k(q, k, v):
    return (torch.softmax((q.float() @ k.float().mT) / 4, dim=-1).to(v.dtype)) @ v


@spells(PLAIN, *QKV)
def upcast_all(q, k, v):
    return (torch.softmax(q.float() @ k.float().mT / 4, -1) @ v.float()).to(q.dtype)


@spells(PLAIN, *QKV)
def special_softmax(q, k, v):
    return torch.special.softmax(q @ k.mT / 4, dim=-1) @ v


@spells(PLAIN, *QKV)
def log_softmax_exp(q, k, v):
    return F.log_softmax(q @ k.mT / 4, dim=-1).exp() @ v


@spells(PLAIN, *QKV)
def torch_exp_of_log_softmax(q, k, v):
    return torch.exp(torch.log_softmax(q @ k.mT / 4, -1)) @ v


@spells(PLAIN, *QKV)
def exp_and_sum(q, k, v):
    e = torch.exp(q @ k.mT / 4)
    return (e / e.sum(-1, keepdim=True)) @ v


@spells(PLAIN, *QKV)
def exp_and_sum_shifted_amax(q, k, v):
    s = q @ k.mT / 4
    e = (s - s.amax(dim=-1, keepdim=True)).exp()
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@spells(PLAIN, *QKV)
def exp_and_sum_shifted_max_values(q, k, v):
    s = q @ k.mT / 4
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return (e / torch.sum(e, dim=-1, keepdim=True)) @ v


@spells(PLAIN, *QKV)
def exp_and_sum_shifted_max_index(q, k, v):
    s = q @ k.mT / 4
    e = torch.exp(s - torch.max(s, -1, keepdim=True)[0])
    return (e / e.sum(-1).unsqueeze(-1)) @ v


@spells(PLAIN, *QKV)
def shift_detached(q, k, v):
    s = q @ k.mT / 4
    e = torch.exp(s - s.amax(-1, keepdim=True).detach())
    return (e / e.sum(-1, keepdim=True)) @ v


@spells(PLAIN, *QKV)
def softmax_of_shifted(q, k, v):
    s = q @ k.mT / 4
    return F.softmax(s - s.max(-1, keepdim=True).values, dim=-1) @ v


@spells(PLAIN, *QKV)
def divide_after_values(q, k, v):
    """(e @ v) / sum(e): the normalisation after the contraction."""
    s = q @ k.mT / 4
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@spells(PLAIN, *QKV)
def logsumexp_subtracted(q, k, v):
    s = q @ k.mT / 4
    return torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)) @ v


@spells(PLAIN, *QKV)
def reciprocal_of_sum(q, k, v):
    e = torch.exp(q @ k.mT / 4)
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


@spells(PLAIN, *QKV)
def dropout_zero(q, k, v):
    return F.dropout(F.softmax(q @ k.mT / 4, dim=-1), p=0.0) @ v


@spells(PLAIN, *QKV)
def dropout_not_training(q, k, v):
    return F.dropout(F.softmax(q @ k.mT / 4, dim=-1), p=0.1, training=False) @ v


@spells(PLAIN, *QKV)
def upcast_and_dropout_zero(q, k, v):
    w = F.softmax(q @ k.mT / 4, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(w, p=0.0, training=True), v).transpose(1, 2).contiguous()


@spells(PLAIN, *QKV)
class DropoutModuleInEval(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.eval()

    def forward(self, q, k, v):
        return self.dropout(F.softmax(q @ k.mT / 4, -1)) @ v


@spells(PLAIN, *QKV)
def softmax_twice_transposed(q, k, v):
    return F.softmax((q @ k.mT / 4).transpose(-1, -2), dim=-2).transpose(-1, -2) @ v


@spells(PLAIN, *QKV)
def score_shifted_by_row_bias(q, k, v):
    """A constant per row drops out of the softmax; lifted or kept as an edit, both are right."""
    s = q @ k.mT / 4
    return F.softmax(s - s.detach().amax(-1, keepdim=True), dim=-1) @ v
