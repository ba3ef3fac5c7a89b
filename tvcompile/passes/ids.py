"""What is known of ids: which numbers they can be, what was set at them, what a sum over their one-hot chooses.

zeros.scatter(1, ids, w)[t, ids[t, k]]           = w[t, k], where the ids of a token differ
einsum("te,ehf->thf", one_hot(ids), W)[t, h, f]        = W[ids[t], h, f]
einsum("te,th,ehf->tf", one_hot(ids), x, W)[t, f]      = sum_h x[t, h] W[ids[t], h, f]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .contraction import operands_of, without_sum
from .indices import KEPT, NARROW
from .movement import CASTS, MOVEMENT, Index, axis
from .read import Reader

if TYPE_CHECKING:
    from .rows import RowReader


def in_range(r: RowReader, ids: Expr, experts: Expr) -> bool:
    """Are all ids in [0, E), as those of a topk over E scores are?"""
    low, high = r.bounds(ids)
    return low is not None and E.at_most(0, low) and E.at_most(high, experts - 1)


SCATTERS = ("scatter", "scatter_add")
READ = ("load", "%")
COMPUTED = ("//", "min", "max", "clamp_min", "clamp_max")  # of what is read


def is_read(e: Expr) -> bool:
    """Is an integer read from tensors, or a sum of such, as group * 4 + place is?"""
    if isinstance(e, (sympy.Add, sympy.Mul)):
        return not e.is_negative and all(x.is_Integer and x > 0 or is_read(x) for x in e.args)
    return E.op_of(e) in READ or E.op_of(e) in COMPUTED and bool(E.loads(e))


def compared(guard: Expr, expert: Expr) -> Expr | None:
    """I where the guard says I == expert, and I is read from tensors, or what is left of that by a division."""
    if E.op_of(guard) != "eq":
        return None
    gap = E.operands(guard)[0]
    for sign in (1, -1):
        other = sympy.expand(sign * gap + expert)
        if is_read(other - other.as_coeff_Add()[0]) and not (expert.free_symbols & other.free_symbols):
            return other
    return None


def scattered(r: RowReader, e: Expr) -> tuple[fx.Node, dict] | None:
    """(node, arguments) where a load is one of a tensor in which few places per row were set."""
    node = r.nodes.get(E.operands(e)[0].name[1:])
    if node is None or node.op != "call_function" or r.name(node) not in SCATTERS:
        return None
    a = r.arguments(node)
    return None if a.get("reduce") is not None else (node, _column_by_column(r, node, a))


def _column_by_column(r: RowReader, node: fx.Node, a: dict) -> dict:
    """zeros.scatter(-1, ids[:, 0:1], w[:, 0:1]).scatter(-1, ids[:, 1:2], w[:, 1:2]) as zeros.scatter(-1, ids, w)"""
    links, base = [(node, a)], a["self"]
    while base.op == "call_function" and r.name(base) == r.name(node) and not r.changed(base, r.position[links[-1][0]]):
        links.append((base, r.arguments(base)))
        base = links[-1][1]["self"]
    if len(links) == 1:
        return a
    columns = {}
    for link, b in links:
        ids, w = (_column_of(r, b.get(role), r.position[link]) for role in ("index", "src"))
        if ids is None or w is None or ids[1] != w[1] or b["dim"] != a["dim"] or b.get("reduce") is not None:
            return a
        columns[ids[1]] = ids[0], w[0]
    if columns.keys() != {sympy.Integer(j) for j in range(len(links))} or len(set(columns.values())) != 1:
        return a
    source, values = columns[sympy.Integer(0)]
    return {**a, "self": base, "index": source, "src": values} if r.shape(source)[-1] == len(links) else a


def _column_of(r: RowReader, x: fx.Node | float | None, at: int) -> tuple[fx.Node, Expr] | None:
    """(tensor, j) where x is its [..., j : j + 1]."""
    if not isinstance(x, fx.Node) or r.shape(x)[-1:] != (1,):
        return None
    lead = tuple(r.fresh(n, "z") for n in r.shape(x)[:-1])
    source, idx, _ = r.path(x, (*lead, sympy.Integer(0)), at)[-1]
    return (source, idx[-1]) if idx[:-1] == lead and r.shape(source)[:-1] == r.shape(x)[:-1] else None


def once(r: RowReader, at: Index) -> bool:
    """Does every place occur once: all coordinates of a mask's places, or of one that compares distinct ids?"""
    if any(E.op_of(x) != "nth" for x in at):
        return len(at) == 1 and E.op_of(at[0]) in ("perm", "inv")
    masks = {E.operands(x)[0] for x in at}
    if len(masks) != 1:
        return False
    mask = r.nodes[next(iter(masks)).name]
    held = {int(E.operands(x)[1]) for x in at}
    missing = {d for d, n in enumerate(r.shape(mask)) if n != 1} - held
    if not missing:
        return True
    probe = tuple(r.fresh(n, "p") for n in r.shape(mask))
    formula = r.truth(E.as_bool(r.read(mask, probe, r.position[mask] + 1)))
    loads = E.loads(formula)
    if len(missing) != 1 or len(loads) != 1 or E.op_of(formula) != "eq":
        return False
    name, *idx = E.operands(loads[0])
    free = probe[missing.pop()]
    return idx[-1] == free and distinct(r, r.nodes[name.name[1:]]) and not any(E.mentions(i, free) for i in idx[:-1])


# What leaves different ids different; a part of them is.
DISTINCT = ("clone", "contiguous", "detach", "alias", "to", "slice", "narrow")


def distinct(r: RowReader, ids: fx.Node) -> bool:
    """Do the ids of one token differ from each other, as those of a topk do, or is there one alone?"""
    if r.shape(ids)[-1] == 1:
        return True
    while ids.op == "call_function":
        if r.name(ids) == "multinomial":
            return not r.arguments(ids)["replacement"]
        if r.name(ids) == "getitem":
            a, rank = r.arguments(ids.args[0]), len(r.shape(ids))
            chosen = r.name(ids.args[0]) in ("topk", "sort") and ids.args[1] == 1
            return chosen and axis(a.get("dim", -1), rank) == rank - 1
        if r.name(ids) not in DISTINCT or ids.meta["val"].dtype in NARROW:
            break
        ids = ids.args[0]
    return False


def source_of_scatter(r: RowReader, x: Expr):
    """(ids, what is set at [t, k] as a formula, k, t's index) of a load of zeros.scatter(-1, ids, values)[t, e]."""
    if E.op_of(x) == "softmax":
        node = r.nodes[E.operands(x)[0].name]
        inner = r.read(r.arguments(node)["self"], E.operands(x)[1:], r.position[node])
        found = [y for y in E.walk(inner) if E.op_of(y) == "load" and scattered(r, y)]
        return source_of_scatter(r, found[0]) if len(found) == 1 else None
    held = scattered(r, x)
    if held is None:
        return None
    node, a = held
    rank = len(r.shape(node))
    if axis(a["dim"], rank) != rank - 1 or not distinct(r, a["index"]):
        return None
    if r.shape(a["index"])[:-1] != r.shape(node)[:-1]:
        return None  # rows beyond the ids' have none
    zero = tuple(r.fresh(n, "z") for n in r.shape(node))
    if r.name(node) == "scatter_add" and E.constant(r.read(a["self"], zero, r.position[node])) != 0:
        return None
    *lead, _ = E.operands(x)[1:]
    k = r.fresh(r.shape(a["index"])[-1], "k")
    here = r.position[node]
    if isinstance(a.get("src"), fx.Node):
        values = r.leaf(a["src"], (*lead, k), here)
    else:
        values = r.coerce(r.operand(a["value"], (), here), node.meta["val"].dtype)
    return a["index"], values, k, tuple(lead)


def two_valued(r: RowReader, load: Expr) -> Expr:
    """A load of zeros in which ones were set, say, as `where` of whether it is zero; any other as it is."""
    held = scattered(r, load)
    if held is None or r.name(held[0]) != "scatter" or isinstance(held[1].get("src"), fx.Node):
        return load
    node, a = held
    zero = tuple(r.fresh(n, "z") for n in r.shape(node))
    base, put = r.read(a["self"], zero, r.position[node]), r.coerce(r.scalar(a["value"]), node.meta["val"].dtype)
    ends = [E.constant(base), E.constant(put)]
    if None in ends or ends[0] == ends[1] or ends[0] != ends[0]:
        return load
    return E.where(E.not_(E.eq(load, base)), put, base)


def at_own_ids(r: RowReader, e: Expr) -> Expr:
    """A scattered matrix that is read at one of its own ids is what was set there."""
    table = {}
    for x in E.loads(e):
        own = E.operands(x)[-1]
        source = source_of_scatter(r, x) if E.op_of(own) == "load" else None
        if source is not None:
            ids, values, k, lead = source
            mine = E.operands(own)[-1]
            if r.read(ids, (*lead, mine), r.position[ids] + 1) == own:
                table[x] = E.substitute(values, {k: mine})
    return E.substitute(e, table) if table else e


Side = tuple[fx.Node, Index]
SUMS = ("einsum", "matmul", "mm", "bmm")


def hot(r: RowReader, x: fx.Node, idx: Index, position: Expr, at: int) -> Expr | None:
    """ids where x[idx] is 1 if ids == position and else 0, and ids are proven to be such positions."""
    if not _compares(r, x):
        return None
    e = r.read(x, idx, at)
    while E.op_of(e) in E.CASTS:
        (e,) = E.operands(e)
    if E.op_of(e) == "where" and [E.constant(v) for v in E.operands(e)[1:]] == [1, 0]:
        ids = compared(r.truth(E.operands(e)[0]), position)
    else:
        ids = _set_to_one(r, e) if E.op_of(e) == "load" and E.operands(e)[-1] == position else None
    return ids if ids is not None and in_range(r, ids, r.ranges[position]) else None


def _compares(r: Reader, x: fx.Node) -> bool:
    """Is x, moved and cast at most, a comparison or a one-hot?"""
    while x.op == "call_function" and r.name(x) in (*MOVEMENT, *KEPT, *CASTS) and x.all_input_nodes:
        x = x.all_input_nodes[0]
    return x.op == "call_function" and r.name(x) in ("one_hot", "eq", "scatter", "where")


def _set_to_one(r: RowReader, e: Expr) -> Expr | None:
    """ids[t] where a load is zeros.scatter(-1, ids[:, None], 1)[t, .]"""
    if (held := scattered(r, e)) is None:
        return None
    node, a = held
    where, rank = E.operands(e)[1:], len(r.shape(node))
    one = tuple(r.fresh(n, "z") for n in r.shape(a["index"]))
    value = r.operand(a["src"] if isinstance(a.get("src"), fx.Node) else a["value"], one, r.position[node])
    zero = r.read(a["self"], where, r.position[node])
    if axis(a["dim"], rank) != rank - 1 or r.shape(a["index"]) != (*r.shape(node)[:-1], 1):
        return None
    if E.constant(value) != 1 or E.constant(zero) != 0:
        return None
    return E.as_int(r.read(a["index"], (*where[:-1], E.number(0)), r.position[node]))


def chosen_sides(r: RowReader, node: fx.Node, idx: Index) -> tuple[list[Side], list[Expr]]:
    """([(operand, its index)], the summed positions) of a contraction, without its one-hots."""
    sides, bound = operands_of(r, node, idx)
    sides = [factor for side in sides for factor in _factors(r, *side, r.position[node])]
    for side in list(sides):
        for position in [b for b in bound if b in side[1]]:
            if (ids := hot(r, *side, position, r.position[node])) is not None:
                sides = [(x, tuple(E.substitute(i, {position: ids}) for i in at)) for x, at in sides if (x, at) != side]
                bound = [b for b in bound if b != position]
                break
    return sides, bound


def _factors(r: RowReader, node: fx.Node, idx: Index, at: int) -> list[Side]:
    """What an operand is a product of, where it is one and nothing is written to it before it is used."""
    if node.op != "call_function" or not without_sum(r, node) or r.cut(node) or r.changed(node, at):
        return [(node, idx)]
    here = r.position[node]
    return [factor for side in operands_of(r, node, idx)[0] for factor in _factors(r, *side, here)]


def selected(r: RowReader, node: fx.Node, idx: Index) -> Side | None:
    """Where an element of one_hot(ids) @ x lies in x."""
    if node.op != "call_function" or r.name(node) not in SUMS or r.cut(node):
        return None
    try:
        sides, bound = chosen_sides(r, node, idx)
    except Refuse:
        return None
    return sides[0] if len(sides) == 1 and not bound else None


def selected_from(r: RowReader, node: fx.Node) -> fx.Node | None:
    """x where a node is one_hot(ids) @ x."""
    if node.op != "call_function" or r.name(node) not in SUMS:
        return None
    side = selected(r, node, tuple(r.fresh(n, "i") for n in r.shape(node)))
    return None if side is None else side[0]
