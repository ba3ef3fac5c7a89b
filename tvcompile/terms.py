"""The parts of a formula: calls, index positions, constants, loads, and exact arithmetic on integers.

expr.py, which builds formulas of all kinds from them, hands on every name here: write `expr.floordiv`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import sympy
from sympy.core.symbol import Str
from sympy.logic.boolalg import Boolean

Expr: TypeAlias = Any  # a sympy.Basic, which carries no types
TRUE, FALSE = sympy.true, sympy.false


class IntCall(sympy.Expr):
    is_commutative = True
    is_integer = True

    def __new__(cls, op, *args):
        return sympy.Expr.__new__(cls, Str(op) if isinstance(op, str) else op, *args)


class FloatCall(sympy.Expr):
    is_commutative = True

    def __new__(cls, op, *args):
        return sympy.Expr.__new__(cls, Str(op) if isinstance(op, str) else op, *args)


class BoolCall(Boolean):
    def __new__(cls, op, *args):
        return Boolean.__new__(cls, Str(op) if isinstance(op, str) else op, *args)


CALLS = (IntCall, FloatCall, BoolCall)
CALL_OF_KIND = {"int": IntCall, "float": FloatCall, "bool": BoolCall}


def index(name: str) -> sympy.Symbol:
    """An index position or a size: a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


B, H, Q, KV = (index(n) for n in ("b", "h", "q", "kv"))
S, GATE, UP = (sympy.Symbol(n, real=True) for n in ("s", "g", "u"))  # a score; what an expert activates
FLOATS = (S, GATE, UP)


def op_of(e: Expr) -> Any:
    """The operation of a call, or None for anything else."""
    return e.args[0].name if isinstance(e, CALLS) else None


def operands(e: Expr) -> tuple[Expr, ...]:
    return e.args[1:] if isinstance(e, CALLS) else e.args


def kind(e: Expr) -> str:
    """ "bool", "float" or "int"."""
    if isinstance(e, Boolean) and not isinstance(e, sympy.Symbol):
        return "bool"
    if isinstance(e, (FloatCall, sympy.Float)) or e in FLOATS or e in (sympy.oo, -sympy.oo, sympy.nan):
        return "float"
    return "int"


def number(value: bool | int | float) -> Expr:
    """A constant of the same kind as the Python value."""
    if isinstance(value, bool):
        return TRUE if value else FALSE
    if isinstance(value, int):
        return sympy.Integer(value)
    if math.isinf(value) or math.isnan(value):
        return sympy.nan if math.isnan(value) else (sympy.oo if value > 0 else -sympy.oo)
    return sympy.Float(value + 0.0)


def constant(e: Expr) -> Any:
    """The Python value of a constant, or None."""
    if e is TRUE or e is FALSE:
        return e is TRUE
    if isinstance(e, sympy.Integer):
        return int(e)
    if isinstance(e, sympy.Float) or e in (sympy.oo, -sympy.oo, sympy.nan):
        return float(e)
    return None


def load(name: str, of_kind: str, *idx: Expr) -> Expr:
    return CALL_OF_KIND[of_kind]("load", Str(name), *idx)


def loads(e: Expr) -> list[Expr]:
    """The captured loads of a formula, in a fixed order, inner ones included."""
    found = {c for c in walk(e) if op_of(c) == "load"}
    return sorted(found, key=sympy.default_sort_key)


def walk(e: Expr):
    return sympy.preorder_traversal(e)


def mentions(e: Expr, *symbols: Expr) -> bool:
    return any(x in symbols for x in walk(e))


# Integers


def floordiv(a: Expr, b: Expr, bounds: Callable | None = None) -> Expr:
    """a // b; `bounds(e)` gives (low, high) of an integer formula and lets exact parts leave."""
    if b == 1:
        return a
    if isinstance(a, sympy.Integer) and isinstance(b, sympy.Integer) and b != 0:
        return sympy.Integer(int(a) // int(b))
    whole, rest = split_multiple(a, b)
    if rest == 0:
        return whole
    if bounds is not None and within(rest, b, bounds):
        return whole
    if op_of(rest) == "//" and bounds is not None:
        inner, c = operands(rest)
        return whole + floordiv(inner, c * b, bounds)
    if bounds is not None:
        # (2*t + k) // 14 is t // 7 where k is 0 or 1.
        for g in sorted(
            {abs(int(t.as_coeff_Mul()[0])) for t in sympy.Add.make_args(rest) if t.as_coeff_Mul()[0].is_Integer}
        ):
            larger, small = split_multiple(rest, sympy.Integer(g))
            if g > 1 and larger != 0 and sympy.denom(b / g) == 1 and within(small, sympy.Integer(g), bounds):
                return whole + floordiv(larger, b / g, bounds)
    return whole + IntCall("//", rest, b)


def mod(a: Expr, b: Expr, bounds: Callable | None = None) -> Expr:
    """a % b with Python's sign."""
    if b == 1:
        return sympy.Integer(0)
    if isinstance(a, sympy.Integer) and isinstance(b, sympy.Integer) and b != 0:
        return sympy.Integer(int(a) % int(b))
    _, rest = split_multiple(a, b)
    if rest == 0 or (bounds is not None and within(rest, b, bounds)):
        return rest
    return IntCall("%", rest, b)


def split_multiple(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """(w, r) with a == w*b + r, where w takes every term of a that is visibly a multiple of b."""
    whole, rest = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(a)):
        quotient = term / b
        if quotient.is_Rational or sympy.denom(quotient) != 1:
            steps = quotient if quotient.is_Integer else None
            if steps is None and isinstance(term, sympy.Integer) and isinstance(b, sympy.Integer):
                steps, extra = divmod(int(term), int(b))
                whole, rest = whole + steps, rest + extra
                continue
            if steps is None:
                rest = rest + term
                continue
        whole = whole + quotient
    return whole, rest


def within(e: Expr, size: Expr, bounds: Callable) -> bool:
    low, high = bounds(e)
    return low is not None and high is not None and at_most(0, low) and at_most(high + 1, size)


def at_most(a: Expr | int, b: Expr | int) -> bool:
    """True when a <= b for all sizes: free symbols are sizes, each at least 1."""
    gap = sympy.expand(sympy.sympify(b) - sympy.sympify(a))
    least = sympy.Integer(0)
    for term in sympy.Add.make_args(gap):
        coefficient, rest = term.as_coeff_Mul()
        if rest == 1:
            least += coefficient
        elif coefficient > 0 and rest.is_nonnegative:
            least += coefficient if not rest.atoms(*CALLS) else 0
        elif coefficient > 0 and op_of(rest) in ("//", "%"):
            pass
        else:
            return False
    return bool(least >= 0)


def recombine(e: Expr) -> Expr:
    """c*(x//c) + x%c is x."""
    for term in [t for t in walk(e) if op_of(t) == "%"]:
        x, c = operands(term)
        partner = c * IntCall("//", x, c)
        if isinstance(e, sympy.Add) and term in e.args and sympy.expand(partner) in e.args:
            return recombine(e - sympy.expand(partner) - term + x)
    return e


def sides(call: Expr) -> tuple[str, Expr, Expr]:
    """(le, lt or eq, left, right) with positive terms only: rows against columns, no [M,N] difference.

    a + 1 <= b is a < b, and beside data a + 4 <= b is a + 3 < b: what saturates, as `raised` does, compares right.
    """
    op, terms = str(op_of(call)), sympy.Add.make_args(operands(call)[0])
    negative = [t for t in terms if t.as_coeff_Mul()[0] < 0]
    left, right = sympy.Add(*(t for t in terms if t not in negative)), -sympy.Add(*negative)
    number, rest = left.as_coeff_Add()
    strict = op == "le" and rest != 0 and (number == 1 or (number > 1 and bool(loads(rest))))
    return ("lt", left - 1, right) if strict else (op, left, right)


def raised(op: str, e: Expr) -> tuple[Expr, int] | None:
    """(data, n) where a side of an order is data + n, which must not wrap: positions may be padded with the greatest.

    What stops there is the greatest too, so that equations wrap around, and nothing near it is equal.
    """
    number, rest = e.as_coeff_Add()
    return (rest, int(number)) if op != "eq" and number > 0 and loads(rest) else None
