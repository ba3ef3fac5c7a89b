"""Tokens sorted by expert, one grouped product a projection, and the way back."""

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers transformers::grouped_mm_fallback)
from torch import nn

from tests.moe_spellings.base import Block, T, moe


def grouped_mm(x, weight, offsets):
    """x [N,in], weight [E,in,out]; what transformers calls under compile."""
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, weight, offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offsets)


class Grouped(Block):
    def rows(self, x, ids, offsets):
        """The experts of rows [N,H] sorted by `ids` [N]."""

        def product(x, weight, bias):
            y = grouped_mm(x, weight if self.order == "io" else weight.transpose(-2, -1), offsets)
            return y if bias is None else y + bias[ids]

        return self.mlp(x, product)


@moe()
@moe(order="oi", router="renormalised")
@moe(kind="gpt_oss", layout="interleave", bias=True, router="topk_softmax")
@moe(kind="geglu", layout="separate", router="in_float")
@moe(kind="relu2", router="grouped", order="oi")
@moe(kind="gelu", bias=True)
@moe(count=16, top=8)
@moe(router="argmax_twice")
@moe(router="max_twice", order="oi")
@moe(router="skipping")
@moe(router="clamped", order="oi", bias=True)
class SortHistcInverse(Grouped):
    """transformers' grouped_mm implementation, by hand."""

    def experts(self, x, ids, w):
        w, ids = w.reshape(-1), ids.reshape(-1)
        ids_g, perm = torch.sort(ids)
        x_g, w_g = x[perm // self.top], w[perm]
        counts = torch.histc(ids_g.float(), bins=self.count, min=0, max=self.count - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        out = self.rows(x_g, ids_g, offsets) * w_g.unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0), device=x.device)
        return out[inverse].view(-1, self.top, x.shape[-1]).sum(dim=1).to(x.dtype)


@moe(dtype=torch.bfloat16)
@moe(dtype=torch.bfloat16, kind="swiglu", layout="interleave", order="oi", bias=True)
@moe(dtype=torch.bfloat16, kind="relu", router="topk_softmax")
class ArgsortBincountIndexAdd(Grouped):
    """How many entries bincount gives depends on the ids: only torch._grouped_mm takes that, hence bfloat16."""

    def experts(self, x, ids, w):
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        offsets = torch.bincount(flat, minlength=self.count).cumsum(0).to(torch.int32)
        token = order // self.top
        y = self.rows(x[token], flat[order], offsets) * w.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token, y)


@moe()
@moe(kind="geglu_tanh", order="oi", bias=True)
class TokenTableAndOneHotCounts(Grouped):
    """Which token a pair belongs to is a table; counts are sums of a one-hot; combine out of place."""

    def experts(self, x, ids, w):
        flat, of = ids.view(-1), torch.arange(x.shape[0]).unsqueeze(1).expand(-1, self.top).reshape(-1)
        order = torch.argsort(flat)
        offsets = F.one_hot(flat, self.count).sum(0).cumsum(0, dtype=torch.int32)
        y = self.rows(x.index_select(0, of[order]), flat[order], offsets)
        y = y * w.view(-1).index_select(0, order).unsqueeze(1)
        return torch.zeros_like(x).index_add(0, of[order], y)


@moe()
@moe(kind="swiglu", layout="separate", order="oi")
class RepeatedAndUnsortedByArgsort(Grouped):
    """Tokens repeated K times, then permuted; weighed after they are back."""

    def experts(self, x, ids, w):
        ids_g, order = ids.flatten().sort(stable=True)
        offsets = (ids_g.unsqueeze(0) <= torch.arange(self.count).unsqueeze(1)).sum(1).to(torch.int32)
        y = self.rows(x.repeat_interleave(self.top, dim=0)[order], ids_g, offsets)
        y = y[order.argsort()].view(-1, self.top, x.shape[-1])
        return torch.einsum("tkh,tk->th", y, w)


@moe()
@moe(kind="silu", order="oi")
class ScatteredBackByAssignment(Grouped):
    """searchsorted offsets; out[order] = y; bmm with the weights."""

    def experts(self, x, ids, w):
        ids_g, order = torch.sort(ids.reshape(-1))
        offsets = torch.searchsorted(ids_g, torch.arange(self.count), right=True).int()
        y = self.rows(x[order // self.top], ids_g, offsets)
        back = torch.zeros_like(y)
        back[order] = y
        return torch.bmm(w.unsqueeze(1), back.view(-1, self.top, x.shape[-1])).squeeze(1)


@moe()
@moe(kind="reglu", layout="separate")
class ScatterAdd(Grouped):
    def experts(self, x, ids, w):
        flat = ids.reshape(-1)
        order = flat.argsort()
        counts = torch.zeros(self.count, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
        token = (order // self.top).unsqueeze(-1).expand(-1, x.shape[-1])
        y = self.rows(x.gather(0, token), flat[order], counts.cumsum(0).int()) * w.reshape(-1, 1)[order]
        return torch.zeros_like(x).scatter_add_(0, token, y)


@moe(router="top1", dtype=torch.bfloat16)
@moe(router="top1_argmax", dtype=torch.bfloat16, kind="gelu", bias=True, order="oi")
class TopOneWithoutPairs(Grouped):
    """top-1: the permutation is over tokens; written back by assignment, then weighed."""

    def experts(self, x, ids, w):
        ids_g, order = ids.squeeze(-1).sort()
        offsets = torch.bincount(ids_g, minlength=self.count).cumsum(0).int()
        out = torch.empty_like(x)
        out[order] = self.rows(x[order], ids_g, offsets)
        return out * w

    top = 1


@moe()
class WeighedByInput(Grouped):
    """torchtitan's Llama 4: scores multiply the tokens before the experts."""

    weigh = "input"
    router = "sigmoid_topk"

    def experts(self, x, ids, w):
        order = ids.view(-1).argsort(stable=True)
        counts = torch.histc(ids.view(-1).float(), bins=self.count, min=0, max=self.count)
        offsets = counts.cumsum(0, dtype=torch.int32)
        token = (order // self.top).reshape(-1, 1).expand(-1, x.shape[-1])
        rows = torch.gather(x, dim=0, index=token) * w.view(-1)[order].reshape(-1, 1)
        y = self.rows(rows, ids.view(-1)[order], offsets)
        return torch.zeros(T, x.shape[-1], dtype=x.dtype).scatter_add(0, token, y)


class ByCounts(Grouped):
    """Which row is which token by a division that is no `//`."""

    def counts(self, ids):
        """int [E]: how many of ids [T,K] are e."""
        raise NotImplementedError

    def experts(self, x, ids, w):
        ids_g, order = ids.flatten().sort(dim=0, stable=True)
        token = order.div(self.top, rounding_mode="trunc")
        y = self.rows(x[token], ids_g, self.counts(ids).cumsum(0, dtype=torch.int32)) * w.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, y)


@moe()
class CountsByIndexAdd(ByCounts):
    def counts(self, ids):
        flat = ids.flatten()
        return torch.zeros(self.count, dtype=torch.int64).index_add_(0, flat, torch.ones_like(flat))


@moe(kind="geglu", order="oi")
class CountsByIndexPut(ByCounts):
    def counts(self, ids):
        return torch.zeros(self.count, dtype=torch.int64).index_put_((ids.view(-1),), torch.tensor(1), accumulate=True)


@moe(kind="relu")
class CountsOfAllPairs(ByCounts):
    def counts(self, ids):
        return F.one_hot(ids, self.count).sum((0, 1))


@moe(router="topk_softmax", layout="separate")
class CountsOfASetMatrix(ByCounts):
    """JetMoE: ones are set where a token chose, and its ids differ."""

    def counts(self, ids):
        return torch.zeros(ids.shape[0], self.count).scatter(1, ids, 1).long().sum(0)


@moe(kind="gelu")
class ScatteredBack(Grouped):
    """FastMoE: rows go back to where their pairs were by scatter."""

    def experts(self, x, ids, w):
        ids_g, order = ids.flatten().sort()
        offsets = F.one_hot(ids_g, self.count).sum(0).cumsum(0).int()
        y = self.rows(x[torch.div(order, self.top, rounding_mode="floor")], ids_g, offsets)
        back = torch.zeros_like(y).scatter(0, order[:, None].expand_as(y), y)
        return torch.bmm(w.unsqueeze(1), back.view(-1, self.top, x.shape[-1])).squeeze(1)


@moe()
@moe(kind="geglu", order="oi", bias=True)
class PermutedByAMap(Grouped):
    """Megatron: a map [E,T] of who goes where, whose places are the rows."""

    def experts(self, x, ids, w):
        sent = torch.zeros(x.shape[0], self.count, dtype=torch.int32).scatter(1, ids, 1).bool()
        mask = self.mask(sent)
        token = torch.arange(x.shape[0]).unsqueeze(0).expand(self.count, -1).masked_select(mask)
        expert = torch.arange(self.count)[:, None].expand_as(mask).masked_select(mask)
        probabilities = x.new_zeros(sent.shape).scatter(1, ids, w.to(x.dtype)).T.contiguous()
        probabilities = probabilities.masked_select(self.weighed(mask))
        y = self.rows(x.index_select(0, self.read(token)), expert, self.offsets(sent).to(torch.int32))
        y = y * probabilities[:, None]
        return torch.zeros_like(x).scatter_add(0, token.unsqueeze(1).expand_as(y), y)

    def mask(self, sent):
        return sent.T.contiguous()

    def weighed(self, mask):
        return mask

    def read(self, token):
        return token

    def counts(self, sent):
        return sent.sum(0)

    def offsets(self, sent):
        return self.counts(sent).cumsum(0)


class HashedIds(SortHistcInverse):
    """A table says which experts a token has; their scores are read at them, so that they are numbers of experts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Buffer(torch.randint(self.count, (50, self.top), generator=torch.Generator().manual_seed(1)))

    def numbers(self, x):
        return self.table[torch.arange(len(x), device=x.device) * 7 % 50]


@moe()
class ScoresGathered(HashedIds):
    """DeepSeek-V4's first layers."""

    def route(self, x):
        ids = self.numbers(x)
        w = self.gate(x).softmax(-1).gather(1, ids)
        return w / w.sum(-1, keepdim=True), ids


@moe(kind="gelu", order="oi")
class ScoresSummedUnderAOneHot(HashedIds):
    def route(self, x):
        ids = self.numbers(x)
        chosen = F.one_hot(ids, self.count).to(x.dtype)
        return (chosen * self.gate(x).sigmoid()[:, None]).sum(-1), ids


@moe(count=5)
class NumberedInBytes(ScoresGathered):
    """64 times 4 is 0 in the table's dtype."""

    def __init__(self):
        super().__init__()
        self.table = self.table.to(torch.uint8)

    def numbers(self, x):
        return super().numbers(x).long() * 64 % self.count
