"""An expert: two projections and what is computed between them, read at one row.

y[row, d] = sum_f act(pre[row, ...]) * W2[e, f, d]        pre[row, c] = sum_h x[token, h] * W1[e, h, c] + b1[e, c]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse, Weights
from .contraction import added
from .ids import is_read
from .movement import Index, rounding, unravel
from .projections import Fix, Row, Weight, leaf_of, number_of, projection
from .rows import RowReader, settle
from .terms_of import Term
from .token_rows import token_row, weighed_by


@dataclasses.dataclass(frozen=True)
class Expert:
    """nodes: its products. weighed: factors of its input; inside: of what is activated."""

    node: fx.Node
    x: fx.Node
    act: Expr
    layout: str
    ups: tuple[Weight, ...]
    up_biases: tuple[Weight, ...]
    down: Weight
    nodes: tuple[fx.Node, ...]
    weighed: tuple[Expr, ...] = ()
    inside: tuple[Expr, ...] = ()
    down_bias: Weight | None = None

    def kind(self) -> tuple:
        """What experts of one mixture have in common."""
        biases = tuple((b.columns, b.column) for b in (*self.up_biases, *([self.down_bias] if self.down_bias else [])))
        shapes = tuple((w.inputs, w.columns, w.feature, w.column) for w in (*self.ups, self.down))
        return self.act, self.layout, shapes, biases, self.node.meta["val"].dtype


@dataclasses.dataclass(frozen=True)
class Unit:
    """A pre-activation: its product, index (None for the column), the column as a formula of f, the bias if any.

    start, width    the columns of the product that are the expert's; others may be those of other experts
    """

    node: fx.Node
    row: tuple
    column: Expr
    bias: Expr | None
    start: Expr = sympy.Integer(0)
    width: Expr = sympy.Integer(0)

    def within(self, r: RowReader, start: Expr, width: Expr) -> Unit | None:
        """The same where the expert's columns begin at `start`, if the product has so many."""
        total = r.shape(self.node)[self.row.index(None)]
        inside = E.within(start, total, r.bounds) and E.within(sympy.expand(start + width - 1), total, r.bounds)
        column = sympy.expand(self.column - start)
        return dataclasses.replace(self, column=column, start=start, width=width) if inside else None


def read_expert(r: RowReader, node: fx.Node, idx: Index, term: Term, t: Expr, d: Expr) -> Expert:
    fix = fixing(r, term)

    last = projection(r, node, idx, d)
    columns = [i for i, x in enumerate(idx) if x == d and d != 0]
    if not columns:
        raise Refuse("the features of a result are not the columns of a last projection", node)
    down = fixed(last.weight, fix, last.length, r.shape(node)[columns[-1] - len(idx)])
    hidden, at = last.x
    inside: tuple[Expr, ...] = ()
    while (split := weighed_by(r, *leaf_of(r, hidden, at, r.position[node])[:2], last.over, fix)) is not None:
        (hidden, at), factors = split
        inside = (*inside, *factors)
    formula = fix(r.read(hidden, at, r.position[node]))
    act, units = activation(r, formula, last.over, node)
    layout, units = arranged(r, units, last.over, last.length, node)
    wholes = units[:1] if layout in ("chunk", "interleave") else units
    ups, sources = [], set()
    for unit in wholes:
        column = r.fresh(unit.width, "c")
        p = projection(r, unit.node, tuple(unit.start + column if x is None else x for x in unit.row), column)
        ups.append(fixed(p.weight, fix, p.length, unit.width))
        x, at = p.x
        row = Row(p.over, p.length, t, fix, term, x.meta["val"].dtype)
        sources.add(token_row(r, x, tuple(map(fix, at)), r.position[unit.node], row))
    if len(sources) != 1:
        raise Refuse("the projections of an expert read different rows", node)
    (x, weighed) = sources.pop()
    biases = biases_of(r, units, layout, last.over, last.length, node)
    nodes = (node, *(u.node for u in units))
    return Expert(node, x, act, layout, tuple(ups), biases, down, nodes, weighed, inside)


def fixing(r: RowReader, term: Term) -> Fix:
    """What is known of the rows of a term, put into formulas."""
    known = dict(term.known)
    return lambda e: settle(E.substitute(e, known, r.bounds), r.bounds)


def fixed(w: Weight, fix: Fix, inputs: Expr, columns: Expr) -> Weight:
    if not (inputs.is_Integer and columns.is_Integer):
        raise Refuse("the width of an expert is not a number", w.node)
    return dataclasses.replace(w, rest=fix(w.rest), inputs=int(inputs), columns=int(columns))


def activation(r: RowReader, e: Expr, f: Expr, about: fx.Node) -> tuple[Expr, list[Unit]]:
    """A formula of products as a formula of symbols, and what the symbols stand for, ordered by node and column."""
    found = {x for x in E.walk(e) if E.op_of(x) == "dot" and E.mentions(x, f)}
    given = {x: added(r, r.nodes[E.operands(x)[0].name], E.operands(x)[1:]) for x in found}
    e = E.substitute(e, {x: E.apply("add", x, bias) for x, bias in given.items() if bias is not None})
    if not found:
        raise Refuse("no projection comes before the last one", about)
    biased: dict[Expr, Expr] = {}
    for x in E.walk(e):
        if E.op_of(x) == "add" and E.operands(x)[0] in found and E.op_of(E.operands(x)[1]) == "load":
            biased.setdefault(E.operands(x)[0], x)

    def place(x: Expr):
        node = r.nodes[E.operands(x)[0].name]
        start = sum(E.substitute(i, {f: sympy.Integer(0)}) for i in E.operands(x)[1:] if E.mentions(i, f))
        return r.position[node], int(start) if start.is_Integer else 0

    units, table = [], {}
    for k, x in enumerate(sorted(found, key=place)):
        name, *idx = E.operands(x)
        moving = [i for i, at in enumerate(idx) if E.mentions(at, f)]
        if len(moving) != 1:
            raise Refuse("an activation reads its projection at more than one column", about)
        whole = biased.get(x, x)
        row = tuple(None if i == moving[0] else at for i, at in enumerate(idx))
        units.append(Unit(r.nodes[name.name], row, idx[moving[0]], E.operands(whole)[1] if whole is not x else None))
        table[whole] = (E.UP, E.GATE)[0] if len(found) == 1 else (E.GATE, E.UP)[k] if k < 2 else x
    if len(units) > 2:
        raise Refuse("an activation reads more than two columns", about)
    act = without_casts(r.with_numbers(E.substitute(e, table)), about)
    if act.free_symbols - set(E.FLOATS) or E.loads(act):
        raise Refuse("an activation depends on more than its projections", about)
    for x in E.walk(act):
        if E.op_of(x) in ("dot", "dropout", "reduce", "softmax", "int"):
            raise Refuse(f"an activation holds a {E.op_of(x)}", about)
    return act, units


def without_casts(e: Expr, about: fx.Node) -> Expr:
    """Roundings to the experts' own dtype leave; coarser ones are the program's meaning."""
    allowed = rounding(about.meta["val"].dtype)
    casts = [x for x in E.walk(e) if E.op_of(x) in E.CASTS and e.free_symbols]
    for x in casts:
        if rounding(E.op_of(x)) > allowed:
            raise Refuse(f"an activation is rounded to {E.op_of(x)}", about)
    return E.substitute(e, {x: without_casts(E.operands(x)[0], about) for x in casts})


def arranged(r: RowReader, units: list[Unit], f: Expr, F: Expr, about: fx.Node) -> tuple[str, list[Unit]]:
    """(layout, units with their columns): of one product in halves or alternating, or of a product per unit."""
    columns = [sympy.expand(u.column) for u in units]
    if len(units) == 2 and units[0].node is units[1].node and units[0].row == units[1].row:
        gap, start = sympy.expand(columns[1] - columns[0]), E.substitute(columns[0], {f: sympy.Integer(0)})
        for layout, step, apart in (("chunk", 1, F), ("interleave", 2, sympy.Integer(1))):
            if gap == apart and sympy.expand(columns[0] - start) == step * f:
                both = [u.within(r, start, 2 * F) for u in units]
                if None not in both:
                    return layout, [u for u in both if u is not None]
    starts = [sympy.expand(c - f) for c in columns]
    if not any(E.mentions(s, f) for s in starts):
        each = [u.within(r, s, F) for u, s in zip(units, starts)]
        if None not in each:
            return ("plain", "separate")[len(units) - 1], [u for u in each if u is not None]
    raise Refuse("an activation pairs columns of its projections in a way that has no layout", about)


def biases_of(r: RowReader, units: list[Unit], layout: str, f: Expr, F: Expr, about: fx.Node) -> tuple[Weight, ...]:
    if all(u.bias is None for u in units):
        return ()
    if any(u.bias is None for u in units):
        raise Refuse("one of an expert's projections has a bias, the other has none", about)
    found = []
    for unit in units:
        name, *idx = E.operands(unit.bias)
        node = r.nodes[name.name[1:]]
        number = number_of(r, node, tuple(idx))
        step = sympy.cancel(number.coeff(f) / unit.column.coeff(f))
        rest = sympy.expand(number - step * unit.column)
        if rest.has(f) or not step.is_Integer or step == 0:
            raise Refuse("a bias is read at other columns than its projection", about)
        found.append(Weight(node, rest, 0, int(step), 1, int(unit.width)))
    if layout in ("chunk", "interleave"):
        if found[0] != found[1]:
            raise Refuse("the halves of a projection have different biases", about)
        found = found[:1]
    return tuple(found)


def with_weighed_input(r: RowReader, expert: Expert, t: Expr, fix: Fix, outer: Term) -> Expert:
    """The same expert, its rows taken for x[t] times what they are weighed by, where they are that."""
    shape = r.shape(expert.x)
    over, here = r.fresh(shape[-1], "h"), r.position[expert.x]
    where = (*unravel(t, shape[:-1], r.bounds), over)
    split = weighed_by(r, expert.x, where, over, fix)
    if split is None:
        return expert
    (rows, at_rows), factors = split
    row = Row(over, shape[-1], t, fix, outer, expert.x.meta["val"].dtype)
    x, rest = token_row(r, rows, at_rows, here, row)
    return dataclasses.replace(expert, x=x, weighed=(*factors, *rest))


def bias_of(r: RowReader, load: Expr, d: Expr, columns: int) -> Weight | None:
    """A last bias: a load whose number is linear in d."""
    name, *idx = E.operands(load)
    node = r.nodes[name.name[1:]]
    number = number_of(r, node, tuple(settle(i, r.bounds) for i in idx))
    step = number.coeff(d)
    rest = sympy.expand(number - step * d)
    return Weight(node, rest, 0, int(step), 1, columns) if step.is_Integer and step != 0 and not rest.has(d) else None


def expert_number(w: Weight) -> Expr | None:
    """The formula of the expert's number in a stacked weight; None where the position is a plain number."""
    position = w.rest.as_coeff_Add()[1]
    if position == 0:
        return None
    number = position.as_content_primitive()[1]
    if number.could_extract_minus_sign() or isinstance(number, sympy.Add) and not is_read(number):
        raise Refuse("the expert's number is no plain position in its weights", w.node)
    return number


def step_of(w: Weight, number: Expr) -> int:
    """How many elements lie between a weight of one expert and that of the next."""
    step = sympy.cancel(w.rest.as_coeff_Add()[1] / number)
    return int(step) if step.is_Integer else 0


def stacked(r: RowReader, ws: Sequence[Weight], formula: Expr | None, count: int, shared: bool) -> Weights:
    """The weights of all experts as reshape, permute and narrow of tensors of the graph.

    shared: other weights of the experts are parts of the same tensors, which then need not be read whole.
    """
    w = ws[0]
    numel = int(sympy.Mul(*r.shape(w.node)))
    if formula is not None:
        step = step_of(w, formula)
        start = sympy.expand(w.rest - step * formula)
        if step == 0:
            raise Refuse("a weight is the same for all experts", w.node)
    elif all(x.node is w.node for x in ws) and len(ws) > 1:
        step, start = int(ws[1].rest - w.rest), w.rest
        if step <= 0 or any(x.rest != start + k * step for k, x in enumerate(ws)):
            raise Refuse("the experts' weights do not lie one after the other", w.node)
    else:
        if len({x.node for x in ws}) != len(ws) or len({x.rest for x in ws}) != 1:
            raise Refuse("two experts share a weight", w.node)
        step, start = 0, w.rest
    steps = {name: s for name, s in (("e", step), ("h", w.feature), ("c", w.column)) if s}
    names = sorted(steps, key=lambda n: -steps[n])
    if not start.is_Integer:
        raise Refuse("the experts read a weight in a way that is no reshape of it", w.node)
    sizes, first, above, left = {}, {}, numel, int(start)
    for n in names:
        sizes[n], rest = divmod(above, steps[n])
        first[n], left = divmod(left, steps[n])
        above = steps[n]
        if rest:
            raise Refuse("the experts read a weight in a way that is no reshape of it", w.node)
    read, held = {"e": count, "h": w.inputs, "c": w.columns}, [n for n in ("e", "h", "c") if n in names]
    if above != 1 or left or any(first[n] + read[n] > sizes[n] for n in held):
        raise Refuse("the experts read a part of a weight that is no range of its rows and columns", w.node)
    more = "e" in sizes and sizes["e"] != count
    if (more or "h" in sizes and sizes["h"] != w.inputs) and (formula is not None and more or not shared):
        raise Refuse("the experts read a part of a weight, which holds more of them or of each", w.node)
    parts = tuple(None if read[n] == sizes[n] else (first[n], read[n]) for n in held)
    order = [names.index(n) for n in held]
    nodes = tuple(x.node for x in (ws if not step else ws[:1]))
    return Weights(nodes, tuple(sizes[n] for n in names), tuple(order), parts, bool(step))
