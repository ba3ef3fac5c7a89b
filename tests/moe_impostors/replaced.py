"""Results that later rows take the place of: the sum of all results is not what is left."""

import torch

from tests.moe_impostors.base import ANY, Loop, impostor


class Replaced(Loop):
    """After the loop something is put into some rows of the sum, which an impostor says."""

    def experts(self, x, ids, w):
        return self.put(super().experts(x, ids, w), x, x[:, 0] > 0.3)

    def put(self, out, x, some):
        raise NotImplementedError


@impostor(None)
class ReplacedByZeros(Replaced):
    def put(self, out, x, some):
        out[some] = torch.zeros_like(x)[some]
        return out


@impostor(None)
class ReplacedByANumber(Replaced):
    def put(self, out, x, some):
        out[some] = 0.0
        return out


@impostor(None)
class ReplacedByOneRow(Replaced):
    def put(self, out, x, some):
        out[some] = x[0]
        return out


@impostor(None)
class ReplacedByCopiedZeros(Replaced):
    def put(self, out, x, some):
        return out.index_copy(0, some.nonzero()[:, 0], torch.zeros_like(x)[some])


@impostor(None)
class ReplacedByScatteredZeros(Replaced):
    def put(self, out, x, some):
        return out.scatter(0, some.nonzero().expand(-1, x.shape[1]), torch.zeros_like(x)[some])


@impostor(None)
class ReplacedByFilledZeros(Replaced):
    def put(self, out, x, some):
        return out.index_fill(0, some.nonzero()[:, 0], 0.0)


class ReplacedByTheLast(Loop):
    """Top-1: the last expert's results, zeros for tokens of the others, are put over those of the others."""

    top, router = 1, "top1"

    def experts(self, x, ids, w):
        out, last = torch.zeros_like(x), self.count - 1
        for e in range(last):
            (token,) = torch.where(ids[:, 0] == e)
            out = out.index_add(0, token, self.expert(x[token], e) * w[token])
        return self.put(out, self.expert(x, last) * (w * (ids == last)), ids[:, 0] > 1)

    def put(self, out, y, some):
        raise NotImplementedError


@impostor(ANY)
class ReplacedEverywhere(ReplacedByTheLast):
    def put(self, out, y, some):
        return out.index_copy(0, torch.arange(len(y)), y)


@impostor(ANY)
class ReplacedByAllRows(ReplacedByTheLast):
    def put(self, out, y, some):
        return out.scatter(0, torch.arange(len(y))[:, None].expand_as(y), y)


@impostor(ANY)
class ReplacedInAMask(ReplacedByTheLast):
    def put(self, out, y, some):
        out[some] = y[some]
        return out
