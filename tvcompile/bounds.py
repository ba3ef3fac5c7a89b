"""Which (q block, kv block) pairs a keep formula leaves EMPTY, PARTIAL or FULL, by interval arithmetic on formulas.

    ends(kv <= q, ...)  ->  (kv_high <= q_low,  kv_low <= q_high)
                             kept all over       kept somewhere, perhaps

`ends` gives two formulas of a block's first and last positions `q_low q_high kv_low kv_high`, and of what `known` says
of a captured load there. GPU kernels evaluate them for the blocks of one program; `kinds` evaluates them with numpy
for all blocks at once, on float64 arrays that broadcast:

    kinds(keep, {"q": blocks(S_q, M, 1), "kv": blocks(S_kv, N, 0), "b": (0, B-1), ...})   [S_q/M, S_kv/N]

Sound, not complete: what cannot be decided is PARTIAL, never more.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sympy

from . import expr as E
from .expr import Expr

EMPTY, PARTIAL, FULL = 0, 1, 2
Interval = tuple[Any, Any]
UNDECIDED: Interval = (E.FALSE, E.TRUE)
EXACT = float(1 << 50)  # beyond it float64 is no safe home for an integer


def blocks(size: int, step: int, axis: int) -> Interval:
    """First and last position of each block of `step`, along dim -1 (axis 0) or -2 (axis 1)."""
    low: np.ndarray = np.arange(0, size, step, dtype=np.float64)
    high = np.minimum(low + step, size) - 1
    return (low[:, None], high[:, None]) if axis else (low, high)


def kinds(keep: Expr, table: Mapping[Any, Interval]) -> np.ndarray:
    """EMPTY, PARTIAL or FULL for every block; `table`: intervals of names and of captured loads."""
    known = frozenset(x for x in table if not isinstance(x, str))
    points = tuple(
        sorted(x for x in table if isinstance(x, str) and np.ndim(table[x][0]) == 0 and len({*table[x]}) == 1)
    )
    low, high = _placed_ends(keep, known, points)
    values: dict[Expr, Any] = {}
    for key, pair in table.items():
        places = (E.index(key),) if key in points else _names(key) if isinstance(key, str) else _place(key)
        values |= {place: np.asarray(value, np.float64) for place, value in zip(places, pair)}
    try:
        found = [np.asarray(evaluate(e, values), np.int8) for e in (low, high)]
    except OverflowError:
        return np.asarray(PARTIAL, np.int8)
    return np.asarray(found[0] + found[1], np.int8)


@functools.lru_cache(maxsize=4096)
def _placed_ends(keep: Expr, known: frozenset, points: tuple[str, ...]) -> Interval:
    return ends(keep, lambda load: _place(load) if load in known else None, points)


def _place(load: Expr) -> Interval:
    """Names for the least and greatest value of a load in a block."""
    name, *indices = E.operands(load)
    return tuple(E.load(f"{end} {name.name}", E.kind(load), *indices) for end in ("low", "high"))  # type: ignore


def _names(name: str) -> Interval:
    return E.index(f"{name}_low"), E.index(f"{name}_high")


def ends(e: Expr, known: Callable[[Expr], Interval | None], points: tuple[str, ...] = ()) -> Any:
    """(low, high) of a formula over a block, as formulas; None for an integer of which nothing is known.

    known: the interval of a captured load, or None; points: positions of which a block has only one.
    """
    memo: dict[Expr, Any] = {}

    def go(x: Expr) -> Any:
        if x not in memo:
            memo[x] = _ends(x)
        return memo[x]

    def _ends(x: Expr) -> Any:
        if isinstance(x, sympy.Symbol):
            return (x, x) if x.name in points else _names(x.name)
        if E.constant(x) is not None and E.kind(x) != "float":
            return x, x
        op, boolean = E.op_of(x), E.kind(x) == "bool"
        found = None
        if op == "load":
            found = known(x)
        elif boolean or E.kind(x) == "int":
            rule = RULES.get(op) if op is not None else FORMS.get(type(x))
            parts = [None] if rule is None else [go(a) for a in E.operands(x)]
            if None not in parts and rule is not None:
                found = rule(*parts)
        return UNDECIDED if boolean and found is None else found

    return go(e)


def _add(*terms: Interval) -> Interval:
    return sum(t[0] for t in terms), sum(t[1] for t in terms)


def _mul(*factors: Interval) -> Interval:
    product = factors[0]
    for other in factors[1:]:
        product = _times(product, other)
    return product


def _times(a: Interval, b: Interval) -> Interval:
    for (low, high), (x, y) in ((a, b), (b, a)):
        if x == y and x.is_nonnegative:
            return x * low, x * high
        if x == y and (-x).is_nonnegative:
            return x * high, x * low
        if low.is_nonnegative and x.is_nonnegative:
            return low * x, high * y
    corners = [sympy.expand(x * y) for x in a for y in b]
    return functools.reduce(_min, corners), functools.reduce(_max, corners)


def _pow(base: Interval, exponent: Interval) -> Interval | None:
    n = E.constant(exponent[0])
    return _mul(*[base] * n) if n is not None and exponent[0] == exponent[1] and 0 < n < 8 else None


def _min(a: Expr, b: Expr) -> Expr:
    return a if a == b else E.apply("min", a, b)


def _max(a: Expr, b: Expr) -> Expr:
    return a if a == b else E.apply("max", a, b)


def _divisor(b: Interval) -> Expr | None:
    """A divisor of one positive value: a number, or a size."""
    return b[0] if b[0] == b[1] and (b[0].is_positive or isinstance(b[0], sympy.Symbol)) else None


def _floordiv(a: Interval, b: Interval) -> Interval | None:
    if (c := _divisor(b)) is None:
        return None
    return E.floordiv(a[0], c), E.floordiv(a[1], c)


def _mod(a: Interval, b: Interval) -> Interval | None:
    """Python's sign: 0 <= a % c < c; both ends themselves where they lie within one period."""
    if (c := _divisor(b)) is None:
        return None
    same = E.eq(E.floordiv(a[0], c), E.floordiv(a[1], c))
    return E.where(same, E.mod(a[0], c), sympy.Integer(0)), E.where(same, E.mod(a[1], c), c - 1)


def _where(c: Interval, a: Interval, b: Interval) -> Interval:
    surely, never = c[0], E.not_(c[1])
    return tuple(E.where(surely, x, E.where(never, y, pick(x, y))) for x, y, pick in zip(a, b, (_min, _max)))  # type: ignore


def _abs(a: Interval) -> Interval:
    low, high = a
    if low.is_nonnegative:
        return a
    return _max(_max(low, -high), sympy.Integer(0)), _max(high, -low)


def _le(e: Interval) -> Interval:
    zero = sympy.Integer(0)
    return E.le(e[1], zero), E.le(e[0], zero)


def _eq(e: Interval) -> Interval:
    zero = sympy.Integer(0)
    return E.and_(E.eq(e[0], zero), E.eq(e[1], zero)), E.and_(E.le(e[0], zero), E.le(zero, e[1]))


def _each(function: Callable) -> Callable:
    """Functions that are monotone in every operand act on both ends."""

    def rule(*items: Interval) -> Interval:
        return tuple(functools.reduce(function, side) for side in zip(*items))  # type: ignore

    return rule


RULES: dict[str, Callable] = {
    "//": _floordiv,
    "%": _mod,
    "where": _where,
    "abs": _abs,
    "min": _each(_min),
    "max": _each(_max),
    "clamp_max": _each(_min),
    "clamp_min": _each(_max),
    "le": _le,
    "eq": _eq,
}
FORMS: dict[Any, Callable] = {
    sympy.Add: _add,
    sympy.Mul: _mul,
    sympy.Pow: _pow,
    sympy.And: _each(E.and_),
    sympy.Or: _each(E.or_),
    sympy.Not: lambda a: (E.not_(a[1]), E.not_(a[0])),
}


# Evaluation with numpy


def evaluate(e: Expr, values: Mapping[Expr, Any]) -> Any:
    """The value of a formula of integers and booleans. Raises OverflowError beyond EXACT."""
    memo: dict[Expr, Any] = dict(values)

    def go(x: Expr) -> Any:
        if x not in memo:
            value = E.constant(x)
            if value is None:
                function = NUMPY[E.op_of(x) or type(x)]
                value = function(*map(go, E.operands(x)))
            memo[x] = value
            if E.kind(x) == "int" and np.any(np.abs(value) >= EXACT):
                raise OverflowError(f"{x} is too large")
        return memo[x]

    if any(E.kind(x) == "int" and np.any(np.abs(v) >= EXACT) for x, v in memo.items()):
        raise OverflowError("a captured integer is too large")
    return go(e)


def _fold(function: Callable) -> Callable:
    return lambda *values: functools.reduce(function, values)


NUMPY: dict[Any, Callable] = {
    sympy.Add: _fold(operator.add),
    sympy.Mul: _fold(operator.mul),
    sympy.Pow: operator.pow,
    sympy.And: _fold(np.logical_and),
    sympy.Or: _fold(np.logical_or),
    sympy.Not: np.logical_not,
    "//": np.floor_divide,
    "%": np.mod,
    "where": np.where,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "clamp_max": np.minimum,
    "clamp_min": np.maximum,
    "le": lambda e: e <= 0,
    "eq": lambda e: e == 0,
}
