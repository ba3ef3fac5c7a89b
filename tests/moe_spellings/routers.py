"""Routers: (block, logits [..., E], x) -> (weights, ids) [..., K], as models write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ROUTERS: dict[str, Callable] = {}


def router(corrected: bool = False):
    """Register; `corrected`: the block has a `correction` [E] that the router adds where it selects."""

    def register(function):
        function.corrected = corrected
        ROUTERS[function.__name__] = function
        return function

    return register


@router()
def softmax_topk(block, logits, x):
    return torch.topk(F.softmax(logits, dim=-1), block.top, dim=-1)


@router()
def renormalised(block, logits, x):
    """Mixtral: the chosen probabilities add up to 1; in float32, cast back."""
    probabilities = F.softmax(logits, dim=-1, dtype=torch.float32)
    w, ids = torch.topk(probabilities, block.top, dim=-1)
    w = w / w.sum(dim=-1, keepdim=True)
    return w.to(x.dtype), ids


@router()
def in_float(block, logits, x):
    """The weights stay in float32: the combine promotes."""
    w, ids = torch.topk(logits.float().softmax(-1), block.top, dim=-1)
    w /= w.sum(dim=-1, keepdim=True) + 1e-20
    return w, ids


@router()
def topk_softmax(block, logits, x):
    """GPT-OSS and Mistral: softmax over the chosen logits."""
    chosen, ids = torch.topk(logits, block.top, dim=-1)
    return F.softmax(chosen, dim=-1), ids


@router()
def sigmoid_topk(block, logits, x):
    w, ids = logits.sigmoid().topk(block.top, sorted=False)
    return w / (w.sum(-1, keepdim=True) + 1e-9), ids


@router(corrected=True)
def grouped(block, logits, x):
    """DeepSeek-V3: a bias selects, unbiased scores weigh, one of two groups, scaled."""
    scores = logits.sigmoid()
    choice = scores + block.correction
    groups = choice.view(-1, 2, block.count // 2)
    best = groups.topk(2, dim=-1)[0].sum(dim=-1).topk(1, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups[..., 0]).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 2, block.count // 2).reshape(-1, block.count)
    ids = torch.topk(choice.masked_fill(~mask.bool(), 0.0), k=block.top, dim=-1, sorted=False)[1]
    w = scores.gather(1, ids)
    w = w / (w.sum(dim=-1, keepdim=True) + 1e-20)
    return w * 2.5, ids


@router()
def log_probabilities(block, logits, x):
    """Weights that are gathered from a log_softmax."""
    logs = F.log_softmax(logits, dim=-1)
    ids = logs.topk(block.top, dim=-1).indices
    return logs.gather(-1, ids).exp(), ids


@router()
def norm_p1(block, logits, x):
    w, ids = logits.softmax(-1).topk(block.top, -1)
    return w / w.norm(p=1, dim=-1, keepdim=True), ids


@router()
def top1(block, logits, x):
    """Switch: the largest probability, keepdim."""
    return logits.softmax(-1).max(dim=-1, keepdim=True)


@router()
def top1_argmax(block, logits, x):
    probabilities = logits.softmax(-1)
    ids = probabilities.argmax(-1, keepdim=True)
    return probabilities.gather(-1, ids), ids


@router()
def top1_sigmoid(block, logits, x):
    """Llama 4."""
    best, ids = logits.topk(1, dim=-1)
    return best.sigmoid(), ids


@router()
def sorted_softmax(block, logits, x):
    w, ids = torch.sort(logits.softmax(-1), dim=-1, descending=True)
    return w[..., : block.top], ids[..., : block.top]


@router()
def argmax_twice(block, logits, x):
    """GShard: the second choice is the best of what is left."""
    probabilities = logits.softmax(-1)
    first = probabilities.argmax(-1)
    left = probabilities.masked_fill(F.one_hot(first, block.count).bool(), float("-inf"))
    ids = torch.stack([first, left.argmax(-1)], -1)
    w = probabilities.gather(-1, ids)
    return w / w.sum(-1, keepdim=True), ids


@router()
def max_twice(block, logits, x):
    """PhiMoE: choices found one by one and joined."""
    best, first = logits.max(-1, keepdim=True)
    second = logits.scatter(-1, first, float("-inf")).max(-1)[1].unsqueeze(-1)
    ids = torch.concat((first, second), dim=-1)
    return logits.softmax(-1).gather(-1, ids), ids


@router()
def sigmoid_each(block, logits, x):
    best, ids = logits.topk(block.top, dim=-1)
    return best.sigmoid(), ids


@router()
def skipping(block, logits, x):
    """Zaya: one class more than there are experts, which computes nothing."""
    w, ids = torch.cat([logits, logits[..., :1] / 2], -1).softmax(-1).topk(block.top, dim=-1)
    skipped = ids == block.count
    return w.masked_fill(skipped, 0), ids.masked_fill(skipped, 0)


@router()
def clamped(block, logits, x):
    """Expert parallelism: what other ranks have lies beyond the last expert here."""
    w, ids = torch.cat([logits, logits / 2], -1).softmax(-1).topk(block.top, dim=-1)
    return torch.where(ids < block.count, w, 0.0), ids.clamp(0, block.count - 1)
