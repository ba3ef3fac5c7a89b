"""Weights of experts that are computed for each of them, beside weights that are one parameter."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_spellings.base import FF, Block, H, moe


class Computed(Block):
    kind = "gelu"

    def parts_of(self, e):
        down, bias = self.w_down[e], self.b_down[e] if self.bias else 0.0
        return [None, (self.up_of(e), 0.0), (down.mT if self.order == "oi" else down, bias)]

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            hidden = F.gelu(x[token] @ self.up_of(e))
            out = out.index_add(0, token, self.linear(hidden, "down", e) * w[token, k, None])
        return out


@moe()
@moe(order="oi", bias=True)
class Quantized(Computed):
    """Whole numbers times a scale of each column."""

    def __init__(self):
        super().__init__()
        del self.w_up, self.b_up
        self.codes = nn.Buffer(torch.randint(-127, 128, (self.count, H, FF), dtype=torch.int8))
        self.scales = nn.Parameter((torch.rand(self.count, 1, FF) + 0.5) / 127 / H**0.5)

    def up_of(self, e):
        return self.codes[e].to(self.scales.dtype) * self.scales[e]


@moe()
class Adapted(Computed):
    """One weight, and a product of two small ones for each expert."""

    def __init__(self):
        super().__init__()
        del self.w_up
        self.common = nn.Parameter(torch.randn(H, FF) / H**0.5)
        self.a = nn.Parameter(torch.randn(self.count, H, 3) / 3)
        self.b = nn.Parameter(torch.randn(self.count, 3, FF) / 3)

    def up_of(self, e):
        return self.common + self.a[e] @ self.b[e]
