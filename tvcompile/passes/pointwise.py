"""Formulas of operations that compute one element from elements: one rule an ATen operation.

    masked_fill(x, m, v)[i] = where(m[i], v, x[i])     arange(n)[i] = i     tril(x)[i, j] = where(j <= i, x[i, j], 0)

A rule gets (reader, arguments by schema name, node, index) and returns a formula, or None where this
use of the operation has none. The reader casts the formula to the node's dtype.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from .. import expr as E
from .activations import ACTIVATIONS, power
from .atoms import ATOM_RULES, ATOMS
from .movement import axis

ZERO = sympy.Integer(0)


def _unary(op: str):
    return lambda r, a, n, idx: E.apply(op, r.operand(a["self"], idx, r.position[n]))


def _binary(op: str):
    def rule(r, a, n, idx):
        x, y = _pair(r, a, n, idx)
        if a.get("alpha", 1) != 1:
            y = E.apply("mul", y, r.scalar(a["alpha"]))
        return E.apply(op, x, y)

    return rule


def _pair(r, a, n, idx):
    here = r.position[n]
    return r.operand(a["self"], idx, here), r.operand(a["exponent" if "exponent" in a else "other"], idx, here)


def _pow(r, a, n, idx):
    return power(*_pair(r, a, n, idx))


def _swapped(op: str):
    def rule(r, a, n, idx):
        x, y = _pair(r, a, n, idx)
        return E.apply(op, y, x if a.get("alpha", 1) == 1 else E.apply("mul", x, r.scalar(a["alpha"])))

    return rule


def _div(r, a, n, idx):
    x, y = _pair(r, a, n, idx)
    mode, low = a.get("rounding_mode"), r.bounds(x)[0] if E.kind(x) == E.kind(y) == "int" else None
    if mode == "floor" or mode == "trunc" and low is not None and E.at_most(0, low) and E.at_most(1, y):
        return _floor_divide(r, a, n, idx)
    return E.apply("div", x, y) if mode is None else None


def _floor_divide(r, a, n, idx):
    x, y = _pair(r, a, n, idx)
    # Of floats it is no floor of a quotient: 1.0 // 0.1 is 9.
    return None if "float" in (E.kind(x), E.kind(y)) else E.floordiv(E.as_int(x), E.as_int(y), r.bounds)


def _remainder(r, a, n, idx):
    x, y = _pair(r, a, n, idx)
    if "float" in (E.kind(x), E.kind(y)):
        return E.apply("remainder", x, y)
    return E.mod(E.as_int(x), E.as_int(y), r.bounds)


def _compare(make):
    def rule(r, a, n, idx):
        x, y = _pair(r, a, n, idx)
        return None if _other_precision(r, n, (x, y)) else make(x, y)

    return rule


def _other_precision(r, n: fx.Node, formulas: tuple) -> bool:
    """Are floats of data compared in a dtype whose rounding a formula in float32 does not have?"""
    loads = [x for e in formulas for x in E.loads(e) if E.kind(x) == "float"]
    held = {getattr(x.meta["val"], "dtype", None) for x in n.all_input_nodes}
    if not loads or not held & {torch.float16, torch.bfloat16, torch.float64}:
        return False
    plain = all(E.op_of(e) == "load" or E.constant(e) is not None for e in formulas)
    dtypes = {getattr(r.nodes[E.operands(x)[0].name[1:]].meta["val"], "dtype", None) for x in loads}
    return torch.float64 in held or not plain or not dtypes <= held


def _logical(make):
    def rule(r, a, n, idx):
        if n.meta["val"].dtype != torch.bool:
            return None
        return make(*(E.as_bool(x) for x in _pair(r, a, n, idx)))

    return rule


def _not(r, a, n, idx):
    is_bool = n.meta["val"].dtype == torch.bool
    return E.not_(E.as_bool(r.operand(a["self"], idx, r.position[n]))) if is_bool else None


def _where(r, a, n, idx):
    if "self" not in a:
        return None
    here = r.position[n]
    c, x, y = (r.operand(a[k], idx, here) for k in ("condition", "self", "other"))
    return E.where(r.truth(E.as_bool(c)), x, y)


def _masked_fill(r, a, n, idx):
    here = r.position[n]
    x, m = r.operand(a["self"], idx, here), r.operand(a["mask"], idx, here)
    value = r.operand(a["value"], (), here)
    return E.where(r.truth(m), E.as_float(value) if E.kind(x) == "float" else value, x)


def _clamp(r, a, n, idx):
    x = r.operand(a["self"], idx, r.position[n])
    for name, op, between in (("min", "clamp_min", "max"), ("max", "clamp_max", "min")):
        if (bound := a.get(name)) is not None:
            # At a tie a tensor gets half of the gradient, a number none.
            of_tensor = isinstance(bound, fx.Node) and isinstance(bound.meta["val"], torch.Tensor)
            x = E.apply(between if of_tensor else op, x, r.operand(bound, idx, r.position[n]))
    return x


def _as_many(r, one, other) -> bool:
    """Have two tensors as many elements, whatever numbers their sizes have?"""
    return sympy.expand(sympy.Mul(*r.shape(one)) - sympy.Mul(*r.shape(other))) == 0


def _to(r, a, n, idx):
    """A cast. One that rounds is part of the formula; the lifting strips it where that is sound."""
    source, dtype = a["self"], n.meta["val"].dtype
    x = r.operand(source, idx, r.position[n])
    name = str(dtype).removeprefix("torch.")
    was = source.meta["val"].dtype
    if E.op_of(x) == "load" and dtype != was and not _widening(was, dtype):
        loaded, rounds = r.nodes[E.operands(x)[0].name[1:]], was.is_floating_point and dtype.is_floating_point
        # The cast of a whole captured tensor is captured itself.
        whole = isinstance(loaded.meta["val"], torch.Tensor) and _as_many(r, loaded, n)
        if whole and not r.is_opened(loaded):
            return r.leaf(n, idx)
        return E.FloatCall(name, x) if rounds else x
    if all(E.constant(c) is not None for c in E.leaves(x)):
        return x
    if dtype.is_floating_point and E.kind(x) == "float" and dtype != was:
        holds_data = any(E.op_of(c) in ATOMS or (E.op_of(c) == "load" and E.kind(c) == "float") for c in E.walk(x))
        if not (holds_data and _widening(was, dtype)):
            return E.FloatCall(name, x)
    return x


def _widening(was: torch.dtype, now: torch.dtype) -> bool:
    """Does the cast keep every value?"""
    if was.is_floating_point and now.is_floating_point:
        return torch.finfo(now).eps <= torch.finfo(was).eps and torch.finfo(now).max >= torch.finfo(was).max
    return not was.is_floating_point and now.is_floating_point


def _arange(r, a, n, idx):
    start = r.scalar(a["start"]) if a.get("start") is not None else ZERO
    step = r.scalar(a["step"]) if a.get("step") is not None else sympy.Integer(1)
    if "float" in (E.kind(start), E.kind(step)):
        return None
    return sympy.expand(start + step * idx[0])


def _full(r, a, n, idx):
    return r.operand(a["fill_value"] if "fill_value" in a else a["value"], (), r.position[n])


def _constant(value: int):
    return lambda r, a, n, idx: sympy.Integer(value)


def _triangle(upper: bool):
    def rule(r, a, n, idx):
        x = r.operand(a["self"], idx, r.position[n])
        diagonal = r.scalar(a.get("diagonal", 0))
        row, col = idx[-2], idx[-1]
        inside = E.le(row + diagonal, col) if upper else E.le(col, row + diagonal)
        return E.where(r.truth(inside), x, E.number(0.0) if E.kind(x) == "float" else ZERO)

    return rule


def _eye(r, a, n, idx):
    return E.where(r.truth(E.eq(idx[-2], idx[-1])), sympy.Integer(1), ZERO)


def _index_put(r, a, n, idx):
    """x[mask] = value."""
    indices, values = a["indices"], a["values"]
    mask, here = indices[-1], r.position[n]
    if any(i is not None for i in indices[:-1]) or a.get("accumulate") or any(n != 1 for n in r.shape(values)):
        return None
    lead = len(indices) - 1
    if mask.meta["val"].dtype != torch.bool or lead + mask.meta["val"].dim() != len(idx):
        return None
    value = r.read(values, (ZERO,) * values.meta["val"].dim(), here)
    return E.where(r.truth(r.read(mask, idx[lead:], here)), value, r.read(a["self"], idx, here))


def _scatter(dims):
    """slice_scatter and select_scatter: x with the elements of one slice exchanged."""

    def rule(r, a, n, idx):
        d, here = axis(a["dim"], len(idx)), r.position[n]
        if dims == "select":
            start, step = r.place(a["index"], n, d), 1
            stop = start + 1
        else:
            start, step = r.place(a.get("start") or 0, n, d, clamped=True), a.get("step", 1)
            stop = start + r.shape(a["src"])[d]
        if step != 1:
            return None
        inside = r.truth(E.and_(E.le(start, idx[d]), E.lt(idx[d], stop)))
        at = (*idx[:d], *(() if dims == "select" else (sympy.expand(idx[d] - start),)), *idx[d + 1 :])
        new, old = r.operand(a["src"], at, here), r.read(a["self"], idx, here)
        if inside not in (E.TRUE, E.FALSE) and E.loads(new):
            return None
        return E.where(inside, new, old)

    return rule


def _scalar_tensor(r, a, n, idx):
    return r.scalar(a["s"] if "s" in a else a.get("data"))


def _pad(r, a, n, idx):
    source, here = a["self"], r.position[n]
    if a.get("mode", "constant") != "constant":
        return None
    inside, at = E.TRUE, list(idx)
    for k in range(0, len(a["pad"]), 2):
        d = len(idx) - 1 - k // 2
        at[d] = idx[d] - r.scalar(a["pad"][k])
        inside = E.and_(inside, E.le(ZERO, at[d]), E.lt(at[d], r.shape(source)[d]))
    fill = r.scalar(a.get("value") or 0)
    inside = r.truth(inside)
    if inside not in (E.TRUE, E.FALSE) and E.loads(r.read(source, tuple(at), here)):
        return None
    return E.where(inside, r.read(source, tuple(at), here), fill)


def _diff(r, a, n, idx):
    """x[i + 1] - x[i]; with one element prepended the first difference may be another formula."""
    here, source, prepend = r.position[n], a["self"], a.get("prepend")
    if a.get("n", 1) != 1 or a.get("append") is not None:
        return None
    d = axis(a.get("dim", -1), len(idx))

    def at(tensor, i):
        return r.read(tensor, (*idx[:d], i, *idx[d + 1 :]), here)

    if prepend is None:
        return E.apply("sub", at(source, idx[d] + 1), at(source, idx[d]))
    if r.shape(prepend)[d] != 1:
        return None
    later = E.apply("sub", at(source, idx[d]), at(source, idx[d] - 1))
    if E.loads(later):
        return None
    first = E.apply("sub", at(source, ZERO), at(prepend, ZERO))
    return E.where(E.le(idx[d], ZERO), first, later)


def _cumsum(r, a, n, idx):
    d = axis(a["dim"], len(idx))
    # The terms are read at a position of their own: what else is read may depend on idx[d], as hits[i, ids[i]] does.
    at = r.fresh(r.shape(n)[d], "s")
    term = E.as_int(r.read(a["self"], (*idx[:d], at, *idx[d + 1 :]), r.position[n]))
    if E.constant(term) is not None:
        return sympy.expand(term * (idx[d] + 1))
    # One step at position 0 only: the running sum is that step everywhere.
    if E.op_of(term) == "where":
        c, x, y = E.operands(term)
        if E.op_of(c) == "le" and c == E.le(at, ZERO) and E.constant(y) == 0:
            return E.substitute(x, {at: ZERO})
    return None


def _detach(r, a, n, idx):
    """What no gradient could flow through anyway is the same detached."""
    x = r.operand(a["self"], idx, r.position[n])
    return None if any(E.op_of(c) in ("load", *ATOMS) and E.kind(c) == "float" for c in E.walk(x)) else x


def _nan_to_num(r, a, n, idx):
    """Of weights, which hold no infinities; everything else is refused where it is used."""
    x = r.operand(a["self"], idx, r.position[n])
    if a.get("nan") not in (None, 0.0, 0) or not any(E.op_of(c) in ATOMS for c in E.walk(x)):
        return None
    return E.apply("nan_to_zero", x)


def _xor(r, a, n, idx):
    x, y = (E.as_bool(v) for v in _pair(r, a, n, idx))
    return E.or_(E.and_(x, E.not_(y)), E.and_(E.not_(x), y)) if n.meta["val"].dtype == torch.bool else None


def _apply(formula):
    """An activation by its formula; none of a number that may change, which is a node."""

    def rule(r, a, n, idx):
        if any(isinstance(value, fx.Node) for name, value in a.items() if name != "self"):
            return None
        return formula(r.operand(a["self"], idx, r.position[n]), a)

    return rule


def _glu(r, a, n, idx):
    """The first half times the sigmoid of the second."""
    d, here = axis(a.get("dim", -1), len(idx)), r.position[n]
    half = r.shape(n)[d]
    x, gate = (r.read(a["self"], (*idx[:d], idx[d] + start, *idx[d + 1 :]), here) for start in (ZERO, half))
    return E.apply("mul", x, E.apply("sigmoid", gate))


UNARY = (
    "neg", "abs", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf",
    "reciprocal", "floor", "ceil", "trunc", "relu", "sign",
)  # fmt: skip

POINTWISE = {
    **ATOM_RULES,
    **{op: _unary(op) for op in UNARY},
    **{op: _apply(formula) for op, formula in ACTIVATIONS.items()},
    "glu": _glu,
    "add": _binary("add"),
    "sub": _binary("sub"),
    "subtract": _binary("sub"),
    "mul": _binary("mul"),
    "multiply": _binary("mul"),
    "rsub": _swapped("sub"),
    "pow": _pow,
    "maximum": _binary("max"),
    "minimum": _binary("min"),
    "logaddexp": _binary("logaddexp"),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    **dict.fromkeys(("le", "less_equal"), _compare(E.le)),
    **dict.fromkeys(("lt", "less"), _compare(E.lt)),
    **dict.fromkeys(("ge", "greater_equal"), _compare(lambda x, y: E.le(y, x))),
    **dict.fromkeys(("gt", "greater"), _compare(lambda x, y: E.lt(y, x))),
    "eq": _compare(E.eq),
    **dict.fromkeys(("ne", "not_equal"), _compare(lambda x, y: E.not_(E.eq(x, y)))),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logical(E.and_)),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logical(E.or_)),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), _xor),
    **dict.fromkeys(("logical_not", "bitwise_not"), _not),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "half"), _to),
    "arange": _arange,
    **dict.fromkeys(("full", "full_like", "new_full", "fill"), _full),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _constant(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1)),
    "tril": _triangle(upper=False),
    "triu": _triangle(upper=True),
    "detach": _detach,
    "eye": _eye,
    "index_put": _index_put,
    "slice_scatter": _scatter("slice"),
    "select_scatter": _scatter("select"),
    "scalar_tensor": _scalar_tensor,
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    "diff": _diff,
    "cumsum": _cumsum,
    "nan_to_num": _nan_to_num,
}
