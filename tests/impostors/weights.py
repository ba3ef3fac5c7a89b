"""More near-misses: what happens to the probabilities, to gradients, to heads and to the mask."""

import torch
import torch.nn.functional as F

from tests.impostors.base import ANY, INF, QKV, SELF, impostor, scores, tril


@impostor(ANY, *QKV)
def top_k_probabilities(q, k, v):
    p = F.softmax(scores(q, k), -1)
    top, index = p.topk(5, dim=-1)
    return torch.zeros_like(p).scatter(-1, index, top) @ v


@impostor(None, *QKV)
def top_k_scores(q, k, v):
    """Scores below the fifth largest are masked: the mask depends on the scores."""
    s = scores(q, k)
    least = s.topk(5, dim=-1).values[..., -1:]
    return s.masked_fill(s < least, INF).softmax(-1) @ v


@impostor("added to another tensor", *QKV, "BHMD")
def sum_with_v_added_to_a_residual(q, k, v, residual):
    """baddbmm adds its first operand."""
    q, k, v, residual = (x.flatten(0, 1) for x in (q, k, v, residual))
    return torch.baddbmm(residual, scores(q, k).softmax(-1), v)


@impostor("added to another tensor", *QKV, "BHMD")
def sum_with_v_scaled_as_it_is_added(q, k, v, residual):
    q, k, v, residual = (x.flatten(0, 1) for x in (q, k, v, residual))
    return torch.baddbmm(residual, scores(q, k).softmax(-1), v, beta=0, alpha=2.0)


@impostor(ANY, *SELF)
def renormalised_after_mask(q, k, v):
    """Equal to masking before, up to eps; not proven."""
    p = F.softmax(scores(q, k), -1) * tril()
    return (p / (p.sum(-1, keepdim=True) + 1e-6)) @ v


@impostor(ANY, *SELF)
def probabilities_masked(q, k, v):
    return (F.softmax(scores(q, k), -1) * tril().to(q.dtype)) @ v


@impostor(ANY, *SELF)
def probabilities_filled_with_zero(q, k, v):
    return F.softmax(scores(q, k), -1).masked_fill(~tril(), 0.0) @ v


@impostor(ANY, *SELF)
def probabilities_filled_with_infinity(q, k, v):
    return F.softmax(scores(q, k), -1).masked_fill(~tril(), INF) @ v


@impostor(None, *SELF, "left:BM")
def empty_rows_zeroed(q, k, v, pad):
    """NaN rows replaced by zero after the softmax."""
    keep = tril() & pad[:, None, None]
    p = scores(q, k).masked_fill(~keep, INF).softmax(-1)
    return torch.nan_to_num(p, 0.0) @ v


@impostor(None, *SELF, "left:BM")
def empty_rows_filled(q, k, v, pad):
    keep = tril() & pad[:, None, None]
    p = scores(q, k).masked_fill(~keep, INF).softmax(-1)
    return p.masked_fill(~keep, 0.0) @ v


@impostor(ANY, *QKV)
def bias_after_softmax(q, k, v):
    return (F.softmax(scores(q, k), -1) + 0.1) @ v


@impostor(None, *QKV, "BHM1")
def row_scaled_after_softmax(q, k, v, g):
    return (F.softmax(scores(q, k), -1) * g) @ v


@impostor(None, *QKV, "N")
def columns_scaled_after_softmax(q, k, v, g):
    return (F.softmax(scores(q, k), -1) * g) @ v


@impostor(None, *QKV, "BHN1")
def values_scaled(q, k, v, g):
    return F.softmax(scores(q, k), -1) @ (v * g)


@impostor(None, *QKV)
def probabilities_squared(q, k, v):
    return F.softmax(scores(q, k), -1).square() @ v


@impostor(None, *QKV)
def probabilities_rounded(q, k, v):
    return F.softmax(scores(q, k), -1).half().to(v.dtype) @ v


@impostor(None, *QKV)
def one_minus_probabilities(q, k, v):
    return (1 - F.softmax(scores(q, k), -1)) @ v


@impostor(None, *QKV)
def probabilities_cumulated(q, k, v):
    return F.softmax(scores(q, k), -1).cumsum(-1) @ v


@impostor(None, *QKV)
def probabilities_flipped(q, k, v):
    return F.softmax(scores(q, k), -1).flip(-1) @ v


@impostor(None, *SELF)
def probabilities_rolled(q, k, v):
    return F.softmax(scores(q, k), -1).roll(1, -1) @ v


@impostor(None, *QKV, "HH")
def talking_heads(q, k, v, w):
    p = F.softmax(scores(q, k), -1)
    return torch.einsum("bhqk,hg->bgqk", p, w) @ v


@impostor(None, *QKV, "HH")
def talking_heads_before(q, k, v, w):
    s = torch.einsum("bhqk,hg->bgqk", scores(q, k), w)
    return F.softmax(s, -1) @ v


@impostor(None, *QKV)
def differential(q, k, v):
    """The difference of two attentions shares one contraction with v."""
    p = F.softmax(scores(q, k), -1) - 0.3 * F.softmax(scores(q.flip(-1), k), -1)
    return p @ v


@impostor(None, *QKV)
def two_score_terms(q, k, v):
    """q k^T + (q k^T)^2: an edit of the score, or refused."""
    s = scores(q, k)
    return F.softmax(s + 0.1 * s * s, -1) @ v


@impostor(None, *SELF)
def two_dot_products(q, k, v):
    """As disentangled attention: q k^T plus k q^T."""
    return F.softmax(scores(q, k) + scores(k, q), -1) @ v


@impostor(None, *SELF)
def relative_keys(q, k, v):
    """As Transformer-XL: q r^T added, a bias that depends on q."""
    r = torch.sin(torch.arange(37).to(q.dtype)[:, None] * torch.arange(16).to(q.dtype))
    return F.softmax(scores(q, k) + torch.einsum("bhqd,kd->bhqk", q, r), -1) @ v


@impostor(None, *SELF)
def shifted_scores(q, k, v):
    return F.softmax(scores(q, k).roll(1, dims=-1), -1) @ v


@impostor(None, "BHMD", "BHMD", "BHMD")
def halves_with_their_own_keys(q, k, v):
    s = torch.cat([scores(q[:, :, :20], k), scores(q[:, :, 20:], k.flip(2))], dim=2)
    return F.softmax(s, -1) @ v


@impostor(None, *QKV)
def softmax_of_a_slice(q, k, v):
    return F.softmax(scores(q, k)[..., :20], -1) @ v[:, :, :20]


@impostor(None, *QKV)
def probabilities_sliced(q, k, v):
    return F.softmax(scores(q, k), -1)[..., :20] @ v[:, :, :20]


@impostor(None, *QKV)
def scores_truncated_to_int(q, k, v):
    return F.softmax((scores(q, k) * 2).int().to(q.dtype), -1) @ v


@impostor(None, *QKV)
def scores_rounded(q, k, v):
    return F.softmax(scores(q, k).round(), -1) @ v


@impostor(None, *QKV)
def scores_detached(q, k, v):
    return F.softmax(scores(q, k).detach(), -1) @ v


@impostor(None, *QKV)
def probabilities_detached(q, k, v):
    return F.softmax(scores(q, k), -1).detach() @ v


@impostor(None, *QKV)
def scores_without_grad(q, k, v):
    with torch.no_grad():
        s = scores(q, k)
    return F.softmax(s, -1) @ v


@impostor(None, *QKV)
def probabilities_without_grad(q, k, v):
    with torch.no_grad():
        p = F.softmax(scores(q, k), -1)
    return p @ v


@impostor(None, *QKV, "MN")
def bias_detached(q, k, v, bias):
    return F.softmax(scores(q, k) + bias.detach(), -1) @ v


@impostor(None, *QKV)
def straight_through(q, k, v):
    """Hard forward, soft backward."""
    p = F.softmax(scores(q, k), -1)
    hard = F.one_hot(p.argmax(-1), 41).to(p.dtype)
    return (hard - p.detach() + p) @ v


@impostor(ANY, *QKV)
def exp_without_sum(q, k, v):
    return (torch.exp(scores(q, k)) / 41) @ v


@impostor(None, *QKV)
def sum_over_the_wrong_dim(q, k, v):
    e = torch.exp(scores(q, k))
    return (e / e.sum(-2, keepdim=True)) @ v


@impostor(None, *QKV)
def sum_of_another_exp(q, k, v):
    s = scores(q, k)
    return (torch.exp(s) / torch.exp(s * 1.5).sum(-1, keepdim=True)) @ v


@impostor(None, *QKV)
def sum_with_an_eps(q, k, v):
    e = torch.exp(scores(q, k))
    return (e / (e.sum(-1, keepdim=True) + 0.37)) @ v


@impostor(None, *QKV)
def normalised_by_its_norm(q, k, v):
    """F.normalize keeps the norm above an eps, which a sum of small numbers may not reach."""
    return F.normalize(torch.exp(scores(q, k)), p=1.0, dim=-1) @ v


@impostor(None, *QKV)
def base_two(q, k, v):
    e = torch.exp2(scores(q, k))
    return (e / e.sum(-1, keepdim=True)) @ v


@impostor(None, *QKV)
def shift_of_another_dim(q, k, v):
    s = scores(q, k)
    return torch.exp(s - s.logsumexp(-2, keepdim=True)) @ v


@impostor(None, "BHMD", "BGND", "BGND")
def heads_repeated_in_turn(q, k, v):
    """k.repeat: q head h reads kv head h % G, not h // R."""
    return F.softmax(scores(q, k.repeat(1, 3, 1, 1)), -1) @ v.repeat(1, 3, 1, 1)


@impostor(None, "BHMD", "BGND", "BGND")
def heads_repeated_differently(q, k, v):
    return F.softmax(scores(q, k.repeat(1, 3, 1, 1)), -1) @ v.repeat_interleave(3, 1)


@impostor(None, "BHMD", "BGND", "BGND")
def heads_grouped_the_other_way(q, k, v):
    q = q.view(4, 3, 2, 37, 16)
    p = F.softmax(q @ k.unsqueeze(1).mT / 4, -1)
    return (p @ v.unsqueeze(1)).view(4, 6, 37, 16)


@impostor(None, *SELF)
def mask_of_positions_and_data(q, k, v):
    """The mask looks at the values of q."""
    keep = (q[..., :1] > 0) | tril()
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@impostor(None, *SELF)
def random_mask(q, k, v):
    keep = torch.rand(37, 37).to(q.device) < 2.0
    return scores(q, k).masked_fill(~keep, INF).softmax(-1) @ v


@impostor(None, *QKV)
def extra_logit_kept(q, k, v):
    """A sink that is not cut off: its probability meets a row of zeros in v."""
    s = torch.cat([scores(q, k), torch.zeros(4, 6, 37, 1, dtype=q.dtype)], -1)
    return F.softmax(s, -1) @ F.pad(v, (0, 0, 0, 1), value=1.0)


@impostor(None, *QKV)
def another_logit_cut(q, k, v):
    """The sink is last, the first is cut off."""
    s = torch.cat([scores(q, k), torch.zeros(4, 6, 37, 1, dtype=q.dtype)], -1)
    return F.softmax(s, -1)[..., 1:] @ v


@impostor(None, *QKV, "N")
def bias_rounded_after_it_is_looked_up(q, k, v, table):
    distance = (torch.arange(37)[:, None] - torch.arange(41)).abs()
    return F.softmax(scores(q, k) + table[distance].bfloat16().to(q.dtype), -1) @ v


# Arguments that change what an operation means


@impostor(ANY, *QKV)
def scores_rounded_to_decimals(q, k, v):
    return scores(q, k).round(decimals=1).softmax(-1) @ v


@impostor(None, *QKV, "N")
def scores_subtracted_with_a_factor(q, k, v, bias):
    """bias - 2 scores"""
    return torch.rsub(scores(q, k), bias, alpha=2).softmax(-1) @ v


@impostor(None, *SELF)
def quotient_of_floats_rounded_down(q, k, v):
    """1.0 // 0.1 is 9, and the floor of 1.0 / 0.1 is 10."""
    steps = torch.arange(37, dtype=q.dtype) // 0.1
    return (scores(q, k) + steps * 0.1).softmax(-1) @ v


@impostor(None, *SELF)
def blocks_truncated(q, k, v):
    """What is truncated is rounded up where the divisor is negative, and where the dividend is."""
    at = torch.arange(37)
    down, around = (torch.div(*pair, rounding_mode="trunc") for pair in ((at, -4), (at - 18, 4)))
    keep = (down[:, None] == down) | (around[:, None] == around)
    return F.softmax(scores(q, k).masked_fill(~keep, float("-inf")), -1) @ v


@impostor(None, *SELF, "N")
def table_whose_padding_gets_no_gradient(q, k, v, table):
    i = torch.arange(37)
    return (scores(q, k) + F.embedding((i[:, None] - i).clamp(0, 7), table[:, None], padding_idx=0)[..., 0]).softmax(
        -1
    ) @ v


@impostor(None, *SELF, "N")
def table_whose_gradient_is_a_mean(q, k, v, table):
    i = (torch.arange(37)[:, None] - torch.arange(37)).clamp(0, 7)
    return (scores(q, k) + F.embedding(i, table[:, None], scale_grad_by_freq=True)[..., 0]).softmax(-1) @ v


@impostor("nan_to_zero", *SELF)
def infinities_of_scores_made_finite(q, k, v):
    """A row that is masked as a whole averages then."""
    below = torch.ones(37, 37, dtype=torch.bool).tril(-1)
    return torch.nan_to_num(scores(q, k).masked_fill(~below, INF)).softmax(-1) @ v


@impostor(ANY, *QKV)
def heads_dropped_as_a_whole(q, k, v):
    return F.dropout2d(scores(q, k).softmax(-1), 0.5, True) @ v


@impostor(None, *SELF)
def mask_of_a_numbers_bits(q, k, v):
    """The bits of 1.0 are not the integer 1."""
    columns = torch.arange(37, device=q.device).float()
    return (scores(q, k) + columns.view(torch.int32) / 2**30).softmax(-1) @ v


CLEARED = "set to zero where their scores are not masked"


@impostor(CLEARED, *SELF)
def cleared_under_another_mask(q, k, v):
    s = scores(q, k).masked_fill(~tril().bool(), -1e9)
    return s.softmax(-1).masked_fill(~torch.ones(37, 37, dtype=torch.bool).tril(-1), 0.0) @ v


@impostor(CLEARED, *SELF)
def cleared_without_a_mask(q, k, v):
    return scores(q, k).softmax(-1).masked_fill(~tril().bool(), 0.0) @ v


@impostor(CLEARED, *SELF, "left:BM")
def cleared_under_one_of_two_masks(q, k, v, pad):
    """A row without kept pairs weighs what only the other mask hides."""
    s = scores(q, k).masked_fill(~tril().bool(), -1e9).masked_fill(~pad[:, None, None, :], -1e9)
    return s.softmax(-1).masked_fill(~pad[:, None, None, :], 0.0) @ v


@impostor("depends on rounding", *SELF, "left:BM")
def cleared_beside_a_term_as_low(q, k, v, pad):
    s = scores(q, k) + (1.0 - pad[:, None, None, :].to(q.dtype).cumsum(-1).clamp(max=1)) * -1e9
    return s.masked_fill(~tril().bool(), -1e9).softmax(-1).masked_fill(~tril().bool(), 0.0) @ v
