"""Which formulas are never negative: what a router weighs its experts by.

    softmax(x)   topk(sigmoid(x)).values[t, k]   p / sum(p)   zeros.scatter(1, ids, w)   einsum("te,te->t", p, one_hot)

What is not proven counts as negative. A weight that is no number (NaN) compares as nothing does, and gives no number.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from .ids import SCATTERS, compared
from .movement import axis
from .places import flat
from .rows import RowReader

ALWAYS = ("softmax", "sigmoid", "exp", "abs", "relu")
# Of parts that are not negative:
KEEP = ("mul", "add", "div", "reciprocal", "sqrt", "min", "where", "clamp_max", *E.CASTS)
SUMS = ("sum", "mean", "einsum", "matmul", "bmm", "mm", "amax", "max")
ORDERS = ("topk", "sort", "max", "min")
GREATEST = ("topk", "max", "amax")


def nonnegative(r: RowReader, e: Expr) -> bool:
    """Is a formula never less than 0?"""
    value, op, args = E.constant(e), E.op_of(e), E.operands(e)
    if value is not None:
        return value >= 0
    if E.kind(e) == "int":
        return _integer(r, e)
    if op in ALWAYS:
        return True
    if op in ("max", "clamp_min"):
        return any(nonnegative(r, x) for x in args)
    if op in KEEP:
        return all(nonnegative(r, x) for x in args if E.kind(x) != "bool")
    if op in ("reduce", "dot"):
        node = r.nodes[args[0].name]
        if (order := _order_of(r, node)) is not None:
            return _holds_of_taken(r, order, nonnegative)
        return r.name(node) in SUMS and all(_all_of(r, x, r.position[node]) for x in node.all_input_nodes)
    if op == "load":
        return _loaded(r, r.nodes[args[0].name[1:]])
    return False


def _integer(r: RowReader, e: Expr) -> bool:
    if E.op_of(e) == "where":
        return all(nonnegative(r, x) for x in E.operands(e)[1:])
    if e.is_Mul or e.is_Add:
        return all(nonnegative(r, x) for x in e.args)
    low, _ = r.bounds(e)
    return low is not None and E.at_most(0, low)


def _all_of(r: RowReader, node: fx.Node, at: int) -> bool:
    """Is no element of a tensor negative?"""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return nonnegative(r, r.read(node, tuple(r.fresh(n, "z") for n in r.shape(node)), at))


def _loaded(r: RowReader, node: fx.Node) -> bool:
    at = r.used_at.get(node, r.position[node])
    if node.op != "call_function" or r.changed(node, at):
        return False
    name, here = r.name(node), r.position[node]
    if name == "getitem":
        order = _order_of(r, node)
        return order is not None and _holds_of_taken(r, order, nonnegative)
    if name in SCATTERS:
        a = r.arguments(node)
        values = a["src"] if isinstance(a.get("src"), fx.Node) else None
        set_ = _all_of(r, values, here) if values is not None else nonnegative(r, r.scalar(a["value"]))
        return a.get("reduce") is None and set_ and _all_of(r, a["self"], here)
    opened = r.read(node, tuple(r.fresh(n, "z") for n in r.shape(node)), at)
    return (E.op_of(opened) != "load" or E.operands(opened)[0].name[1:] != node.name) and nonnegative(r, opened)


def _order_of(r: RowReader, node: fx.Node) -> fx.Node | None:
    """The topk, sort, max or min of which a node holds the values."""
    if node.op != "call_function":
        return None
    if r.name(node) == "amax":
        return node
    values = r.name(node) == "getitem" and r.name(node.args[0]) in ORDERS and node.args[1] == 0
    return node.args[0] if values else None


def _holds_of_taken(r: RowReader, order: fx.Node, holds: Callable[[RowReader, Expr | None], bool]) -> bool:
    """Does something hold of every element that an order takes from a tensor?

    That is where it holds of all elements; and of the k greatest where it holds of at least k, as of all but choices
    before them: softmax(x).masked_fill(one_hot(first), -inf).max(-1)
    """
    a = r.arguments(order)
    probe = tuple(r.fresh(n, "z") for n in r.shape(a["self"]))
    opened = r.read(a["self"], probe, r.position[order])
    if holds(r, opened):
        return True
    dims = a.get("dim", -1)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if r.name(order) not in GREATEST or not a.get("largest", True) or len(dims) != 1:
        return False
    e = probe[axis(dims[0], len(probe))]
    known = {g: ids for g in opened.atoms(E.BoolCall) if (ids := compared(g, e)) is not None}
    count = len(set(known.values())) + r.scalar(a.get("k", 1))
    enough = known and e in r.ranges and E.at_most(count, r.ranges[e])
    return bool(enough) and holds(r, E.substitute(opened, dict.fromkeys(known, E.FALSE)))


def positive(r: RowReader, e: Expr | None) -> bool:
    """Is a formula always greater than 0, but for what underflows?"""
    if e is None:
        return False
    value, op, args = E.constant(e), E.op_of(e), E.operands(e)
    if value is not None:
        return value > 0
    if op in ("softmax", "sigmoid", "exp"):
        return True
    if op in ("mul", "div", "reciprocal", "sqrt", "min", "clamp_max", "float32", "float64", "bfloat16"):
        return all(positive(r, x) for x in args)
    if op in ("add", "max", "clamp_min"):
        return any(positive(r, x) for x in args) and (op != "add" or all(nonnegative(r, x) for x in args))
    if op in ("reduce", "load"):
        node = r.nodes[args[0].name.removeprefix("%")]
        if (order := _order_of(r, node)) is not None:
            return _holds_of_taken(r, order, positive)
        if op == "reduce":
            return r.name(node) == "sum" and _positive_everywhere(r, node.all_input_nodes[0], r.position[node])
        if node.op == "call_function" and r.name(node) == "getitem":
            return False
        return node.op == "call_function" and _positive_everywhere(r, node, r.used_at.get(node, r.position[node]))
    return False


def _positive_everywhere(r: RowReader, node: fx.Node, at: int) -> bool:
    opened = r.read(node, tuple(r.fresh(n, "z") for n in r.shape(node)), at)
    itself = E.op_of(opened) == "load" and E.operands(opened)[0].name[1:] == node.name
    chosen = node.op == "call_function" and r.name(node) == "getitem"
    return (not itself or chosen) and not r.changed(node, at) and positive(r, opened)


def needed(e: Expr) -> tuple[Expr, ...]:
    """Conditions without which a formula is 0."""
    op, args = E.op_of(e), E.operands(e)
    if op == "where":
        condition, a, b = args
        if E.constant(b) == 0:
            return *flat([condition]), *needed(a)
        return (*flat([E.not_(condition)]), *needed(b)) if E.constant(a) == 0 else ()
    if op == "mul" or e.is_Mul:
        return tuple(g for x in args for g in needed(x))
    return needed(args[0]) if op in ("div", "neg", *E.CASTS) else ()


def compared_with_zero(g: Expr) -> Expr | None:
    """x where a condition says that x != 0, or 0 < x."""
    if isinstance(g, sympy.Not) and E.op_of(g.args[0]) == "feq":
        x, zero = E.operands(g.args[0])
        return x if E.constant(zero) == 0 else None
    return E.operands(g)[1] if E.op_of(g) == "flt" and E.constant(E.operands(g)[0]) == 0 else None


COMPARISONS = {
    **dict.fromkeys(("gt", "greater"), lambda x: E.lt(E.number(0.0), x)),
    **dict.fromkeys(("ne", "not_equal"), lambda x: E.not_(E.eq(x, E.number(0.0)))),
}


def with_its_sign(r: RowReader, g: Expr) -> Expr:
    """x > 0 or x != 0 of a program that compares in a precision that formulas do not have: what underflows aside."""
    node = r.nodes.get(E.operands(g)[0].name[1:]) if E.op_of(g) == "load" else None
    if node is None or node.op != "call_function" or r.name(node) not in COMPARISONS:
        return g
    a, at = r.arguments(node), r.used_at.get(node, r.position[node])
    zero = a["other"] == 0 and not isinstance(a["other"], fx.Node)
    if not zero or r.changed(node, at) or not isinstance(a["self"], fx.Node):
        return g
    return COMPARISONS[r.name(node)](r.operand(a["self"], E.operands(g)[1:], r.position[node]))
