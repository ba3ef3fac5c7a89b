"""Results that later rows take the place of: the sum of all results is not what is left."""

import torch

from tests.moe_impostors.base import ANY, Loop, impostor
from tests.moe_spellings.base import Block, H
from tests.moe_spellings.conditions import SumOrMore


@impostor(None)
class WeighedByTwoOfThem(Block):
    """A probability that a one-hot of two experts leaves, which are not all."""

    router, top = "top1", 1

    def experts(self, x, ids, w):
        out, probabilities, ids = torch.zeros_like(x), self.gate(x).softmax(-1)[:, :2], ids[:, 0]
        mine = (ids[:, None] == torch.arange(2)).to(x.dtype)
        for e in range(self.count):
            token = (ids == e).nonzero()[:, 0]
            out[token] = self.expert(x[token], e) * (probabilities * mine).sum(1)[token, None]
        return out


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


class ZerosPutEverywhere(Loop):
    """Top-1: every expert's results are put at all tokens, zeros at those of the others: the last expert's are left."""

    top, router = 1, "top1"

    def experts(self, x, ids, w):
        out, every = torch.zeros_like(x), torch.arange(len(x))
        dense = torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w)
        for e in range(self.count):
            out = self.put(out, every, self.weighed(x, dense[:, e, None], e))
        return out

    def put(self, out, every, y):
        return out.index_copy(0, every, y)

    def weighed(self, x, w, e):
        return self.expert(x, e) * w


@impostor(ANY)
class ZerosCopied(ZerosPutEverywhere):
    pass


@impostor(ANY)
class ZerosScattered(ZerosPutEverywhere):
    def put(self, out, every, y):
        return out.scatter(0, every[:, None].expand_as(y), y)


@impostor(ANY)
class ZerosAssigned(ZerosPutEverywhere):
    def put(self, out, every, y):
        return out.index_put((every,), y)


@impostor(ANY)
class ZerosOfZeros(ZerosPutEverywhere):
    """The weight is in what the expert reads; zeros give zeros."""

    def weighed(self, x, w, e):
        return self.expert(x * w, e)


@impostor(ANY)
class PlacesOfOtherIds(ZerosPutEverywhere):
    """Where results are put in the place of tokens other ids than those of the weights say."""

    def experts(self, x, ids, w):
        out = x.clone()
        dense = torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w)
        for e in range(self.count):
            some = ids[:, 0].roll(1) == e
            out[some] = self.weighed(x, dense[:, e, None], e)[some]
        return out


class BufferPerExpert(Loop):
    """Zeros but for the expert's rows, weighed and added: an impostor puts more into it."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            mine = (ids == e).any(-1)
            y = torch.zeros_like(x)
            y[mine] = self.expert(x[mine], e)
            out = out + self.put(y, x, ids, e) * (w * (ids == e)).sum(-1, keepdim=True)
        return out

    def put(self, y, x, ids, e):
        raise NotImplementedError


@impostor(ANY)
class BufferCleared(BufferPerExpert):
    def put(self, y, x, ids, e):
        some = x[:, 0] > 0.3
        y[some] = torch.zeros_like(x)[some]
        return y


@impostor(ANY)
class BufferOfTwoExperts(BufferPerExpert):
    def put(self, y, x, ids, e):
        other = (e + 1) % self.count
        theirs = (ids == other).any(-1)
        y[theirs] = self.expert(x[theirs], other)
        return y


class WeightsByMask(Loop):
    """x[m.any(-1)] beside w[m'], where m' is another mask of as many places."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token = (ids == e).any(-1)
            out[token] += self.expert(x[token], e) * self.chosen(w, ids, e).unsqueeze(-1)
        return out

    def chosen(self, w, ids, e):
        raise NotImplementedError


@impostor(ANY)
class WeightsInOrderOfChoices(WeightsByMask):
    """The weights of all first choices come before those of the second."""

    def chosen(self, w, ids, e):
        return w.t()[(ids == e).t()]


@impostor(ANY)
class WeightsOfTheTokenBefore(WeightsByMask):
    def chosen(self, w, ids, e):
        return w[ids.roll(1, 0) == e]


@impostor(ANY)
class WeightsFromTheLastToken(WeightsByMask):
    def chosen(self, w, ids, e):
        return w[ids.flip(0) == e]


@impostor(ANY, shape=(1, 1, H))
class OneRowAddedTwice(Loop):
    """The only token gets every result twice."""

    times = 2

    def experts(self, x, ids, w):
        out, dense = torch.zeros_like(x), x.new_zeros(1, self.count).scatter(1, ids, w)
        for e in range(self.count):
            out = out.index_put((torch.zeros(self.times).long(),), self.row(x, dense[:, e, None], e), accumulate=True)
        return out

    def row(self, x, w, e):
        return self.expert(x, e) * w


@impostor(ANY, shape=(1, 1, H))
class FeaturesAddedAsRows(OneRowAddedTwice):
    """As many places as there are features, and a result of one dim, which goes to each."""

    times = H

    def row(self, x, w, e):
        return super().row(x, w, e)[0]


@impostor(None)
class ReplacedByARowForAll(Replaced):
    """One expert's row goes to every place."""

    def put(self, out, x, some):
        return out.index_put((some.nonzero()[:, 0],), self.expert(x[:1], 0), accumulate=True)


@impostor(ANY)
class WeightsOfTheFirstPlaces(WeightsByMask):
    """A token may have an expert twice: then there are more weights than rows."""

    def experts(self, x, ids, w):
        return super().experts(x, ids // 2, w)

    def chosen(self, w, ids, e):
        mine = ids == e
        return w[mine][: len(mine.any(-1).nonzero())]


@impostor(ANY)
class SumWithoutTheBase(Loop):
    """scatter_reduce leaves out what was there where something is added: the last expert of a token counts."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            y = self.expert(x[token], e) * w[token, k, None]
            out = out.scatter_reduce(0, token[:, None].expand_as(y), y, "sum", include_self=False)
        return out


class SumsThatDiffer(SumOrMore):
    """The sum without a result is another than the one that it was added to, or more than that is added."""

    kind = "gelu"

    def either(self, ids, e, out, y):
        more, out = self.more(out, y)
        return torch.where((ids == e).any(-1, keepdim=True), more, out)


@impostor(ANY)
class ChangedInBetween(SumsThatDiffer):
    def more(self, out, y):
        more = out + y
        return more, out.mul_(0.5)


@impostor(ANY)
class ChangedAfterwards(SumsThatDiffer):
    def more(self, out, y):
        more = out + y
        more.mul_(0.5)
        return more, out


@impostor(ANY)
class AddedInPlace(SumsThatDiffer):
    """Everywhere, whatever is chosen."""

    def more(self, out, y):
        return out.add_(y), out


@impostor(ANY)
class AddedTwofold(SumsThatDiffer):
    def more(self, out, y):
        return torch.add(out, y, alpha=2), out


@impostor("the results of the experts are added up in too many ways to read")
class TwoToTheExperts(SumsThatDiffer):
    """Whether an expert is chosen, all results before it are in both sums."""

    count, top = 16, 2

    def more(self, out, y):
        return out + y + 1, out + 1


@impostor("a shared expert's result is added in between")
class TheResultOrMore(SumOrMore):
    """Where an expert is not chosen its result takes the place of the sum: each is of all tokens."""

    kind = "gelu"

    def experts(self, x, ids, w):
        results, out = [self.expert(x, e) for e in range(self.count)], torch.zeros_like(x)
        for k in range(self.top):
            for e in range(self.count):
                y = w[:, k, None] * results[e]
                out = torch.where(ids[:, k, None] == e, out + y, y)
        return out
