"""The wrong dim, order or formula: softmaxes and contractions that only look like attention."""

import torch
import torch.nn.functional as F

from tests.impostors.base import ANY, CUBE, INF, QKV, SELF, impostor, scores, tril


@impostor("dim", *CUBE)
def softmax_over_batch(q, k, v):
    return F.softmax(scores(q, k), dim=0) @ v


@impostor("dim", *CUBE)
def softmax_over_heads(q, k, v):
    return F.softmax(scores(q, k), dim=1) @ v


@impostor("dim", *CUBE)
def softmax_over_queries(q, k, v):
    return F.softmax(scores(q, k), dim=2) @ v


@impostor("dim", *SELF)
def softmax_over_queries_negative(q, k, v):
    return F.softmax(scores(q, k), dim=-2) @ v


@impostor(ANY, *SELF)
def softmax_over_everything(q, k, v):
    s = scores(q, k)
    return s.flatten(-2).softmax(-1).view_as(s) @ v


@impostor(None, *CUBE)
def k_heads_and_positions_swapped(q, k, v):
    return F.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v


@impostor(None, *CUBE)
def k_not_transposed(q, k, v):
    """q @ k contracts D with S: attention over a k that is given transposed."""
    return F.softmax(q @ k / 4, dim=-1) @ v


@impostor(None, *CUBE)
def k_batch_moved(q, k, v):
    return F.softmax(q @ k.permute(1, 0, 3, 2) / 4, dim=-1) @ v


@impostor(None, *CUBE)
def v_transposed(q, k, v):
    return F.softmax(scores(q, k), dim=-1) @ v.mT


@impostor(ANY, *CUBE)
def probabilities_transposed(q, k, v):
    return F.softmax(scores(q, k), dim=-1).mT @ v


@impostor(ANY, *CUBE)
def v_contracted_over_queries(q, k, v):
    return torch.einsum("bhqk,bhqd->bhkd", F.softmax(scores(q, k), -1), v)


@impostor(ANY, *CUBE)
def v_contracted_over_heads(q, k, v):
    return torch.einsum("bhqk,bhkd->bkqd", F.softmax(scores(q, k), -1), v)


@impostor(None, *CUBE)
def v_of_another_head(q, k, v):
    return torch.einsum("bhqk,bkhd->bhqd", F.softmax(scores(q, k), -1), v)


@impostor(None, "BMC", "BMC", "BMC")
def heads_viewed_without_transpose(q, k, v):
    q, k, v = (x.view(4, 6, 37, 16) for x in (q, k, v))
    return (F.softmax(scores(q, k), dim=-1) @ v).reshape(4, 37, 96)


@impostor("use", *QKV)
def probabilities_returned(q, k, v):
    p = F.softmax(scores(q, k), dim=-1)
    return p @ v, p


@impostor("use", *QKV)
def probabilities_summed_elsewhere(q, k, v):
    p = F.softmax(scores(q, k), dim=-1)
    return p @ v + p.amax(-1, keepdim=True)


@impostor(None, *QKV)
def scores_returned(q, k, v):
    s = scores(q, k)
    return F.softmax(s, dim=-1) @ v, s


@impostor(None, *SELF)
def masked_scores_used_elsewhere(q, k, v):
    s = scores(q, k).masked_fill(~tril(), INF)
    return F.softmax(s, dim=-1) @ v, s.logsumexp(-1)


@impostor(None, *QKV)
def two_values_of_one_probability(q, k, v):
    p = F.softmax(scores(q, k), dim=-1)
    return p @ v, p @ (v * 2).sin()


@impostor(None, *QKV)
def sigmoid(q, k, v):
    return torch.sigmoid(scores(q, k)) @ v


@impostor(None, *QKV)
def relu(q, k, v):
    return F.relu(scores(q, k)) @ v


@impostor(None, *QKV)
def relu_squared_normalised(q, k, v):
    p = F.relu(scores(q, k)) ** 2
    return (p / (p.sum(-1, keepdim=True) + 1e-6)) @ v


@impostor(None, *QKV)
def linear_attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


@impostor(None, *QKV)
def efficient_attention(q, k, v):
    """softmax(q) @ (softmax(k)^T @ v): two softmaxes, neither of a dot product."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@impostor(None, *QKV)
def hard_attention(q, k, v):
    return F.one_hot(scores(q, k).argmax(-1), 41).to(v.dtype) @ v


@impostor(ANY, *QKV)
def double_softmax(q, k, v):
    return F.softmax(F.softmax(scores(q, k), -1), -1) @ v


@impostor(None, *QKV)
def without_scores(q, k, v):
    """A softmax of something that is no dot product."""
    return F.softmax(q.sum(-1, keepdim=True) + k.sum(-1).unsqueeze(-2), -1) @ v


@impostor(None, *QKV)
def distance_scores(q, k, v):
    return F.softmax(-torch.cdist(q, k), -1) @ v


@impostor(None, "BHMN", "BHND")
def given_scores(s, v):
    return F.softmax(s, -1) @ v


@impostor(None, "BHND", "D", "BHND")
def pooling_by_a_learned_vector(x, w, v):
    return (F.softmax(x @ w, -1).unsqueeze(-1) * v).sum(-2)


@impostor(None, *SELF, "ids:M")
def positions_that_count_from_the_end(q, k, v, ids):
    at = torch.arange(37)[ids - 2]
    return scores(q, k).masked_fill(at > torch.arange(37)[:, None], -1e9).softmax(-1) @ v


@impostor(None, *SELF, "ids:M")
def positions_along_a_dim_that_count_from_the_end(q, k, v, ids):
    at = torch.take_along_dim(torch.arange(37), ids - 2, 0)
    return scores(q, k).masked_fill(at > torch.arange(37)[:, None], -1e9).softmax(-1) @ v
