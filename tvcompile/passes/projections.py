"""A projection of an expert: which side is the weight, and which expert's it is.

    pre[row, c] = sum_h x[token, h] * W[e, h, c]

A weight is one load whose element number is linear in expert, input feature and column; so it is a reshape and a
permutation of a tensor of the graph, whatever the program calls it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr, IntCall
from ..spec import Refuse
from .contraction import contraction
from .counts import begins_with_zero, whole
from .ids import NARROW, chosen_sides, distinct, in_range
from .movement import Index, axis, unravel
from .read import Reader
from .rows import GROUPED, RowReader, over, settle
from .terms_of import Term


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


Fix = Callable[[Expr], Expr]


@dataclasses.dataclass(frozen=True)
class Row:
    """What the row of a projection has to be: element `over` of `length` of token t, nowhere coarser than `dtype`.

    number: what the position of the experts among `outer.bound` is, where the row is of one expert
    """

    over: Expr
    length: Expr
    t: Expr
    fix: Fix
    outer: Term
    dtype: torch.dtype
    number: Expr | None = None


def is_row(r: Reader, x: fx.Node, idx: Index, t: Expr, over: Expr, length: Expr) -> bool:
    """Is x[idx] element `over` of row t of x, and has x as many rows as there are t?"""
    here = sympy.expand(number_of(r, x, idx) - (t * length + over)) == 0
    return here and sympy.expand(sympy.Mul(*r.shape(x)) - r.ranges.get(t, sympy.Integer(1)) * length) == 0


def joined(e: Expr) -> Expr:
    """a*c*(x//c) + a*(x%c) is a*x."""
    for call in [x for x in e.atoms(IntCall) if E.op_of(x) == "%"]:
        x, c = E.operands(call)
        a = e.coeff(call)
        partner = IntCall("//", x, c)
        if a != 0 and sympy.expand(e.coeff(partner) - a * c) == 0:
            return joined(sympy.expand(e - a * call - a * c * partner + a * x))
    return e


def path_of(r: RowReader, node: fx.Node, idx: Index, at: int) -> list[tuple[fx.Node, Index, int]]:
    """Reader.path, all of which is as the experts read it."""
    path = r.path(node, idx, at)
    source, _, used = path[-1]
    if r.changed(source, used):
        raise Refuse("a tensor is written to after the experts read it", source)
    return path


def leaf_of(r: RowReader, node: fx.Node, idx: Index, at: int) -> tuple[fx.Node, Index, int]:
    """The tensor that an element comes from by operations that only move data."""
    return path_of(r, node, idx, at)[-1]


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


def projection(r: RowReader, node: fx.Node, idx: Index, column: Expr) -> Projection:
    """The operands of a projection, where `column` is a position of its weight alone."""
    name, a, here = r.name(node), r.arguments(node), r.position[node]
    if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1:
        raise Refuse("a projection is scaled as its bias is added", node)
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
        if inner is not None:
            over, length, sides = inner.over, inner.length, [inner.lhs, inner.rhs]
        else:
            sides, bound = chosen_sides(r, node, idx)
            if len(sides) != 2 or len(bound) != 1:
                raise Refuse("a sum of products has a form that is not read", node)
            over, length = bound[0], r.ranges[bound[0]]
    for x, w in (sides, sides[::-1]):
        found = weight_of(r, *w, over, column, here)
        if found is not None and found.column and (found.feature or length == 1):
            return Projection(x, found, over, length)
    raise Refuse("no side of a product is a weight", node)


def group(r: RowReader, offsets: fx.Node, row: Expr, node: fx.Node, before: bool = False) -> Expr:
    """The expert of a row of a grouped product: ids[perm(row)] where the offsets count the ids up to each.

    before: the offsets count those before each.
    """
    experts = r.shape(offsets)[0]
    if (expert := _by_mask(r, offsets, row, experts)) is not None:
        return expert
    ids = counted_ids(r, offsets, experts, node, before)
    i = r.fresh(ids.count, "p")
    counted = ids.at(i)
    sorts = {E.operands(x)[0] for e in (row, counted) for x in E.walk(e) if E.op_of(x) in ("perm", "inv")}
    if len(sorts) != 1:
        raise Refuse("the rows of a grouped product are not sorted by expert", node)
    (sort,) = sorts
    values = r.arguments(r.nodes[sort.name])
    if values.get("descending") or axis(values.get("dim", -1), 1) != 0:
        raise Refuse("the rows of a grouped product are not sorted upwards", node)
    sorted_by = r.read(values["self"], (i,), r.position[r.nodes[sort.name]])
    in_order = settle(E.substitute(counted, {i: IntCall("inv", sort, i)}, r.bounds), r.bounds)
    if sorted_by != in_order and (ids.ascend or sorted_by != counted):
        raise Refuse("the rows of a grouped product are sorted by other ids than the offsets count", node)
    if not in_range(r, sorted_by, experts) and not _of_all_ids(r, offsets, before):
        raise Refuse("the ids of a grouped product are not proven to be numbers of experts", node)
    return settle(E.substitute(sorted_by, {i: settle(IntCall("perm", sort, row))}, r.bounds), r.bounds)


def _of_all_ids(r: RowReader, offsets: fx.Node, before: bool) -> bool:
    """Were the ids counted by bincount, which has a place for each that there is?"""
    added = unwrapped(r, offsets)
    counts = _added(r, added, before) if r.name(added) == "cumsum" else added
    if counts is None or counts.op != "call_function" or r.name(counts) != "bincount":
        return False
    return r.shape(offsets)[0] - r.shape(counts)[0] in ((0, 1) if before else (0,))


def _by_mask(r: RowReader, offsets: fx.Node, row: Expr, experts: Expr) -> Expr | None:
    """The expert of a row that a mask [E,T] chose, where the offsets count the places of its rows."""
    mask = r.chosen_by(r.ranges[row]) if row in r.ranges else None
    added = unwrapped(r, offsets)
    if mask is None or len(r.shape(mask)) != 2 or r.shape(mask)[0] != experts or r.name(added) != "cumsum":
        return None
    if added.meta["val"].dtype in NARROW:
        return None
    counts = unwrapped(r, r.arguments(added)["self"])
    if r.name(counts) != "sum" or counts.meta["val"].dtype in NARROW:
        return None
    e = r.fresh(experts, "e")
    source, at, positions = over(r, counts, (e,))
    value = whole(r, source, at, r.position[counts])
    body = r.truth(E.as_bool(value))
    if len(positions) != 1 or r.ranges.get(positions[0]) != r.shape(mask)[1] or value not in (E.as_int(body), body):
        return None
    chosen = r.truth(E.as_bool(r.read(mask, (e, positions[0]), len(r.position))))
    return r.nth(mask, 0, row) if chosen == body else None


@dataclasses.dataclass(frozen=True)
class Ids:
    """What is counted: `count` ids, of which at(i) is the i-th. ascend: only if each is as great as the one before."""

    count: Expr
    at: Callable[[Expr], Expr]
    ascend: bool = False


def ids_of(r: RowReader, node: fx.Node, at: int) -> Ids:
    shape = r.shape(node)
    return Ids(
        sympy.expand(sympy.Mul(*shape)), lambda i: E.as_int(r.read(node, tuple(unravel(i, shape, r.bounds)), at))
    )


def counted_ids(r: RowReader, offsets: fx.Node, experts: Expr, node: fx.Node, before: bool) -> Ids:
    """The ids of which offsets[e] counts those up to e, or before it."""
    source = unwrapped(r, offsets)
    if source.meta["val"].dtype in NARROW:
        raise Refuse(f"the offsets of a grouped product are counted in {source.meta['val'].dtype}", node)
    a, here, name = r.arguments(source), r.position[source], r.name(source)
    probe = r.fresh(experts, "e")
    if name == "searchsorted" and (found := _searched_ids(r, a, probe - int(before), here)) is not None:
        return found
    if name == "cumsum" and axis(a["dim"], 1) == 0:
        if (counts := _added(r, source, before)) is not None:
            return _counted(r, counts, r.shape(counts)[0], r.fresh(r.shape(counts)[0], "e"), node)
    if before:
        raise Refuse(f"where an expert's rows begin comes from {name}, not from a search or counts", node)
    if name == "sum" and (found := _summed_ids(r, source, probe, lambda i: E.le(i, probe))) is not None:
        return found
    raise Refuse(f"the offsets of a grouped product come from {name}, not from counts of the ids", node)


def _added(r: RowReader, running: fx.Node, before: bool) -> fx.Node | None:
    """The counts that a running sum adds up; before: after a zero, all of them or all but the last."""
    added, here = r.arguments(running)["self"], r.position[running]
    if not before:
        return unwrapped(r, added)
    e = r.fresh(sympy.expand(r.shape(added)[0] - 1), "e")
    one = r.read(added, (e + 1,), here)
    if not begins_with_zero(r, running) or E.op_of(one) not in ("load", "count") or E.operands(one)[1:] != (e,):
        return None
    counts = r.nodes.get(E.operands(one)[0].name.removeprefix("%"))
    return counts and unwrapped(r, counts)


def _searched_ids(r: RowReader, a: dict, last: Expr, here: int) -> Ids | None:
    """The ids of which searchsorted finds how many are up to `last`, an expert or the one before."""
    ids, sorter = a["sorted_sequence"], a.get("sorter")
    below = last if a.get("right") or a.get("side") == "right" else last + 1
    (probe,) = last.free_symbols
    if len(r.shape(ids)) != 1 or r.read(a["self"], (probe,), here) != sympy.expand(below):
        return None

    def at(i: Expr) -> Expr:
        i = i if sorter is None else E.as_int(r.read(sorter, (i,), here))
        return E.as_int(r.read(ids, (i,), here))

    return Ids(r.shape(ids)[0], at, ascend=True)


def _counted(r: RowReader, counts: fx.Node, experts: Expr, probe: Expr, node: fx.Node) -> Ids:
    """The ids of which counts[e] are e."""
    a, here, name = r.arguments(counts), r.position[counts], r.name(counts)
    if counts.meta["val"].dtype in NARROW:
        raise Refuse(f"the ids of a grouped product are counted in {counts.meta['val'].dtype}", node)
    if name == "histc" and a["bins"] == experts and a["min"] == 0 and a["max"] in (experts - 1, experts):
        return ids_of(r, unwrapped(r, a["self"]), here)
    if name == "bincount" and a.get("weights") is None:
        return ids_of(r, a["self"], here)
    if (index := _adds_ones(r, name, a, probe, here)) is not None:
        return ids_of(r, index, here)
    if name == "sum" and (found := _summed_ids(r, counts, probe, lambda i: E.eq(i, probe))) is not None:
        return found
    raise Refuse(f"the offsets of a grouped product are made of {name}, not of counts of the ids", node)


def _adds_ones(r: RowReader, name: str, a: dict, probe: Expr, here: int) -> fx.Node | None:
    """The ids at which ones are added to zeros."""
    if name in ("scatter_add", "index_add") and axis(a["dim"], 1) == 0 and a.get("alpha", 1) == 1:
        index, ones = a["index"], a["src" if name == "scatter_add" else "source"]
    elif name == "index_put" and a.get("accumulate") and len(a["indices"]) == 1:
        index, ones = a["indices"][0], a["values"]
    else:
        return None
    places = tuple(r.fresh(n, "p") for n in r.shape(index))
    added = E.constant(r.operand(ones, r.broadcast(ones, places), here))
    integer = index.meta["val"].dtype != torch.bool
    return index if integer and added == 1 and E.constant(r.operand(a["self"], (probe,), here)) == 0 else None


def _summed_ids(r: RowReader, node: fx.Node, probe: Expr, condition: Callable[[Expr], Expr]) -> Ids | None:
    """ids where sum_i condition(ids[i], e) is what a sum computes."""
    source, at, positions = over(r, node, (probe,))
    positions = [p for p in positions if p != 0]
    value = whole(r, source, at, r.position[node])
    body = r.truth(E.as_bool(value))
    if value not in (E.as_int(body), *E.loads(value)):
        return None  # not one for each
    for load in E.loads(body):
        if set(positions) <= load.free_symbols and body == condition(load):
            sizes = tuple(r.ranges[p] for p in positions)

            def one(i: Expr, load: Expr = load) -> Expr:
                return E.substitute(load, dict(zip(positions, unravel(i, sizes, r.bounds))), r.bounds)

            return Ids(sympy.expand(sympy.Mul(*sizes)), one)
        if condition(probe) == E.TRUE and E.operands(load)[1:] == (*positions, probe) and body == E.as_bool(load):
            return _set_ids(r, r.nodes[E.operands(load)[0].name[1:]])
    return None


def _set_ids(r: RowReader, matrix: fx.Node) -> Ids | None:
    """ids where a matrix is zeros.scatter(-1, ids, 1): those of one row differ, so that each is counted."""
    matrix = unwrapped(r, matrix)
    if matrix.op != "call_function" or r.name(matrix) != "scatter":
        return None
    a, here = r.arguments(matrix), r.position[matrix]
    ids, zero = a["index"], tuple(r.fresh(n, "z") for n in r.shape(matrix))
    ones = r.operand(a["src"] if isinstance(a.get("src"), fx.Node) else a["value"], zero, here)
    ends = [E.constant(x) for x in (r.operand(a["self"], zero, here), ones)]
    rows = axis(a["dim"], len(zero)) == len(zero) - 1 and r.shape(ids)[:-1] == r.shape(matrix)[:-1]
    plain = a.get("reduce") is None and ends == [0, 1]
    return ids_of(r, ids, here) if rows and plain and distinct(r, ids) else None


def unwrapped(r: RowReader, node: fx.Node) -> fx.Node:
    """Through casts that keep every number of an expert."""
    while node.op == "call_function" and r.name(node) in ("to", "_to_copy", "float", "int", "long", "contiguous"):
        if node.meta["val"].dtype in NARROW:
            break
        node = node.args[0]
    return node
