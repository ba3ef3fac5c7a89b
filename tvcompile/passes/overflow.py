"""Where integers of few bits wrap around, which formulas do not: such a result is a tensor of its own.

arange(300).to(uint8) - 1        (q % 256 - 1) % 256        ids.to(int8) < 300        ids % 256 < 44
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from .ranges import ANY, ZERO, Range

if TYPE_CHECKING:
    from .read import Reader

FEW_BITS = (torch.uint8, torch.int8, torch.int16)
LONG = sympy.Integer(1 << 17)  # what sizes that are not known are taken for
WIDE = (torch.int32, torch.int64)


def range_of_dtype(dtype: torch.dtype) -> Range:
    if dtype not in FEW_BITS:
        return ANY
    info = torch.iinfo(dtype)
    return ZERO + info.min, ZERO + info.max


def fits(r: Reader, e: Expr, dtype: torch.dtype) -> bool:
    """Does a dtype hold all numbers of a formula? Of data in 32 bits and more that is taken for granted."""
    if dtype not in FEW_BITS and dtype not in WIDE:
        return True
    info, (low, high) = torch.iinfo(dtype), r.bounds(e)
    if dtype in FEW_BITS:
        return low is not None and E.at_most(info.min, low) and E.at_most(high, info.max)
    ends = [E.substitute(x, dict.fromkeys(x.free_symbols, LONG)) for x in (low, high) if x is not None]
    return not any(x.is_Integer and not info.min <= x <= info.max for x in ends)


def wraps_a_scalar(node: fx.Node) -> bool:
    """May a number beside a tensor of few bits, which is cast to its dtype, be none that it holds?"""
    tensors = [x.meta["val"] for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
    numbers = [x for x in (*node.args, *node.kwargs.values()) if type(x) is int]
    for narrow in {t.dtype for t in tensors if t.dtype in FEW_BITS}:
        info = torch.iinfo(narrow)
        unknown = any(t.dim() == 0 and t.dtype in WIDE for t in tensors) or len(tensors) < len(node.all_input_nodes)
        if unknown or any(not info.min <= x <= info.max for x in numbers):
            return True
    return False
