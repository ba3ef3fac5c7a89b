"""Running sums and counts, of integers or of ones and zeros in floats, which programs number places with.

    (one_hot(ids, E).float().cumsum(0) - 1)[p, e]     float32(cumsum(n, p, e) - 1)

Floats hold them exactly up to 2 / eps. In float32 and float64 programs have no more; a cast to a narrower float stays
in the formula where there may be more: there a count may end as another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from .. import expr as E
from ..expr import BoolCall, Expr, IntCall
from .movement import Index, axis
from .read import Reader

COUNTS = ("count", "cumsum", "rank", "rank_of")


def once_asked(question: Callable[[Reader, fx.Node], Any]) -> Callable[[Reader, fx.Node], Any]:
    """What is summed may hold sums itself: each node is asked once."""

    @functools.wraps(question)
    def answer(r: Reader, n: fx.Node) -> Any:
        key = question.__name__, n
        if key not in r.asked:
            r.asked[key] = question(r, n)
        return r.asked[key]

    return answer


def counts(e: Expr) -> bool:
    """Does a formula hold a running sum or a count?"""
    return any(E.op_of(x) in COUNTS for x in E.walk(e))


def counted(e: Expr) -> bool:
    """Is a number computed from counts, and not only chosen by them?"""
    if E.op_of(e) in COUNTS:
        return True
    if E.kind(e) == "bool" or E.op_of(e) in E.OPAQUE:
        return False
    return any(counted(x) for x in E.operands(e) if not isinstance(x, Str))


def integral(r: Reader, e: Expr) -> Expr | None:
    """A formula of numbers that are whole in integers."""
    value, op, args = E.constant(e), E.op_of(e), E.operands(e)
    if value is not None:
        return sympy.Integer(int(value)) if float(value).is_integer() else None
    if E.kind(e) != "float":
        return E.as_int(e)
    if op in ("float32", "float64") or (op in E.CASTS and _holds(r, str(op), args[0])):
        return integral(r, args[0])
    parts = [x if E.kind(x) == "bool" else integral(r, x) for x in args] if op in WHOLE else [None]
    if any(x is None for x in parts):
        return None
    return E.where(*parts) if op == "where" else E.apply(op, *parts)


def _holds(r: Reader, dtype: str, e: Expr) -> bool:
    """Does a narrow float hold every value of an integer formula?"""
    most = _most(r, e)
    return most is not None and most <= 2 / torch.finfo(getattr(torch, dtype)).eps


def _most(r: Reader, e: Expr) -> int | None:
    """A number that the magnitude of a formula of integers never exceeds."""
    value, op = E.constant(e), E.op_of(e)
    if value is not None:
        return math.ceil(abs(value))
    if op in ("count", "cumsum"):
        return _most_of_sum(r, r.nodes[E.operands(e)[0].name])
    if op in E.OPAQUE:
        low, high = r.bounds(e)
        return max(abs(int(low)), abs(int(high))) if low is not None and low.is_Integer and high.is_Integer else None
    parts = [_most(r, x) for x in E.operands(e) if E.kind(x) != "bool"]
    known = [x for x in parts if x is not None]
    if not parts or len(known) < len(parts):
        return None
    if op in ("where", "min", "max", "clamp_min", "clamp_max", "neg", "int", *E.CASTS):
        return max(known)
    if isinstance(e, sympy.Add) or op in ("add", "sub"):
        return sum(known)
    if isinstance(e, sympy.Pow):
        return known[0] ** known[1]
    return math.prod(known) if isinstance(e, sympy.Mul) or op == "mul" else None


@once_asked
def _most_of_sum(r: Reader, n: fx.Node) -> int | None:
    one = _most(r, whole(r, r.arguments(n)["self"], summed(r, n), r.position[n]))
    sizes = _sizes_of_sum(r, n)
    return None if one is None or not all(s.is_Integer for s in sizes) else one * math.prod(map(int, sizes))


def _sizes_of_sum(r: Reader, n: fx.Node) -> list[Expr]:
    """Of the dims that are added up."""
    a = r.arguments(n)
    shape = r.shape(a["self"])
    dims = range(len(shape)) if a.get("dim") in (None, []) else a["dim"]
    return [shape[d] for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])]


WHOLE = ("where", "add", "sub", "mul", "neg", "clamp_min", "clamp_max", "min", "max")


def as_counted(r: Reader, e: Expr, dtype: torch.dtype) -> Expr:
    """Counts that were computed in floats as those of integers."""
    if dtype == torch.bool:
        table = {}
        for x in e.atoms(BoolCall):
            sides = [integral(r, y) for y in E.operands(x)] if E.op_of(x) in WHOLE_COMPARED else [None]
            if all(y is not None and counts(x) for y in sides):
                table[x] = WHOLE_COMPARED[E.op_of(x)](*sides)
        return E.substitute(e, table) if table else e
    if not counted(E.operands(e)[0] if E.op_of(e) == "int" else e):
        return e
    inner = E.operands(e)[0] if E.op_of(e) == "int" else e
    found = integral(r, inner)
    if found is None:
        return e
    return E.FloatCall(str(dtype).removeprefix("torch."), found) if dtype.is_floating_point else found


WHOLE_COMPARED = {"fle": E.le, "flt": E.lt, "feq": E.eq}


def whole(r: Reader, node: fx.Node, idx: Index, at: int) -> Expr:
    """An element of a tensor as an integer, also where it is one in floats."""
    e = r.read(node, idx, at)
    found = integral(r, e)
    return E.as_int(e) if found is None else found


@once_asked
def sums_whole(r: Reader, n: fx.Node) -> bool:
    """Does a sum of floats add up ones, zeros and counts, so few that it is exact?"""
    source, dtype = r.arguments(n)["self"], n.meta["val"].dtype
    one = integral(r, r.read(source, summed(r, n), r.position[n]))
    if one is None or not (counts(one) or all(E.constant(x) in (0, 1) for x in E.leaves(one))):
        return False
    if dtype not in (torch.float32, torch.float64):
        most = _most_of_sum(r, n)
        return most is not None and most <= 2 / torch.finfo(dtype).eps
    sizes = r.shape(source) if counts(one) else _sizes_of_sum(r, n)  # a count may be of any dim
    return all(s.is_Integer and int(s) <= 1 / torch.finfo(dtype).eps for s in sizes)


def running_sum(r: Reader, n: fx.Node, idx: Index) -> Expr:
    """An element of a running sum; where a zero is put before what is summed, the next one less what that adds."""
    d = axis(r.arguments(n)["dim"], len(idx))
    after = (*idx[:d], idx[d] + 1, *idx[d + 1 :])
    if begins_with_zero(r, n) and E.within(after[d], r.shape(n)[d], r.bounds):
        return IntCall("cumsum", Str(n.name), *after) - whole(r, r.arguments(n)["self"], after, r.position[n])
    return IntCall("cumsum", Str(n.name), *idx)


@once_asked
def begins_with_zero(r: Reader, n: fx.Node) -> bool:
    """Is the first of the elements that a running sum adds up zero?"""
    a = r.arguments(n)
    shape = r.shape(a["self"])
    d = axis(a["dim"], len(shape))
    first = tuple(sympy.Integer(0) if i == d else r.fresh(s, "p") for i, s in enumerate(shape))
    return whole(r, a["self"], first, r.position[n]) == 0


def summed(r: Reader, n: fx.Node) -> Index:
    """The place of any element that a sum or a running sum adds up, but of a zero before the others."""
    shape = r.shape(r.arguments(n)["self"])
    at = [r.fresh(s, "p") for s in shape]
    if r.name(n) == "cumsum" and begins_with_zero(r, n):
        d = axis(r.arguments(n)["dim"], len(shape))
        at[d] = r.fresh(sympy.expand(shape[d] - 1), "p") + 1
    return tuple(at)
