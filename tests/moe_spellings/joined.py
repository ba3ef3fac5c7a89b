"""Results of one expert after the other, joined by torch.cat."""

import torch

from tests.moe_spellings.base import Block, moe


@moe()
@moe(own=True, kind="gelu", bias=True)
class Lists(Block):
    """Lists of results, tokens and weights, each joined by itself."""

    def experts(self, x, ids, w):
        tokens, results, weights = [], [], []
        for e in range(self.count):
            token, k = (ids == e).nonzero(as_tuple=True)
            tokens.append(token)
            weights.append(w[token, k])
            results.append(self.expert(x[token], e))
        y = torch.cat(results) * torch.cat(weights).unsqueeze(1)
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), y)


class Sorted(Block):
    """Pairs in the order of their ids, and results of each expert's rows."""

    def sorted(self, ids):
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        return order, flat[order]

    def masks(self, ids):
        return [ids == e for e in range(self.count)]

    def experts(self, x, ids, w):
        order, ids = self.sorted(ids)
        token = order // self.top
        rows = x[token]
        y = torch.cat([self.expert(rows[m], e) for e, m in enumerate(self.masks(ids))])
        return torch.zeros_like(x).index_add(0, token, y * w.flatten()[order, None])


@moe()
@moe(own=True, bias=True, kind="relu")
class ByMasksOfSorted(Sorted):
    pass


@moe(own=True, kind="gelu")
class ByMasksOfSortedValues(Sorted):
    def sorted(self, ids):
        found = ids.flatten().sort(stable=True)
        return found.indices, found.values
