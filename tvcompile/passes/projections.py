"""A projection of an expert: which side is the weight, and which expert's it is.

    pre[row, c] = sum_h x[token, h] * W[e, h, c]

A weight is one load whose element number is linear in expert, input feature and column; so it is a reshape and a
permutation of a tensor of the graph, whatever the program calls it.
"""

from __future__ import annotations

import dataclasses

import sympy
from sympy.core.symbol import Str
from torch import fx

from .. import expr as E
from ..expr import Expr, IntCall
from ..spec import Refuse
from .contraction import contraction
from .movement import Index, axis
from .read import Reader
from .rows import GROUPED, RowReader, settle


@dataclasses.dataclass(frozen=True)
class Weight:
    """A load as its element's number: rest + feature * (position in the input) + column * (position in the output).

    rest     a multiple of the expert's number plus the first column; inputs, columns: how many of each are read
    feature  0 in a bias
    """

    node: fx.Node
    rest: Expr
    feature: int
    column: int
    inputs: int = 1
    columns: int = 1


@dataclasses.dataclass(frozen=True)
class Projection:
    """x side (node, index), the weight, the summed position and its length."""

    x: tuple[fx.Node, Index]
    weight: Weight
    over: Expr
    length: Expr


def number_of(r: Reader, node: fx.Node, idx: Index) -> Expr:
    """The element's number in row-major order."""
    total = sympy.Integer(0)
    for size, i in zip(r.shape(node), idx):
        total = sympy.expand(total * size + i)
    return joined(total)


def joined(e: Expr) -> Expr:
    """a*c*(x//c) + a*(x%c) is a*x."""
    for call in [x for x in e.atoms(IntCall) if E.op_of(x) == "%"]:
        x, c = E.operands(call)
        a = e.coeff(call)
        partner = IntCall("//", x, c)
        if a != 0 and sympy.expand(e.coeff(partner) - a * c) == 0:
            return joined(sympy.expand(e - a * call - a * c * partner + a * x))
    return e


def leaf_of(r: RowReader, node: fx.Node, idx: Index, at: int) -> tuple[fx.Node, Index, int]:
    """Through the operations that only move data: the tensor they come from."""
    while not r.changed(node, at) and (moved := r.step(node, idx)) is not None:
        at = r.position[node]
        node, idx = moved[0], tuple(settle(E.as_int(i), r.bounds) for i in moved[1])
    if r.changed(node, at):
        raise Refuse("a tensor is written to after the experts read it", node)
    return node, idx, at


def weight_of(r: RowReader, node: fx.Node, idx: Index, over: Expr, column: Expr, at: int) -> Weight | None:
    leaf, where, used = leaf_of(r, node, idx, at)
    number = number_of(r, leaf, where)
    feature = number.coeff(over) if over != 0 else sympy.Integer(0)
    step = number.coeff(column) if column != 0 else sympy.Integer(0)
    rest = sympy.expand(number - feature * over - step * column)
    if rest.free_symbols & {x for x in (over, column) if x != 0} or not (feature.is_Integer and step.is_Integer):
        return None
    r._note_use(leaf, used)
    return Weight(leaf, rest, int(feature), int(step))


def projection(r: RowReader, node: fx.Node, idx: Index) -> Projection:
    """The operands of a projection; the last position of idx is the column."""
    name, a, here = r.name(node), r.arguments(node), r.position[node]
    column = next((i for i in reversed(idx) if i != 0), sympy.Integer(0))
    if name == "linear":
        length = r.shape(a["input"])[-1]
        over = r.fresh(length, "h")
        sides = [(a["input"], (*idx[:-1], over)), (a["weight"], (idx[-1], over))]
    elif name in GROUPED:
        x, w, offsets = node.args[0], node.args[1], a["offs"]
        if a.get("bias") is not None or len(r.shape(x)) != 2 or len(r.shape(w)) != 3:
            raise Refuse("a grouped product has a form that is not read", node)
        length = r.shape(x)[-1]
        over = r.fresh(length, "h")
        sides = [(x, (idx[0], over)), (w, (group(r, offsets, idx[0], node), over, idx[1]))]
    else:
        inner = contraction(r, node, idx)
        if inner is None:
            raise Refuse("a sum of products has a form that is not read", node)
        over, length, sides = inner.over, inner.length, [inner.lhs, inner.rhs]
    for x, w in (sides, sides[::-1]):
        found = weight_of(r, *w, over, column, here)
        if found is not None and found.column and (found.feature or length == 1):
            return Projection(x, found, over, length)
    raise Refuse("no side of a product is a weight", node)


def group(r: RowReader, offsets: fx.Node, row: Expr, node: fx.Node) -> Expr:
    """The expert of a row of a grouped product: ids[perm(row)] where the offsets count the ids."""
    source = _unwrapped(r, offsets, ("cumsum",), node)
    a = r.arguments(source)
    if axis(a["dim"], 1) != 0:
        raise Refuse("the offsets of a grouped product are no running sum", node)
    counts = _unwrapped(r, a["self"], ("histc", "bincount", "sum"), node)
    b, experts = r.arguments(counts), r.shape(offsets)[0]
    if r.name(counts) == "histc":
        if (b["bins"], b["min"], b["max"]) != (experts, 0, experts - 1):
            raise Refuse("the offsets of a grouped product count other numbers than the experts'", node)
    elif r.name(counts) == "bincount":
        if b.get("weights") is not None:
            raise Refuse("the offsets of a grouped product are weighed", node)
    else:
        raise Refuse("the offsets of a grouped product are not counted from the ids", node)
    ids = _unwrapped(r, b["self"], None, node)
    i = r.fresh(r.shape(ids)[0], "p")
    counted = r.read(ids, (i,), r.position[counts])
    sorts = {E.operands(x)[0] for e in (row, counted) for x in E.walk(e) if E.op_of(x) in ("perm", "inv")}
    if len(sorts) != 1:
        raise Refuse("the rows of a grouped product are not sorted by expert", node)
    (sort,) = sorts
    values = r.arguments(r.nodes[sort.name])
    if values.get("descending") or axis(values.get("dim", -1), 1) != 0:
        raise Refuse("the rows of a grouped product are not sorted upwards", node)
    sorted_by = r.read(values["self"], (i,), r.position[r.nodes[sort.name]])
    if sorted_by not in (counted, settle(E.substitute(counted, {i: IntCall("inv", sort, i)}, r.bounds), r.bounds)):
        raise Refuse("the rows of a grouped product are sorted by other ids than the offsets count", node)
    if not in_range(r, sorted_by, experts):
        raise Refuse("the ids of a grouped product are not proven to be numbers of experts", node)
    return settle(E.substitute(sorted_by, {i: settle(IntCall("perm", sort, row))}, r.bounds), r.bounds)


def in_range(r: RowReader, ids: Expr, experts: Expr) -> bool:
    """Are all ids in [0, E), as those of a topk over E scores are?"""
    if E.op_of(ids) != "load":
        return False
    node = r.nodes[E.operands(ids)[0].name[1:]]
    return places(r, node) == experts


def places(r: RowReader, node: fx.Node) -> Expr | None:
    """The size of the dim in which topk, max or argmax found places."""
    while node.op == "call_function" and r.name(node) in ("to", "clone", "contiguous", "detach", "alias", "view", "reshape"):
        node = node.args[0]
    if node.op != "call_function":
        return None
    source = node.args[0] if r.name(node) == "getitem" and node.args[1] == 1 else node
    if not isinstance(source, fx.Node) or r.name(source) not in ("topk", "max", "sort", "argmax", "argsort", "min"):
        return None
    a = r.arguments(source)
    shape = r.shape(a["self"])
    dim = a.get("dim", -1)
    return None if dim is None else shape[axis(dim, len(shape))]


def _unwrapped(r: RowReader, node: fx.Node, wanted: tuple[str, ...] | None, about: fx.Node) -> fx.Node:
    """Through casts; `wanted` None: as far as casts go."""
    while node.op == "call_function" and r.name(node) in ("to", "_to_copy", "float", "int", "long", "contiguous"):
        node = node.args[0]
    if wanted and (node.op != "call_function" or r.name(node) not in wanted):
        raise Refuse(f"the offsets of a grouped product come from {r.name(node)}", about)
    return node
