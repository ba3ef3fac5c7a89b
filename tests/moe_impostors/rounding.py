"""Numbers rounded to bfloat16 on their way through float32 experts, which is part of what the program means."""

import torch

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import Block


class RoundedOnTheWay(Block):
    """A loop over experts, rounded where a subclass says."""

    def rows(self, x, w):
        return x

    def weight(self, w):
        return w

    def up(self, e):
        return self.w_up[e]

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            pre = self.rows(x[token], w[token, k, None]) @ self.up(e)
            out.index_add_(0, token, self.activate(pre) @ self.w_down[e] * self.weight(w[token, k, None]))
        return out


def rounded(x):
    return x.bfloat16().to(x.dtype)


@impostor("rounded to torch.bfloat16")
class RowsRounded(RoundedOnTheWay):
    def rows(self, x, w):
        return rounded(x)


@impostor("rounded to torch.bfloat16")
class WeighedRowsRounded(RoundedOnTheWay):
    def rows(self, x, w):
        return rounded(x * w)

    def weight(self, w):
        return 1


@impostor(None)
class RouterWeightsRounded(RoundedOnTheWay):
    """Weights are computed beside the experts, as they are."""

    def weight(self, w):
        return rounded(w * 1.3)


@impostor(ANY)
class SumsOfRouterWeightsRounded(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            out = out + rounded((w * (ids == e)).sum(-1, keepdim=True)) * self.expert(x, e)
        return out


@impostor(None, mode="infer")
class OneWeightRounded(RoundedOnTheWay):
    def up(self, e):
        return rounded(self.w_up[e])
