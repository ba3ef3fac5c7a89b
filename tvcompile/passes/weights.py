"""Attention weights: the softmax in every way it is written.

softmax(x, -1), log_softmax(x).exp(), exp(x - amax(x)) / sum(exp(x - amax(x))), exp(x - logsumexp(x)),
softmax(cat([x, sink]), -1)[..., :-1], exp(x) / (1 + sum(exp(x)))   ->   (x, sink, dropout)
"""

from __future__ import annotations

import dataclasses

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .contraction import Product
from .movement import MOVEMENT, Index, axis, rounding
from .read import Reader


class NotASoftmax(Refuse):
    """The scores are weighted by something else: worth a word even where there is no softmax."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """softmax of `argument` over the summed position, with `sink` as one more logit.

    written: "softmax" where the maximum is subtracted, else "plain" (exp over sum of exp) or "logsumexp"
    kept: where weights are not set to zero after the softmax
    """

    argument: Expr
    sink: Expr | None
    dropout: float
    zeroed: bool
    written: str
    node: fx.Node
    kept: Expr = E.TRUE


def read_weights(r: Reader, anchor: fx.Node, product: Product, out: Index):
    """(weights, V's (node, index), the node whose value they give) of a contraction.

    (None, None, anchor) where no side is a softmax; Refuse where one looks like other weights.
    """
    at = r.position[anchor]
    unlike = None
    for (node, idx), other in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
        formula = r.read(node, idx, at)
        found = _softmax(r, formula, product, anchor)
        if found is not None:
            return found, other, anchor
        late = _normalised_later(r, anchor, formula, product, out)
        if late is not None:
            return late[0], other, late[1]
        unlike = unlike or _looks_like_weights(formula, product.over)
    if unlike is not None:
        reason = f"the weights are {unlike} of the scores, not a softmax over the summed position"
        raise NotASoftmax(reason, anchor)
    return None, None, anchor


def _normalised_later(r: Reader, anchor: fx.Node, formula: Expr, product: Product, out: Index):
    """(exp(x) @ v) / sum(exp(x)): the quotient is the attention."""
    users = list(anchor.users)
    if exponent(formula) is None or len(users) != 1 or r.name(users[0]) not in ("div", "true_divide"):
        return None
    (quotient,) = users
    a = r.arguments(quotient)
    if a["self"] is not anchor or r.shape(quotient) != r.shape(anchor) or a.get("rounding_mode"):
        return None
    found = _from_quotient(r, formula, r.operand(a["other"], out, r.position[quotient]), product)
    return found and (Weights(found[0], found[1], 0.0, False, _written(r, formula, product), found[2]), quotient)


def _looks_like_weights(e: Expr, over: Expr) -> str | None:
    """Names the function where a formula is one of a single dot product and no other data."""
    dots = {x for x in E.walk(e) if E.op_of(x) == "dot"}
    softmaxes = [x for x in E.walk(e) if E.op_of(x) == "softmax"]
    if softmaxes:
        return f"`{E.op_of(e)}`" if E.op_of(e) != "softmax" else "a softmax over another dim"
    if len(dots) == 1 and not any(E.kind(x) == "float" for x in E.loads(e)) and E.op_of(e) not in ("dot", "reduce"):
        (dot,) = dots
        return f"`{E.op_of(e)}`" if E.mentions(dot, over) else None
    return None


def _softmax(r: Reader, e: Expr, product: Product, anchor: fx.Node) -> Weights | None:
    dropout, zeroed, kept = 0.0, False, E.TRUE
    while (cleared := _cleared(e)) is not None or E.op_of(e) in ("dropout", "nan_to_zero", *E.CASTS):
        if cleared is not None:
            kept, e = E.and_(kept, cleared[0]), cleared[1]
            continue
        op, args = E.op_of(e), E.operands(e)
        if op == "dropout":
            p = E.constant(args[1])
            if dropout or p is None or not 0 <= p < 1:
                return None
            dropout = p
        if op in E.CASTS and rounding(op) > rounding(anchor.meta["val"].dtype):
            raise Refuse(f"the weights are rounded to {op} on the way", anchor)
        zeroed = zeroed or op == "nan_to_zero"
        e = args[-1]
    written = "softmax"
    if E.op_of(e) == "softmax":
        found = _from_atom(r, e, product)
    elif (quotient := _as_quotient(e)) is not None:
        found, written = _from_quotient(r, *quotient, product), _written(r, quotient[0], product)
    elif E.op_of(e) == "exp":
        found, written = _from_logsumexp(r, E.operands(e)[0], product), "logsumexp"
    else:
        return None
    return found and Weights(found[0], found[1], dropout, zeroed, written, found[2], kept)


def _cleared(e: Expr) -> tuple[Expr, Expr] | None:
    """(where, p) of weights that are p there and zero elsewhere."""
    op, args = E.op_of(e), E.operands(e)
    if op == "where" and 0 in (values := [E.constant(x) for x in args[1:]]):
        return (args[0], args[1]) if values[1] == 0 else (E.not_(args[0]), args[2])
    for p, mask in (args, args[::-1]) if op == "mul" else ():
        if E.op_of(mask) == "where" and [E.constant(v) for v in E.operands(mask)[1:]] in ([1, 0], [0, 1]):
            return E.operands(_masked(mask, p))[0], p
    return None


def _from_atom(r: Reader, atom: Expr, product: Product):
    """A softmax call: its input read at the summed position, and what else it normalises over."""
    name, *idx = E.operands(atom)
    node = r.nodes[name.name]
    a, over = r.arguments(node), product.over
    source, here = a["self"], r.position[node]
    d = axis(a["dim"], len(idx))
    size = r.shape(node)[d]
    if any(E.mentions(x, over) for i, x in enumerate(idx) if i != d) and over != 0:
        return None
    if sympy.expand(size - product.length) == 0 and idx[d] == over:
        return _shifted(r, r.read(source, tuple(idx), here), over), None, node
    shift = sympy.expand(idx[d] - over)
    if not isinstance(shift, sympy.Integer) or sympy.expand(size - product.length) != 1 or shift not in (0, 1):
        return None
    extra = product.length if shift == 0 else sympy.Integer(0)
    score = r.read(source, tuple(idx), here)
    sink = r.read(source, (*idx[:d], extra, *idx[d + 1 :]), here)
    while E.op_of(score) == E.op_of(sink) == "sub" and E.operands(score)[1] == E.operands(sink)[1]:
        score, sink = E.operands(score)[0], E.operands(sink)[0]
    if E.mentions(sink, over) or any(E.op_of(x) in ("dot", "reduce", "softmax") for x in E.walk(sink)):
        return None
    return score, sink, node


def _shifted(r: Reader, e: Expr, over: Expr) -> Expr:
    """A softmax does not change when what is the same for every summed position is subtracted.

    Of masked scores only the maximum or the logsumexp is: the mean of a row with -inf in it is -inf.
    """
    while E.op_of(e) == "sub" and not E.mentions(E.operands(e)[1], over):
        inner, shift = E.operands(e)
        masked = any((E.constant(x) or 0) <= -1e4 for x in E.walk(inner) if E.kind(x) == "float")
        if masked and _reduction(r, shift) not in ("amax", "max", "logsumexp"):
            return e
        e = inner
    return e


def _reduction(r: Reader, shift: Expr) -> str:
    """The reduction that a shift is the value of, detached or not."""
    if E.op_of(shift) not in ("reduce", "load"):
        return ""
    node = r.nodes[E.operands(shift)[0].name.removeprefix("%")]
    while node.op == "call_function" and r.name(node) in ("detach", "getitem", *MOVEMENT):
        node = node.args[0]
    return r.name(node) if node.op == "call_function" else ""


def exponent(e: Expr) -> Expr | None:
    """x where e is exp(x), perhaps times a mask of ones and zeros: there x is -inf."""
    op, args = E.op_of(e), E.operands(e)
    if op == "exp":
        return args[0]
    if op == "where" and (E.constant(args[1]) == 0 or E.constant(args[2]) == 0):
        c, kept = (E.not_(args[0]), args[2]) if E.constant(args[1]) == 0 else (args[0], args[1])
        x = exponent(kept)
        return None if x is None else E.where(c, x, -sympy.oo)
    if op == "mul":
        for kept, mask in (args, args[::-1]):
            if E.op_of(mask) == "where" and [E.constant(v) for v in E.operands(mask)[1:]] in ([1, 0], [0, 1]):
                return exponent(_masked(mask, kept))
    return None


def _masked(mask: Expr, kept: Expr) -> Expr:
    c, x, _ = E.operands(mask)
    zero = E.number(0.0)
    return E.where(c, kept, zero) if E.constant(x) == 1 else E.where(c, zero, kept)


def _as_quotient(e: Expr) -> tuple[Expr, Expr] | None:
    if E.op_of(e) == "div":
        return E.operands(e)
    if E.op_of(e) == "mul":
        for x, y in (E.operands(e), E.operands(e)[::-1]):
            if E.op_of(y) == "reciprocal":
                return x, E.operands(y)[0]
    return None


def _from_quotient(r: Reader, top: Expr, bottom: Expr, product: Product):
    """exp(x) / sum(exp(x)), the sum perhaps enlarged by exp(sink)."""
    x, more, over = exponent(top), None, product.over
    if x is None:
        return None
    if E.op_of(bottom) == "add":
        bottom, more = sorted(E.operands(bottom), key=lambda e: E.op_of(e) != "reduce")
    if E.op_of(bottom) != "reduce":
        return None
    node = r.nodes[E.operands(bottom)[0].name]
    if r.name(node) != "sum" or _summand(r, node, bottom, product) != top:
        return None
    if more is None:
        return _shifted(r, x, over), None, node
    sink = E.number(0.0) if E.constant(more) == 1.0 else exponent(more)
    if sink is None or E.mentions(sink, over):
        return None
    if E.op_of(x) == "sub" and not E.mentions(E.operands(x)[1], over):
        shift = E.operands(x)[1]
        if sink == E.apply("neg", shift):
            return E.operands(x)[0], E.number(0.0), node
        if E.op_of(sink) == "sub" and E.operands(sink)[1] == shift:
            return E.operands(x)[0], E.operands(sink)[0], node
        return None
    return x, sink, node


def _written(r: Reader, top: Expr, product: Product) -> str:
    """Does exp(x - c) subtract the maximum of that same x?"""
    x = exponent(top)
    if x is not None and E.op_of(x) == "sub" and E.op_of(E.operands(x)[1]) in ("reduce", "max", "clamp_min"):
        inner, shift = E.operands(x)
        shift = E.operands(shift)[0] if E.op_of(shift) in ("max", "clamp_min") else shift
        node = r.nodes[E.operands(shift)[0].name] if E.op_of(shift) == "reduce" else None
        if node is not None and r.name(node) == "getitem":
            node = node.args[0]
        if node is not None and r.name(node) in ("amax", "max") and _summand(r, node, shift, product) == inner:
            return "softmax"
    return "plain"


def _from_logsumexp(r: Reader, e: Expr, product: Product):
    """exp(x - logsumexp(x)), or exp(x - logaddexp(logsumexp(x), sink))."""
    if E.op_of(e) != "sub":
        return None
    x, reduced = E.operands(e)
    sink = None
    if E.op_of(reduced) == "logaddexp":
        reduced, sink = sorted(E.operands(reduced), key=lambda y: E.op_of(y) != "reduce")
    if E.op_of(reduced) != "reduce" or (sink is not None and E.mentions(sink, product.over)):
        return None
    node = r.nodes[E.operands(reduced)[0].name]
    if r.name(node) != "logsumexp" or _summand(r, node, reduced, product) != x:
        return None
    return x, sink, node


def _summand(r: Reader, node: fx.Node, reduced: Expr, product: Product) -> Expr | None:
    """What a reduction sums, read at the contraction's summed position."""
    a = r.arguments(node)
    dims, source = a.get("dim"), a["self"]
    dims = [dims] if isinstance(dims, int) else dims
    shape = r.shape(source)
    if not dims or len(dims) != 1:
        return None
    d = axis(dims[0], len(shape))
    if sympy.expand(shape[d] - product.length) != 0:
        return None
    idx = list(E.operands(reduced)[1:])
    idx = [*idx[:d], product.over, *idx[d + 1 :]] if a.get("keepdim") else [*idx[:d], product.over, *idx[d:]]
    return r.read(source, tuple(idx), r.position[node])
