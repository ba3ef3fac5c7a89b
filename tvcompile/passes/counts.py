"""Running sums and counts, of integers or of ones and zeros in floats, which programs number places with.

    (one_hot(ids, E).float().cumsum(0) - 1)[p, e]     float32(cumsum(n, p, e) - 1)

In float32 and float64 they are exact as long as they are less than 2 / eps. A cast to a narrower float stays in the
formula: there a count may end as another.
"""

from __future__ import annotations

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from .. import expr as E
from ..expr import BoolCall, Expr
from .movement import Index
from .read import Reader


def counts(e: Expr) -> bool:
    """Does a formula hold a running sum or a count?"""
    return any(E.op_of(x) in ("count", "cumsum") for x in E.walk(e))


def counted(e: Expr) -> bool:
    """Is a number computed from counts, and not only chosen by them?"""
    if E.op_of(e) in ("count", "cumsum"):
        return True
    if E.kind(e) == "bool" or E.op_of(e) in E.OPAQUE:
        return False
    return any(counted(x) for x in E.operands(e) if not isinstance(x, Str))


def integral(e: Expr) -> Expr | None:
    """A formula of numbers that are whole in integers."""
    value, op, args = E.constant(e), E.op_of(e), E.operands(e)
    if value is not None:
        return sympy.Integer(int(value)) if float(value).is_integer() else None
    if E.kind(e) != "float":
        return E.as_int(e)
    if op in ("float32", "float64"):  # a narrower one rounds
        return integral(args[0])
    parts = [x if E.kind(x) == "bool" else integral(x) for x in args] if op in WHOLE else [None]
    if any(x is None for x in parts):
        return None
    return E.where(*parts) if op == "where" else E.apply(op, *parts)


WHOLE = ("where", "add", "sub", "mul", "neg", "clamp_min", "clamp_max", "min", "max")


def as_counted(e: Expr, dtype: torch.dtype) -> Expr:
    """Counts that were computed in floats as those of integers."""
    if dtype == torch.bool:
        table = {}
        for x in e.atoms(BoolCall):
            sides = [integral(y) for y in E.operands(x)] if E.op_of(x) in WHOLE_COMPARED else [None]
            if all(y is not None and counts(x) for y in sides):
                table[x] = WHOLE_COMPARED[E.op_of(x)](*sides)
        return E.substitute(e, table) if table else e
    if not counted(E.operands(e)[0] if E.op_of(e) == "int" else e):
        return e
    inner = E.operands(e)[0] if E.op_of(e) == "int" else e
    whole = integral(inner)
    if whole is None:
        return e
    return E.FloatCall(str(dtype).removeprefix("torch."), whole) if dtype.is_floating_point else whole


WHOLE_COMPARED = {"fle": E.le, "flt": E.lt, "feq": E.eq}


def whole(r: Reader, node: fx.Node, idx: Index, at: int) -> Expr:
    """An element of a tensor as an integer, also where it is one in floats."""
    e = r.read(node, idx, at)
    found = integral(e)
    return E.as_int(e) if found is None else found


def sums_whole(r: Reader, n: fx.Node) -> bool:
    """Does a sum of floats add up ones, zeros and counts, so few that it is exact?"""
    source, dtype = r.arguments(n)["self"], n.meta["val"].dtype
    sizes = r.shape(source)
    one = integral(r.read(source, tuple(r.fresh(s, "p") for s in sizes), r.position[n]))
    if one is None or not (counts(one) or all(E.constant(x) in (0, 1) for x in E.leaves(one))):
        return False
    return all(s.is_Integer and int(s) <= 1 / torch.finfo(dtype).eps for s in sizes)
