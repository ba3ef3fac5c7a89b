"""Slices of the rows that a mask chose which are not its first ones, or not the same ones everywhere."""

import torch

from tests.moe_impostors.base import impostor
from tests.moe_spellings.firsts import Firsts


class Slices(Firsts):
    own = True
    kind = "gelu"

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            read, put, weighed = self.slices
            out = out.index_add(0, token[put], self.expert(x[token[read]], e) * w[token, k, None][weighed])
        return out


@impostor("read at computed numbers")
class AllButTheFirst(Slices):
    slices = (slice(2, None),) * 3


@impostor("not all of the rows|not proven")
class TheLast(Slices):
    slices = (slice(-5, None),) * 3


@impostor("not all of the rows")
class AllButTheLast(Slices):
    slices = (slice(None, -1),) * 3


@impostor("not all of the rows|computed numbers")
class EverySecond(Slices):
    slices = (slice(None, None, 2),) * 3


@impostor("not all of the rows|not its tokens|computed numbers|not proven")
class OthersThanItsOwn(Slices):
    """Rows are read from the second on and added from the first on."""

    slices = slice(1, 4), slice(0, 3), slice(0, 3)


@impostor(None)
class FirstAndLast(Slices):
    """As many of the last rows are read as of the first ones, for something else."""

    def experts(self, x, ids, w):
        out, more = torch.zeros_like(x), 0.0
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token[:5], self.expert(x[token[:5]], e) * w[token, k, None][:5])
            more = more + x[token[-5:]].sum()
        return out + more.tanh()


@impostor(None)
class FirstOfTheFirst(Slices):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = (at[:7][:5] for at in torch.where(ids == e))
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, k, None])
        return out
