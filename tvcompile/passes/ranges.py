"""Which integers a formula can be: (low, high) in terms of sizes, None where nothing is known.

    q // 64: 0 .. (S - 1) // 64        min(max(i, 0), E - 1): 0 .. E - 1        where(i = E, 0, i): 0 .. E - 1

The last holds where i is in 0 .. E: in the branches of a choice its condition is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import sympy

from .. import expr as E
from ..expr import Expr

Range = tuple[Expr | None, Expr | None]
Fact = tuple[Expr, bool]  # a comparison, and whether it holds
ANY: Range = (None, None)
ZERO = sympy.Integer(0)
ONE: Range = (sympy.Integer(1), sympy.Integer(1))


Known = Callable[[Expr], Range | None]
Memo = dict[tuple[Expr, tuple[Fact, ...]], Range]


def interval(e: Expr, known: Known, memo: Memo, facts: tuple[Fact, ...] = ()) -> Range:
    """known: the range of a position or of what is read from a tensor, None of anything else, as of a size."""
    if (e, facts) not in memo:
        found = known(e)
        if found is None:
            found = _computed(e, known, lambda x, more=(): interval(x, known, memo, (*facts, *more)))
        memo[e, facts] = _narrowed(e, found, known, facts)
    return memo[e, facts]


def fixed(e: Expr, known: Known) -> bool:
    """Is a formula one of sizes alone?"""
    return not e.atoms(*E.CALLS) and all(known(x) is None for x in e.free_symbols)


def _computed(e: Expr, known: Known, of: Callable[..., Range]) -> Range:
    op, args = E.op_of(e), E.operands(e)
    if fixed(e, known):
        return e, e
    if isinstance(e, sympy.Add):
        lows, highs = zip(*map(of, e.args))
        return _sum(lows), _sum(highs)
    if isinstance(e, sympy.Mul):
        return _product(e, known, of)
    if op == "//":
        return _quotient(args[0], args[1], of)
    if op == "%" and E.at_most(1, args[1]):
        return ZERO, args[1] - 1
    if op == "where" and E.kind(e) == "int":
        (low, high), (lower, higher) = of(args[1], _facts(args[0], True)), of(args[2], _facts(args[0], False))
        return _least(low, lower), _greatest(high, higher)
    if op in ("clamp_min", "max", "clamp_max", "min") and E.kind(e) == "int":
        (low, high), (lower, higher) = map(of, args)
        if op in ("clamp_min", "max"):
            return _greatest(low, lower, one=True), _greatest(high, higher)
        return _least(low, lower), _least(high, higher, one=True)
    return ANY


def _sum(parts: tuple[Expr | None, ...]) -> Expr | None:
    return None if None in parts else sympy.expand(sum(p for p in parts if p is not None))


def _product(e: Expr, known: Known, of: Callable[..., Range]) -> Range:
    coefficient, rest = e.as_coeff_Mul()
    moving = [f for f in sympy.Mul.make_args(rest) if not fixed(f, known)]
    low, high = functools.reduce(_times, map(of, moving), ONE)
    factor = coefficient * sympy.Mul(*[f for f in sympy.Mul.make_args(rest) if f not in moving])
    low, high = (None if x is None else sympy.expand(x * factor) for x in (low, high))
    return (low, high) if coefficient > 0 else (high, low)


def _times(a: Range, b: Range) -> Range:
    ends = [x * y for x in a for y in b if x is not None and y is not None]
    if len(ends) == 4 and all(x.is_Integer for x in ends):
        return min(ends), max(ends)
    if len(ends) == 4 and all(E.at_most(0, low) for low in (a[0], b[0])):
        return sympy.expand(ends[0]), sympy.expand(ends[3])
    return b if a == ONE else a if b == ONE else ANY


def _quotient(x: Expr, c: Expr, of: Callable[..., Range]) -> Range:
    low, high = of(x)
    if low is None or high is None or not E.at_most(1, c):
        return ANY
    if all(n.is_Integer for n in (low, high, c)):
        return low // c, high // c
    if not E.at_most(0, low):
        return ANY
    times = sympy.cancel((high + 1) / c)  # high may hold sizes
    if sympy.denom(times) == 1:  # (n c - 1) // c
        return ZERO, sympy.expand(times - 1)
    return ZERO, E.floordiv(high, c)


def _least(a: Expr | None, b: Expr | None, one: bool = False) -> Expr | None:
    """The lesser of two bounds; `one`: if a single one is known, that one."""
    if a is None or b is None:
        return (b if a is None else a) if one else None
    return a if E.at_most(a, b) else b if one or E.at_most(b, a) else None


def _greatest(a: Expr | None, b: Expr | None, one: bool = False) -> Expr | None:
    if a is None or b is None:
        return (b if a is None else a) if one else None
    return a if E.at_most(b, a) else b if one or E.at_most(a, b) else None


def _facts(condition: Expr, holds: bool) -> Iterator[Fact]:
    """The comparisons that a condition decides where it holds, or where it does not."""
    if isinstance(condition, sympy.Not):
        yield from _facts(condition.args[0], not holds)
    elif isinstance(condition, sympy.And if holds else sympy.Or):
        for part in condition.args:
            yield from _facts(part, holds)
    elif E.op_of(condition) in ("le", "eq"):
        yield condition, holds


def _narrowed(e: Expr, found: Range, known: Known, facts: tuple[Fact, ...]) -> Range:
    low, high = found
    if not facts or fixed(e, known):
        return found
    for comparison, holds in facts:
        gap = E.operands(comparison)[0]  # gap <= 0, or gap = 0
        for sign in (1, -1):
            other = sympy.expand(e - sign * gap)  # the gap is e - other, or other - e
            if not fixed(other, known):
                continue
            if E.op_of(comparison) == "eq":
                if holds:
                    low, high = other, other
                elif low == other:
                    low = other + 1
                elif high == other:
                    high = other - 1
            elif holds == (sign == 1):  # e <= other, or e < other
                high = _least(high, other if holds else other - 1, one=True)
            else:  # e >= other, or e > other
                low = _greatest(low, other if holds else other + 1, one=True)
    return low, high
