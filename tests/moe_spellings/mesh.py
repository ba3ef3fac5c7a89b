"""Mesh TensorFlow's top-2 with a capacity in every sequence, as PyTorch ports write it: masks in floats, [B,S,E,C]."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import S, moe
from tests.moe_spellings.capacity import Capacity


def greatest(p):
    value, index = p.topk(k=1, dim=-1)
    return value.squeeze(-1), index.squeeze(-1)


def among_more(places, capacity):
    """A one-hot of more places than there are, cut: pairs beyond the last have none."""
    return F.one_hot(places.long(), 3 * S)[..., :capacity]


@moe(three=True, kind="gelu")
@moe(three=True, kind="gelu", order="oi", bias=True, capacity=3, threshold=0.1)
@moe(three=True, own=True, capacity=2)
class MeshTopTwo(Capacity):
    capacity, threshold = 4, 0.0

    def gates(self, x):
        """(weight, expert) of first and of second choices"""
        raw = torch.einsum("...h,eh->...e", x, self.gate.weight).softmax(dim=-1)
        gate_1, index_1 = greatest(raw)
        gate_2, index_2 = greatest(self.without(raw, F.one_hot(index_1, self.count)))
        total = gate_1 + gate_2 + 1e-9
        return (gate_1 / total, index_1), (gate_2 / total, index_2)

    def without(self, raw, first):
        return raw * (1.0 - first.to(raw.dtype))

    def before(self, mask):
        """How many earlier tokens of the sequence have an expert."""
        return F.pad(mask, (0, 0, 1, 0)).cumsum(dim=-2)[..., :-1, :]

    def taken(self, mask):
        """How many places of an expert first choices have."""
        return mask.sum(dim=-2, keepdim=True)

    def sent(self, combine):
        return combine.bool().to(combine)

    def route(self, x):
        return tuple(torch.stack(each, dim=-1) for each in zip(*self.gates(x)))

    def coefficients(self, x):
        w, ids = self.route(x.reshape(-1, S, x.shape[-1]))
        first, second = F.one_hot(ids, self.count).unbind(-2)
        second = second * (w[..., 1] > self.threshold).unsqueeze(-1)
        kept = (first.cumsum(1) <= self.capacity) * first
        also = (second.cumsum(1) + kept.sum(1, keepdim=True) <= self.capacity) * second
        return (kept * w[..., :1] + also * w[..., 1:]).flatten(0, 1)

    def experts(self, x, ids, w):
        (gate_1, index_1), (gate_2, index_2) = self.gates(x)
        mask_1, mask_2 = (F.one_hot(i, self.count).to(x.dtype) for i in (index_1, index_2))
        if self.threshold:
            mask_2 = mask_2 * (gate_2 > self.threshold).to(x.dtype).unsqueeze(-1)
        place_1 = self.before(mask_1) * mask_1
        mask_1 = mask_1 * (place_1 < float(self.capacity)).to(x.dtype)
        place_2 = (self.before(mask_2) + self.taken(mask_1)) * mask_2
        mask_2 = mask_2 * (place_2 < float(self.capacity)).to(x.dtype)
        combine = 0
        for gate, index, mask, place in ((gate_1, index_1, mask_1, place_1), (gate_2, index_2, mask_2, place_2)):
            kept = mask.sum(dim=-1)
            where = F.one_hot(index, self.count)[..., None] * among_more(place.sum(dim=-1), self.capacity)[..., None, :]
            combine = combine + (gate * kept * kept)[..., None, None] * where
        rows = torch.einsum("bsh,bsec->ebch", x, self.sent(combine))
        y = self.places(rows.reshape(self.count, -1, x.shape[-1])).reshape(rows.shape)
        return torch.einsum("ebch,bsec->bsh", y, combine)


@moe(three=True, kind="relu")
@moe(three=True, order="oi", bias=True, capacity=3)
class MeshTopTwoOtherwise(MeshTopTwo):
    """The running sum less what is counted itself; the second is the greatest that is not masked."""

    def without(self, raw, first):
        return raw.masked_fill(first.bool(), float("-inf"))

    def before(self, mask):
        return mask.cumsum(dim=-2) - mask

    def sent(self, combine):
        return (combine > 0).to(combine.dtype)
