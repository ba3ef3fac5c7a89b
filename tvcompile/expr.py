"""Expr: a formula over index positions, one score and captured tensors, on sympy.

Integers are sympy's own (exact): `q - kv + 3`. Everything whose value depends on rounding, or that
sympy would rewrite by rules of the reals, is one uninterpreted call, evaluated as written:

    IntCall("//", q, 64)          integer valued      q//64
    FloatCall("tanh", s)          float valued        tanh(s)
    BoolCall("le", kv - q)        boolean             kv <= q       (le: e <= 0, eq: e == 0)
    *Call("load", "pad", b, kv)   a captured tensor   pad[b, kv]

The functions of this module (`add`, `where`, `le`, ...) are the only way to build them: they fold
constants and bring comparisons to one form, so that equal masks are equal objects.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import sympy
from sympy.core.symbol import Str

from .terms import (
    CALL_OF_KIND as CALL_OF_KIND,
    CALLS as CALLS,
    FALSE as FALSE,
    FLOATS as FLOATS,
    GATE as GATE,
    KV as KV,
    TRUE as TRUE,
    UP as UP,
    B as B,
    BoolCall as BoolCall,
    Expr as Expr,
    FloatCall as FloatCall,
    H as H,
    IntCall as IntCall,
    Q as Q,
    S as S,
    at_most as at_most,
    constant as constant,
    floordiv as floordiv,
    index as index,
    kind as kind,
    load as load,
    loads as loads,
    mentions as mentions,
    mod as mod,
    number as number,
    op_of as op_of,
    operands as operands,
    raised as raised,
    recombine as recombine,
    sides as sides,
    split_multiple as split_multiple,
    walk as walk,
    within as within,
)

# Booleans


def le(a: Expr, b: Expr) -> Expr:
    """a <= b for integers, as e <= 0; other kinds keep the comparison as written."""
    if "float" in (kind(a), kind(b)):
        return compare_float("le", a, b)
    if kind(a) == kind(b) == "bool":
        return or_(not_(a), b)
    if is_choice(a, b):
        return choose(le, a, b)
    e = sympy.expand(as_int(a) - as_int(b))
    if isinstance(e, sympy.Integer):
        return TRUE if e <= 0 else FALSE
    for term in sympy.Add.make_args(e):
        sign, magnitude = term.as_coeff_Mul()
        if op_of(magnitude) == "abs" and abs(sign) == 1:
            (x,), rest = operands(magnitude), e - term
            return (and_ if sign > 0 else or_)(*(le(rest + sign * y, sympy.Integer(0)) for y in (x, -x)))
    content, e = _divide_content(e)
    return BoolCall("le", e)


def _divide_content(e: Expr) -> tuple[int, Expr]:
    """2*q - 2*kv - 3 <= 0 is q - kv - 1 <= 0."""
    coefficients = [t.as_coeff_Mul() for t in sympy.Add.make_args(e)]
    factors = [int(c) for c, rest in coefficients if rest != 1 and c.is_Integer]
    g = functools.reduce(math.gcd, factors, 0)
    if g <= 1 or len(factors) != sum(rest != 1 for _, rest in coefficients):
        return 1, e
    free = sum((c * rest for c, rest in coefficients if rest != 1), sympy.Integer(0))
    const = int(sum((c for c, rest in coefficients if rest == 1), sympy.Integer(0)))
    return g, free / g - (-const // g)


def lt(a: Expr, b: Expr) -> Expr:
    if "float" in (kind(a), kind(b)):
        return compare_float("lt", a, b)
    return and_(not_(a), b) if kind(a) == kind(b) == "bool" else le(as_int(a) + 1, b)


def eq(a: Expr, b: Expr) -> Expr:
    if kind(a) == "bool" and kind(b) == "bool":
        return or_(and_(a, b), and_(not_(a), not_(b)))
    if "float" in (kind(a), kind(b)):
        return compare_float("eq", a, b)
    a, b = as_int(a), as_int(b)
    if is_choice(a, b):
        return choose(eq, a, b)
    e = sympy.expand(a - b)
    if isinstance(e, sympy.Integer):
        return TRUE if e == 0 else FALSE
    rest, chosen = e.as_coeff_Add()
    if op_of(chosen) == "where" and any(x.is_Integer for x in operands(chosen)[1:]):
        c, x, y = operands(chosen)
        return or_(and_(c, eq(x, -rest)), and_(not_(c), eq(y, -rest)))
    return BoolCall("eq", -e if e.could_extract_minus_sign() else e)


def compare_float(op: str, a: Expr, b: Expr) -> Expr:
    if is_choice(a, b):
        return choose(lambda x, y: compare_float(op, x, y), a, b)
    x, y = constant(a), constant(b)
    if x is not None and y is not None:
        return number({"le": x <= y, "lt": x < y, "eq": x == y}[op])
    return BoolCall("f" + op, a, b)


def and_(*args: Expr) -> Expr:
    """All of them; what another part already says leaves."""
    before = sympy.And(*args)
    e = _prune(before)
    if isinstance(e, sympy.Or):
        return or_(*e.args)
    return e if e == before else and_(e)


def or_(*args: Expr) -> Expr:
    """Any of them; what another part already says leaves."""
    before = sympy.Or(*args)
    if not isinstance(before, sympy.Or):
        return before
    pruned = _prune(sympy.And(*(not_(a) for a in before.args)))
    e = sympy.Or(*(not_(a) for a in (pruned.args if isinstance(pruned, sympy.And) else [pruned])))
    return e if e == before else or_(e)


def _prune(e: Expr) -> Expr:
    """a & (~a | x) is a & x; of linear bounds that differ by a constant the tighter one stays."""
    if not isinstance(e, sympy.And):
        return e
    bounds, known, redundant = [a for a in e.args if op_of(a) == "le"], set(e.args), set()
    for i, a in enumerate(bounds):
        for b in bounds[i + 1 :]:
            x, y = operands(a)[0], operands(b)[0]
            if (total := sympy.expand(x + y)).is_Integer and total > 0:
                return FALSE
            if (gap := sympy.expand(x - y)).is_Integer:
                redundant.add(b if gap >= 0 else a)
    parts = []
    for a in e.args:
        if isinstance(a, sympy.Or):
            a = sympy.Or(*(x for x in a.args if not_(x) not in known))
        if a not in redundant:
            parts.append(a)
    return e if len(parts) == len(e.args) and set(parts) == known else sympy.And(*parts)


def not_(a: Expr) -> Expr:
    if a in (TRUE, FALSE):
        return sympy.Not(a)
    if isinstance(a, (sympy.And, sympy.Or)):
        return (sympy.Or if isinstance(a, sympy.And) else sympy.And)(*(not_(x) for x in a.args))
    if op_of(a) == "le":
        return le(1 - operands(a)[0], sympy.Integer(0))
    return sympy.Not(a)


# Any kind


def as_int(e: Expr) -> Expr:
    if kind(e) == "bool":
        return where(e, sympy.Integer(1), sympy.Integer(0))
    if kind(e) == "float":
        value = constant(e)
        return sympy.Integer(int(value)) if value is not None and math.isfinite(value) else IntCall("int", e)
    return e


def as_bool(e: Expr) -> Expr:
    if kind(e) == "bool":
        return e
    if op_of(e) == "where":
        c, a, b = operands(e)
        return or_(and_(c, as_bool(a)), and_(not_(c), as_bool(b)))
    if isinstance(e, sympy.Mul) and all(map(_is_digit, e.args)):
        return and_(*map(as_bool, e.args))
    return not_(eq(e, number(0.0) if kind(e) == "float" else sympy.Integer(0)))


def _is_digit(e: Expr) -> bool:
    """Is an integer formula 0 or 1 everywhere, a condition as a number?"""
    return op_of(e) == "where" and set(operands(e)[1:]) <= {sympy.Integer(0), sympy.Integer(1)}


def as_float(e: Expr, dtype: str = "float32") -> Expr:
    """Cast to a float dtype. Casts between floats of data leave; of pure index formulas they stay."""
    if kind(e) == "bool":
        return where(e, number(1.0), number(0.0))
    value = constant(e)
    if value is not None:
        return number(float(value))
    if is_choice(e):
        return choose(as_float, e)
    if kind(e) == "int":
        return FloatCall(dtype, e)
    return e


def where(c: Expr, a: Expr, b: Expr) -> Expr:
    if c is TRUE or a == b:
        return a
    if c is FALSE:
        return b
    kinds = {kind(a), kind(b)}
    if kinds == {"bool"}:
        return _either(c, a, b)
    if "float" in kinds:
        return FloatCall("where", c, as_float(a), as_float(b))
    return IntCall("where", c, as_int(a), as_int(b))


def _either(c: Expr, a: Expr, b: Expr) -> Expr:
    """c & a | ~c & b, in which a part that both have appears once: masks that are set step by step stay short."""
    for join, other in ((sympy.Or, and_), (sympy.And, or_)):
        left, right = (set(x.args if isinstance(x, join) else [x]) for x in (a, b))
        shared, neither = left & right, FALSE if join is sympy.Or else TRUE
        if shared or neither in (a, b):
            joined = or_ if join is sympy.Or else and_
            pieces = [joined(*(left - shared)), joined(*(right - shared))]
            conditions = (c, not_(c)) if join is sympy.Or else (not_(c), c)
            return joined(*shared, *(other(x, y) for x, y in zip(conditions, pieces)))
    return or_(and_(c, a), and_(not_(c), b))


def leaves(e: Expr) -> list[Expr]:
    """The values that nested choices end in."""
    if op_of(e) != "where":
        return [e]
    _, a, b = operands(e)
    return leaves(a) + leaves(b)


def is_choice(*args: Expr) -> bool:
    """Is something chosen, and everything chosen a constant? where(c, 1, 0) against 0."""
    ends = [leaves(a) for a in args]
    count = math.prod(len(x) for x in ends)
    return 1 < count <= 8 and all(constant(x) is not None for end in ends for x in end)


def choose(make: Callable, *args: Expr) -> Expr:
    """`make` of constants under every choice of the operands."""
    for i, a in enumerate(args):
        if op_of(a) == "where":
            c, x, y = operands(a)
            branch = [choose(make, *args[:i], z, *args[i + 1 :]) for z in (x, y)]
            return where(c, *branch)
    return make(*args)


FOLD: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b if b else (math.nan if a == 0 else math.copysign(math.inf, a)),
    "neg": lambda a: -a,
    "abs": abs,
    "exp": lambda a: math.exp(a) if a < 700 else math.inf,
    "min": lambda a, b: math.nan if a != a or b != b else min(a, b),
    "max": lambda a, b: math.nan if a != a or b != b else max(a, b),
    "clamp_min": max,
    "clamp_max": min,
    "log": lambda a: math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan),
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)) if a > -700 else 0.0,
    "tanh": math.tanh,
    "erf": math.erf,
    "relu": lambda a: a if a != a else max(a, 0.0),
}
INT_OPS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "//": floordiv,
    "%": mod,
}


def apply(op: str, *args: Expr) -> Expr:
    """A pointwise operation on operands of any kind, with PyTorch's promotion between the kinds."""
    kinds = {kind(a) for a in args}
    to_float = op in ALWAYS_FLOAT or "float" in kinds
    args = tuple((as_float if to_float else as_int)(a) for a in args)
    if not to_float and op in INT_OPS:
        return sympy.expand(INT_OPS[op](*args))
    values = [constant(a) for a in args]
    if op in FOLD and all(v is not None for v in values):
        folded = FOLD[op](*values)
        return number(float(folded)) if to_float else sympy.Integer(folded)
    if op in FOLD and is_choice(*args):
        return choose(lambda *chosen: apply(op, *chosen), *args)
    if to_float:
        return _float(op, *args)
    return IntCall(op, *args)


def _float(op: str, *args: Expr) -> Expr:
    values = [constant(a) for a in args]
    if op in ("add", "sub") and values[1] == 0:
        return args[0]
    if op in ("mul", "div") and values[1] == 1:
        return args[0]
    if op in ("add", "mul") and values[0] is not None:
        return _float(op, args[1], args[0])
    if op in ("add", "mul") and _rank(args[0]) < _rank(args[1]):
        return _float(op, args[1], args[0])
    return FloatCall(op, *args)


def _rank(e: Expr) -> int:
    """Which operand of a commutative operation is written first: the one that holds the score."""
    return 2 if mentions(e, S) or any(op_of(x) == "dot" for x in walk(e)) else 1


ALWAYS_FLOAT = {
    "div", "exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos",
    "softplus", "erf", "expm1", "reciprocal", "floor", "ceil", "round", "trunc",
}  # fmt: skip


# Rewriting


def rebuild(e: Expr, args: tuple[Expr, ...], bounds: Callable | None = None) -> Expr:
    """`e` with new operands, through the constructors, so that it is simplified again."""
    op = op_of(e)
    if op is None:
        if isinstance(e, sympy.Not):
            return not_(*args)
        if isinstance(e, (sympy.Add, sympy.Mul)):
            return recombine(sympy.expand(e.func(*args)))
        return e.func(*args)
    if op in ("//", "%"):
        a, b = args
        return floordiv(a, b, bounds) if op == "//" else mod(a, b, bounds)
    if op in ("le", "eq"):
        return {"le": le, "eq": eq}[op](args[0], sympy.Integer(0))
    if op in ("fle", "flt", "feq"):
        return compare_float(op[1:], *args)
    if op == "where":
        return where(*args)
    if op in CASTS:
        return as_float(args[0], op) if kind(args[0]) != "float" else FloatCall(op, *args)
    if op == "int":
        return as_int(*args)
    if op in OPAQUE:
        return e.func(op, *args)
    return apply(op, *args)


# Calls that stand for elements of a tensor: only their positions are rewritten.
OPAQUE = (
    "load", "dot", "softmax", "dropout", "reduce", "nth", "perm", "inv", "any", "count", "cumsum", "rank", "rank_of",
    "earlier",
)  # fmt: skip
CASTS = ("float16", "bfloat16", "float32", "float64")


def substitute(e: Expr, table: Mapping[Expr, Expr], bounds: Callable | None = None) -> Expr:
    """Replace sub-formulas and simplify upwards."""
    memo: dict[Expr, Expr] = dict(table)

    def go(x: Expr) -> Expr:
        if x in memo:
            return memo[x]
        if not x.args:
            return x
        old = operands(x)
        new = tuple(a if isinstance(a, Str) else go(a) for a in old)
        memo[x] = x if new == old and bounds is None else rebuild(x, new, bounds)
        return memo[x]

    return go(e)
