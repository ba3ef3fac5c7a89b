"""The experts of a sum: one part per term, in columns that differ in the expert's number only."""

from __future__ import annotations

import dataclasses

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .chosen import Chosen, Token, Unchosen, chosen, implied, numbered
from .columns import Column, Part
from .expert import Expert, bias_of, expert_number, fixing, read_expert, with_weighed_input
from .gates import with_gates
from .ids import compared
from .projections import Weight, is_row
from .routing import without_rows
from .rows import RowReader, settle
from .terms_of import Term
from .token_rows import is_condition


class Shared(Refuse):
    """The results of these nodes are of all tokens, others of those that chose them."""

    def __init__(self, nodes: set[fx.Node], node: fx.Node):
        super().__init__("a shared expert's result is added in between", node)
        self.nodes = nodes


def chosen_parts(r: RowReader, terms: list[Term], token: Token, d: Expr, anchor: fx.Node) -> list[Part]:
    """The parts of terms with a projection, all of which tokens chose."""
    parts, unchosen = [], {}
    for t in terms:
        try:
            part = part_of(r, without_rows(r, t, token, r.position[anchor]), token, d)
        except Unchosen as error:
            assert t.product is not None
            unchosen[t.product[0]] = error
            continue
        if t.whole and not places_choose(r, t, part, token, r.position[anchor]):
            raise Refuse("results are replaced also where an expert gives none", anchor)
        parts.append(part)
    if not parts:
        raise next(iter(unchosen.values()), Refuse("no expert's result reaches it", anchor))
    if unchosen:
        raise Shared(set(unchosen), anchor)
    return parts


def places_choose(r: RowReader, term: Term, part: Part, token: Token, at: int, k: Expr | None = None) -> bool:
    """Do the places where a result is put say by themselves which tokens are the expert's?

    What is multiplied by zero elsewhere, before or after the expert, replaces others there all the same.
    """
    if part.number is None:
        return bool(E.loads(part.formula))  # a row for each pair
    bare = without_rows(r, dataclasses.replace(term, factors=(), product=None), token, at)
    try:
        found = canonical(r, chosen(r, bare.under([] if k is None else [k]), sympy.Integer(part.number), token, k))
    except Unchosen:
        return False
    return found == dataclasses.replace(part.choice, factors=())


def part_of(r: RowReader, term: Term, token: Token, d: Expr, own: tuple[Expr, int] | None = None) -> Part:
    """The part of a term.

    own: (k, the expert's number) where no ids tell its tokens, but each token has all K experts
    """
    assert term.product is not None
    node, idx = term.product
    expert = read_expert(r, node, idx, term, token.t, d)
    if expert.inside:
        # The last projection is linear.
        conditions = [E.operands(f)[0] for f in expert.inside if is_condition(f)]
        weights = [f for f in expert.inside if not is_condition(f)]
        guards, factors = (*term.guards, *conditions), (*term.factors, *weights)
        term = without_rows(r, dataclasses.replace(term, guards=guards, factors=factors), token, r.position[node])
    if own:
        term = with_gates(r, term)
    formula = expert_number(expert.down)
    expert, term = _without_weighed_input(r, expert, term, token, formula)
    k, number = own or (None, compared_number(term))
    if formula is not None:
        number, k = None, formula if own else None
    elif number is None:
        alike = "the conditions of the experts are alike, or not on data"
        raise Unchosen(f": {alike if term.guards else 'every expert gets every token'}", expert.node)
    else:
        formula, term = sympy.Integer(number), term.under([] if k is None else [k])
    found = chosen(r, term, formula, token, k)
    if number is None:
        expert = numbered_alike(expert, found.ids, formula)
    whole = term.put({formula: found.ids}).whole if formula in term.bound else term.whole
    canon = canonical(r, found)
    return Part(canon, number, None if number is not None else formula, expert, whole, found.k, term.puts)


def _without_weighed_input(
    r: RowReader, e: Expert, term: Term, token: Token, number: Expr | None
) -> tuple[Expert, Term]:
    """What its rows are multiplied by says which of them count, or is their weight: (the expert, the term)."""
    if number is None and compared_number(term) is None and not e.weighed:
        # Every expert reads all tokens: what its rows are multiplied by may say which are its own.
        e = with_weighed_input(r, e, token.t, fixing(r, term), term)
    elif number is None and not e.weighed:
        e = _unmasked(r, e, term, token)
    if e.weighed:
        weighed = tuple(f for f in e.weighed if not _holds(r, f, term, number))
        e = dataclasses.replace(e, weighed=weighed)
    if term.factors and e.weighed and all(map(is_condition, e.weighed)):
        check_keeps_zero(e)
        cleared = term.under(guards=[E.operands(f)[0] for f in e.weighed])
        return dataclasses.replace(e, weighed=()), without_rows(r, cleared, token, r.position[e.node])
    if e.weighed:
        if term.factors:
            raise Refuse("the inputs and the results of an expert are both weighed", e.node)
        if number is None:
            gets = compared_number(term) is not None
        else:
            gets = any(E.op_of(x) == "load" for x in E.walk(number)) or any(compared(g, number) for g in term.guards)
        if not gets:
            check_keeps_zero(e)
        term = without_rows(r, dataclasses.replace(term, factors=e.weighed), token, r.position[e.node])
    return e, term


def _unmasked(r: RowReader, expert: Expert, term: Term, token: Token) -> Expert:
    """The same of the tokens themselves, where those that are not its own are cleared before it."""
    try:
        found = with_weighed_input(r, expert, token.t, fixing(r, term), term)
    except Refuse:
        return expert
    held = found.weighed and all(_holds(r, f, term, None) for f in found.weighed)
    return dataclasses.replace(found, weighed=()) if held else expert


def numbered_alike(e: Expert, ids: Expr, formula: Expr) -> Expert:
    """The same, where a weight that is read at the token's id is read at its expert's number, which that is."""

    def alike(w: Weight) -> Weight:
        return dataclasses.replace(w, rest=E.substitute(w.rest, {ids: formula}))

    biases = tuple(map(alike, e.up_biases))
    return dataclasses.replace(e, ups=tuple(map(alike, e.ups)), up_biases=biases)


def _holds(r: RowReader, factor: Expr, term: Term, formula: Expr | None) -> bool:
    """Is a factor of the input 1 wherever the term counts?"""
    if not is_condition(factor):
        return False
    wanted, number = E.operands(factor)[0], compared_number(term) if formula is None else None
    expert = formula if number is None else sympy.Integer(number)
    if expert is None:
        return wanted in term.guards
    ids = [i for g in term.guards if (i := compared(g, expert)) is not None]
    return wanted in term.guards or any(implied(r, wanted, i, expert) for i in ids)


def compared_number(term: Term) -> int | None:
    """The number that the ids of an expert's tokens are compared with, if they are."""
    for g in term.guards:
        if (found := numbered(g)) is not None:
            return found[1]
    return None


def check_keeps_zero(e: Expert) -> None:
    """A token that an expert does not get counts as zeros: they must give zeros."""
    zero = E.constant(E.substitute(e.act, {E.GATE: E.number(0.0), E.UP: E.number(0.0)}))
    if e.up_biases or e.down_bias or zero != 0:
        raise Refuse("an expert's input is weighed, and zeros do not give zeros", e.node)


def canonical(r: RowReader, c: Chosen) -> Chosen:
    """The same with one name for k, so that choices can be compared."""
    if c.k == 0:
        return c
    k = E.index(f"choice_{r.ranges[c.k]}")
    r.ranges[k] = r.ranges[c.k]

    def put(es: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(sorted((E.substitute(e, {c.k: k}) for e in es), key=sympy.default_sort_key))

    return Chosen(E.substitute(c.ids, {c.k: k}), k, put(c.counts), put(c.factors))


def add_biases(r: RowReader, parts: list[Part], plain: list[Term], token: Token, d: Expr, at: int) -> list[Term]:
    """Terms without a projection that belong to an expert are its last bias; the others are left."""
    return [t for t in (without_rows(r, term, token, at) for term in plain) if not _is_added(r, parts, t, token, d)]


def _is_added(r: RowReader, parts: list[Part], term: Term, token: Token, d: Expr) -> bool:
    """Is a term a last bias? It is added to its expert."""
    held = [x for x in term.factors if E.mentions(x, d)]
    if len(held) != 1 or E.op_of(held[0]) != "load":
        return False
    bias = bias_of(r, held[0], d, parts[0].expert.down.columns)
    rest = dataclasses.replace(term, factors=tuple(x for x in term.factors if x is not held[0]))
    for part in parts:
        if bias is None or part.expert.down_bias or not is_bias(r, part, rest, bias, token):
            continue
        own = expert_number(bias)
        # Both numbers are the token's id: the bias is read at the number of its part.
        number = bias.rest if own is None else E.substitute(bias.rest, {own: part.formula})
        part.expert = dataclasses.replace(part.expert, down_bias=dataclasses.replace(bias, rest=number))
        return True
    return False


def is_bias(r: RowReader, p: Part, term: Term, bias: Weight, token: Token) -> bool:
    """Is the term chosen, without its load, as the part is?"""
    try:
        number = expert_number(bias)
        if (number is None) != (p.number is not None):
            return False
        expert = number if p.number is None else sympy.Integer(p.number)
        if p.has_all:
            term = with_gates(r, term)
            k = expert if p.number is None else p.k
            found = chosen(r, term.under([p.k] if p.number is not None else []), expert, token, k)
        else:
            found = chosen(r, term, expert, token)
        return canonical(r, found) == p.choice
    except Refuse:
        return False


@dataclasses.dataclass(frozen=True)
class Base:
    """What the experts' results are added to; puts: the operations that put results in its place (see Term)."""

    node: fx.Node
    puts: tuple[str, ...]


def base_of_sum(r: RowReader, plain: list[Term], token: Token, d: Expr, width: Expr, anchor: fx.Node) -> Base | None:
    """A tensor that the experts' results are added to, as it is, or that they replace where there are any."""
    if not plain:
        return None
    term, *others = plain
    if not others and len(term.factors) == 1 and not (term.bound or term.guards or term.links):
        (load,) = term.factors
        if E.op_of(load) == "load":
            name, *idx = E.operands(load)
            node = r.nodes[name.name[1:]]
            if is_row(r, node, tuple(settle(i, r.bounds) for i in idx), token.t, d, width):
                return Base(node, term.puts)
    raise Refuse("something else than results of experts is added", anchor)


def check_whole(r: RowReader, columns: list[Column], base: Base | None, anchor: fx.Node, alone: bool) -> None:
    """Experts written one by one are 0 to E-1, and alike; rows that were replaced hold one result each.

    alone: what else the router can choose is no expert that was not found, but means that a token has none; also
    between the experts and before the first.
    A base is added to everywhere, or replaced in all rows of all experts: then it stays for tokens without one.
    """
    if base is not None and base.puts:
        puts = [p.puts for c in columns for p in c.parts]
        if columns[0].single or sorted(puts) != sorted((name,) for name in base.puts):
            raise Refuse("results replace a part of what is not zero", anchor)
    for c in columns:
        numbers = [p.number for p in c.parts]
        if not (c.single or alone) and numbers != list(range(len(numbers))):
            raise Refuse(f"the experts are {numbers}, not 0 to {len(numbers) - 1} once each", anchor)
        if len({p.expert.kind() for p in c.parts}) > 1:
            raise Refuse("the experts differ in width, activation or what is applied to their results", anchor)
        low, high = r.bounds(c.choice.ids)
        if not (c.single or alone) and low == 0 and high + 1 != len(numbers):
            raise Refuse(f"the router chooses among {high + 1} experts, of which {len(numbers)} are added up", anchor)
    if len({(p.expert.x, bool(p.expert.weighed)) for c in columns for p in c.parts}) > 1:
        raise Refuse("the experts read different tokens, or weigh them in different ways", anchor)
    for column, part, whole in ((c, p, p.whole) for c in columns for p in c.parts):
        seen = set().union(*(e.free_symbols for e in whole))
        added = base is not None and not base.puts
        if whole and (len(columns) > 1 or added or (column.choice.k != 0 and part.k not in seen)):
            raise Refuse("results replace each other where a token has several experts", anchor)
