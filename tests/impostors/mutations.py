"""Masks that do not commute with what follows, and tensors written between two uses."""

import torch
import torch.nn.functional as F

from tests.impostors.base import ANY, INF, QKV, SELF, impostor, scores, tril


@impostor(None, *SELF, "left:BM")
def fills_that_do_not_commute(q, k, v, pad):
    """-1e9 where padded, then -inf in the future: a padded row keeps its past only."""
    s = scores(q, k).masked_fill(~pad[:, None, None], -1e9)
    return s.masked_fill(~tril(), INF).softmax(-1) @ v


@impostor(None, *SELF, "left:BM")
def fills_that_do_not_commute_reversed(q, k, v, pad):
    s = scores(q, k).masked_fill(~tril(), INF).masked_fill(~pad[:, None, None], -1e9)
    return s.softmax(-1) @ v


@impostor(None, *SELF, "left:BM")
def added_twice(q, k, v, pad):
    """Two finite masks add up: -2e9 below -1e9, so an empty row is not uniform."""
    causal = torch.full((37, 37), -1e9, dtype=q.dtype).triu(1)
    padding = torch.where(pad, 0.0, -1e9).to(q.dtype)
    return F.softmax(scores(q, k) + causal + padding[:, None, None], -1) @ v


@impostor(None, *SELF, "left:BM")
def added_twice_finfo_min(q, k, v, pad):
    """finfo.min twice is -inf, so rows without keys are NaN or not by how many masks hit them."""
    least = torch.finfo(q.dtype).min
    causal = torch.full((37, 37), least, dtype=q.dtype).triu(1)
    padding = torch.zeros(4, 37, dtype=q.dtype).masked_fill(~pad, least)
    return F.softmax(scores(q, k) + causal + padding[:, None, None], -1) @ v


@impostor(ANY, *SELF)
def negative_scale_after_mask(q, k, v):
    s = (q @ k.mT).masked_fill(~tril(), torch.finfo(q.dtype).min) * -0.25
    return s.softmax(-1) @ v


@impostor(None, *SELF)
def zero_scale_after_mask(q, k, v):
    s = scores(q, k).masked_fill(~tril(), -1e9) * 0.0
    return s.softmax(-1) @ v


@impostor(None, *SELF)
def small_scale_after_mask(q, k, v):
    """-1e9 scaled to -1: no mask any more."""
    s = scores(q, k).masked_fill(~tril(), -1e9) * 1e-9
    return s.softmax(-1) @ v


@impostor(None, *SELF)
def softcap_after_mask(q, k, v):
    """tanh makes the -inf a -5."""
    s = scores(q, k).masked_fill(~tril(), INF)
    return (5 * torch.tanh(s / 5)).softmax(-1) @ v


@impostor(None, *SELF)
def mask_of_minus_four(q, k, v):
    return scores(q, k).masked_fill(~tril(), -4.0).softmax(-1) @ v


@impostor(None, *SELF)
def mask_of_plus_infinity(q, k, v):
    return scores(q, k).masked_fill(~tril(), torch.finfo(q.dtype).max).softmax(-1) @ v


@impostor(None, *SELF)
def temperature_of_kv_after_mask(q, k, v):
    s = scores(q, k).masked_fill(~tril(), -1e9)
    return (s / (1.0 + torch.arange(37).to(q.dtype))).softmax(-1) @ v


@impostor(None, *QKV)
def k_mutated_before_its_use(q, k, v):
    k = k * 1
    k.mul_(2)
    return F.softmax(scores(q, k), dim=-1) @ v


@impostor(None, "BHMD", "const:BHND", "const:BHND", train=False)
def k_mutated_between_scores_and_values(q, k, v):
    s = scores(q, k)
    k.mul_(2)
    return F.softmax(s, dim=-1) @ v


@impostor(None, "BHMD", "const:BHND", "const:BHND", train=False)
def v_mutated_between(q, k, v):
    p = F.softmax(scores(q, k), dim=-1)
    v.add_(1)
    return p @ v


@impostor(None, "BHMD", "const:BHND", "const:BHND", train=False)
def v_mutated_after(q, k, v):
    out = F.softmax(scores(q, k), dim=-1) @ v
    v.zero_()
    return out


@impostor(None, "const:BHMD", "const:BHMD", "const:BHMD", train=False)
def view_of_q_mutated_between(q, k, v):
    s = scores(q, k)
    q[:, :, 0].fill_(0.0)
    return F.softmax(s, -1) @ v + q


@impostor(None, *SELF, "const:MM", train=False)
def bias_mutated_between(q, k, v, bias):
    s = scores(q, k) + bias
    bias.zero_()
    return F.softmax(s, -1) @ v


@impostor(None, *SELF, train=False)
def mask_mutated_after(q, k, v):
    mask = tril()
    s = scores(q, k).masked_fill(~mask, INF)
    mask.fill_(True)
    return F.softmax(s, -1) @ v, mask


@impostor(None, *QKV, train=False)
def probabilities_doubled_in_place(q, k, v):
    p = F.softmax(scores(q, k), -1)
    p *= 2
    return p @ v


@impostor(None, *QKV)
def scores_mutated_after_softmax(q, k, v):
    s = (q @ k.mT).detach()
    p = F.softmax(s, -1)
    s.add_(1)
    return p @ v, s


@impostor(None, *QKV)
def copy_of_v_mutated_between(q, k, v):
    """The written tensor is a copy, so that its gradient flows."""
    s = scores(q, k)
    v = v * 1
    v.mul_(2)
    return F.softmax(s, dim=-1) @ v


@impostor(None, *QKV)
def copy_of_k_mutated_between(q, k, v):
    k = k.clone()
    s = scores(q, k)
    k = k.clone()
    k.mul_(2)
    return F.softmax(s, dim=-1) @ v, k


@impostor(None, *SELF, train=False)
def written_through_a_view(q, k, v):
    v = v.clone()
    s = scores(q, k)
    v[:, :, :5] = 0.0
    return F.softmax(s, dim=-1) @ v


@impostor(None, *SELF)
def smallest_number_and_logsumexp(q, k, v):
    """In a row of finfo.min, min + log(S) rounds to min: every weight is 1, not 1 / S."""
    s = scores(q, k).masked_fill(~tril().tril(-1), torch.finfo(q.dtype).min)
    return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v


@impostor(None, *SELF)
def smallest_number_and_shifted_sum(q, k, v):
    """The same with the maximum subtracted is a softmax: the mean."""
    s = scores(q, k).masked_fill(~tril().tril(-1), torch.finfo(q.dtype).min)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@impostor(None, *SELF)
def smallest_number_and_plain_sum(q, k, v):
    """Without the shift it is 0 / 0."""
    s = scores(q, k).masked_fill(~tril().tril(-1), torch.finfo(q.dtype).min)
    e = torch.exp(s)
    return (e / e.sum(-1, keepdim=True)) @ v


@impostor(None, *SELF)
def infinity_and_plain_sum(q, k, v):
    s = scores(q, k).masked_fill(~tril().tril(-1), INF)
    e = torch.exp(s)
    return (e / e.sum(-1, keepdim=True)) @ v


@impostor(None, *SELF)
def sdpa_of_nothing(q, k, v):
    """A mask that is False everywhere gives 0."""
    keep = torch.arange(37) < 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[None, :].expand(37, -1))


@impostor(None, *SELF)
def nothing_attends(q, k, v):
    return scores(q, k).masked_fill(torch.ones(37, 37, dtype=torch.bool), INF).softmax(-1) @ v


@impostor(None, *SELF, "ids:BM")
def documents_compared_to_zero(q, k, v, ids):
    keep = tril() & (ids[:, None, :, None] == ids[:, None, None, :])
    return scores(q, k).masked_fill(keep == 0, INF).softmax(-1) @ v


@impostor(None, *SELF, "left:BM")
def added_and_filled_infinity(q, k, v, pad):
    """An added -inf passes gradients (NaN in an empty row), a filled one does not."""
    s = scores(q, k) + torch.zeros(4, 37, dtype=q.dtype).masked_fill(~pad, INF)[:, None, None]
    return s.masked_fill(~tril(), INF).softmax(-1) @ v
