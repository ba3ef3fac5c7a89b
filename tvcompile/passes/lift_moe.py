"""Find every mixture of experts in a graph and prove what it computes. Reads only.

    for e: tok, k = where(ids == e); h = act(x[tok] @ W1[e]); out.index_add_(0, tok, (h @ W2[e]) * w[tok, k, None])
    ->  MoEMatch(spec="act = ...", x, ids, w, W1, W2)

Anchor: the last operation that adds up results of experts. An expert is two projections with formulas between; which
tokens it gets is proven from the rows it reads and from where its results are added (sums, routing, projections).
Refused: results or activations used elsewhere; experts that differ; sums that are no weighted sums of experts; rows that
are not proven to be the token's own; memory written in between; gradient mode changing in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..moe_spec import MoESpec
from ..spec import Choices, MoEMatch, Refusal, Refuse, Weights, where_of
from .expert import Expert, bias_of, expert_number, read_expert, stacked
from .facts import Facts
from .movement import MOVEMENT, SPLITS, unravel
from .pointwise import POINTWISE
from .projections import Weight, in_range, number_of, places
from .read import Unreadable
from .routing import Chosen, Token, chosen, compared, without_rows
from .rows import GROUPED, RowReader, settle
from .sums import CASTS, THROUGH, Sums, Term, chooses

PRODUCTS = ("linear", "addmm", "mm", "bmm", "matmul", "einsum", "baddbmm", *GROUPED)
MOVES = frozenset(MOVEMENT) | frozenset(SPLITS)


def lift_moe(graph: fx.Graph) -> tuple[list[MoEMatch], list[Refusal]]:
    """Every mixture of experts of the graph, and why what looks like one is none."""
    facts = Facts(graph)
    r = RowReader(graph, facts.grad)
    matches: list[MoEMatch] = []
    refusals: list[Refusal] = []
    seen: set[fx.Node] = set()
    for cone, ends in cones(r, graph):
        match, refusal = lift_cone(r, facts, cone, ends)
        if match is not None:
            matches.append(match)
        elif refusal is not None:
            refusals.append(refusal)
        seen |= set(cone)
    for node in graph.nodes:
        if node.op == "call_function" and node not in seen and _looks_routed(r, node) and _computed(r, node):
            why = "no mixture of experts: the rows that are added are not two projections with formulas in between"
            refusals.append(Refusal(str(node.target), why, where_of(node)))
            seen |= set(_askers_of(node))
    return matches, refusals


ADDS = ("index_add", "scatter_add", "index_put")


def _looks_routed(r: RowReader, node: fx.Node) -> bool:
    """Are rows added up by a tensor's numbers, or multiplied by a column that compares ids?"""
    if r.name(node) != "mul":
        return r.name(node) in ADDS and node.meta["val"].dtype.is_floating_point
    columns = [
        x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor) and x.meta["val"].dim() > 1
    ]
    columns = [x for x in columns if r.shape(x)[-1] == 1 != r.shape(node)[-1]]
    return any(_says_which(r, x) for x in columns)


def _askers_of(node: fx.Node) -> set[fx.Node]:
    """What follows from a node: one refusal speaks for a whole loop."""
    found, queue = set(), [node]
    while queue and len(found) < 500:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found


def _computed(r: RowReader, node: fx.Node) -> bool:
    """Are the rows that are added computed by a projection, not far away?"""
    seen, queue = set(), list(node.all_input_nodes)
    while queue and len(seen) < 60:
        n = queue.pop(0)
        if n not in seen and n.op == "call_function":
            seen.add(n)
            if r.name(n) in PRODUCTS:
                return True
            queue += n.all_input_nodes
    return False


# Where experts may be


def cones(r: RowReader, graph: fx.Graph) -> Iterator[tuple[list[fx.Node], set[fx.Node]]]:
    """(nodes that last projections reach by linear operations, those projections), each set that hangs together."""
    inner = {n for n in graph.nodes if n.op == "call_function" and r.name(n) in PRODUCTS and _has_weight(r, n)}
    lasts = {n for n in inner if _activated(r, n, inner)}
    owner: dict[fx.Node, int] = {}
    groups: dict[int, tuple[set[fx.Node], set[fx.Node]]] = {}
    for k, last in enumerate(sorted(lasts, key=r.position.__getitem__)):
        reached = _reached(r, last, owner, lasts)
        touched = {owner[n] for n in reached if n in owner}
        groups[k] = ({last, *reached}, {last})
        for other in touched:
            cone, ends = groups.pop(other)
            groups[k] = (groups[k][0] | cone, groups[k][1] | ends)
        owner |= dict.fromkeys(groups[k][0], k)
    for cone, ends in groups.values():
        if routed(r, cone, ends):
            yield sorted(cone, key=r.position.__getitem__), ends


def _has_weight(r: RowReader, n: fx.Node) -> bool:
    """Is one operand an input of the graph, moved, gathered or cast at most?"""
    val = n.meta.get("val")
    if not (isinstance(val, torch.Tensor) and val.dtype.is_floating_point and val.dim() > 1):
        return False
    return any(_is_weight(r, x) for x in n.all_input_nodes)


def _is_weight(r: RowReader, x: fx.Node) -> bool:
    while x.op == "call_function" and (r.name(x) in MOVES or r.name(x) in CASTS) and x.all_input_nodes:
        if r.name(x) == "embedding":
            return False
        x = x.all_input_nodes[0]
    val = x.meta.get("val")
    return x.op in ("placeholder", "get_attr") and isinstance(val, torch.Tensor) and val.dim() > 1


def _activated(r: RowReader, last: fx.Node, inner: set[fx.Node]) -> bool:
    """Does another projection reach the input through operations that are computed element by element?"""
    seen, queue = set(), list(last.all_input_nodes)
    while queue:
        n = queue.pop()
        if n in seen or n.op != "call_function" or not isinstance(n.meta.get("val"), (torch.Tensor, tuple, list)):
            continue
        seen.add(n)
        if n in inner:
            return True
        joins = (
            r.name(n) in ("add", "sub") and sum(_wide(r, x, n) and not _is_weight(r, x) for x in n.all_input_nodes) > 1
        )
        if (r.name(n) in POINTWISE or r.name(n) in MOVES) and not joins and len(seen) < 200:
            queue += n.all_input_nodes
    return False


def _reached(r: RowReader, last: fx.Node, owner: dict, lasts: set[fx.Node]) -> set[fx.Node]:
    """What the results flow into by linear operations, up to where something else is added."""
    found, queue = set(), list(last.users)
    while queue:
        n = queue.pop()
        if n in found or n.op != "call_function" or n in lasts:
            continue
        if r.name(n) not in THROUGH and r.name(n) not in MOVES:
            continue
        found.add(n)
        others = [x for x in n.all_input_nodes if x not in found and x is not last and x not in owner]
        ends_here = r.name(n) == "add" and any(
            _wide(r, x, n) for x in others if x not in lasts and r.name(x) != "index"
        )
        if not ends_here:
            queue += n.users
    return found


def _wide(r: RowReader, x: fx.Node, n: fx.Node) -> bool:
    """Is x as large as n, and no zeros?"""
    return isinstance(x.meta.get("val"), torch.Tensor) and r.shape(x) == r.shape(n) and not _zeros(x)


def _zeros(x: fx.Node) -> bool:
    return "zeros" in str(x.target)


def routed(r: RowReader, cone: set[fx.Node], ends: set[fx.Node]) -> bool:
    """Is there a sign of routing: several experts, stacked weights, rows gathered or added up by a tensor?"""
    signs = ("index_add", "scatter_add", "index_put", "gather", "index")
    if len(ends) > 1 or any(r.name(n) in signs for n in cone if n.op == "call_function"):
        return True
    if any(r.name(n) == "mul" and any(_says_which(r, x) for x in n.all_input_nodes if x not in cone) for n in cone):
        return True
    return any(r.name(n) in (*GROUPED, "bmm", "einsum", "baddbmm") or _stacked(n) for n in ends)


def _says_which(r: RowReader, x: fx.Node) -> bool:
    if not isinstance(x.meta.get("val"), torch.Tensor):
        return False
    return chooses(r, r.read(x, tuple(r.fresh(n, "p") for n in r.shape(x)), r.position[x] + 1))


def _stacked(n: fx.Node) -> bool:
    return any(isinstance(x.meta.get("val"), torch.Tensor) and x.meta["val"].dim() > 2 for x in n.all_input_nodes[1:])


# One mixture


def lift_cone(r: RowReader, facts: Facts, cone: list[fx.Node], ends: set[fx.Node]):
    """(match, None) at the last node of the cone that is one, or (None, the reason at that node).

    A sum that holds something else too, as the residual, is taken only if no earlier node holds the experts alone.
    """
    found: MoEMatch | None = None
    sums = Sums(r, set(cone), ends)
    reason: tuple[Refuse, fx.Node] | None = None
    for anchor in reversed(cone):
        if r.name(anchor) in MOVES or r.name(anchor) in CASTS or anchor in ends and len(cone) > 1:
            continue
        if not isinstance(anchor.meta.get("val"), torch.Tensor) or not anchor.users:
            continue
        try:
            match = lift_at(r, facts, sums, anchor)
            if match.base is None:
                return match, None
            found = found or match
        except (Refuse, Unreadable) as error:
            if reason is None or not isinstance(error, Unreadable):
                reason = reason or (error, anchor)
    if found is not None or reason is None:
        return found, None
    error, anchor = reason
    place = getattr(error, "node", None) or anchor
    return None, Refusal(str(anchor.target), f"no mixture of experts: {error}", where_of(place))


def lift_at(r: RowReader, facts: Facts, sums: Sums, anchor: fx.Node) -> MoEMatch:
    """The mixture whose result is the value of `anchor`."""
    *lead, width = r.shape(anchor)
    size = sympy.expand(sympy.Mul(*lead))
    token = Token(r.fresh(size, "t"), size)
    d, at = r.fresh(width, "d"), r.position[anchor]
    idx = (*unravel(token.t, lead, r.bounds), d)
    sums.d = d
    terms = sums.of(anchor, idx, at + 1)
    parts = [part_of(r, without_rows(r, t, token, at), token, d) for t in terms if t.product]
    if not parts:
        raise Refuse("no expert's result reaches it", anchor)
    plain = add_biases(r, parts, [t for t in terms if not t.product], token, d, at)
    base = base_of_sum(r, plain, token, d, width, anchor)
    columns = in_columns(parts)
    check_whole(r, columns, base, anchor)
    return build(r, facts, anchor, token, columns, base)


@dataclasses.dataclass
class Part:
    """One term: the expert, its number where experts are written one by one, and which tokens choose it."""

    choice: Chosen
    number: int | None
    formula: Expr | None
    expert: Expert
    whole: tuple[Expr, ...]
    k: Expr


@dataclasses.dataclass
class Column:
    """Parts that differ in the expert's number only."""

    choice: Chosen
    parts: list[Part]

    @property
    def single(self) -> bool:
        return self.parts[0].number is None


def part_of(r: RowReader, term: Term, token: Token, d: Expr) -> Part:
    expert = read_expert(r, *term.product, term, token.t, d)
    formula = expert_number(expert.down)
    number = None
    if formula is None:
        number = compared_number(term, expert)
        formula = sympy.Integer(number)
    if expert.weighed:
        if term.factors:
            raise Refuse("the inputs and the results of an expert are both weighed", expert.node)
        gets = any(E.op_of(x) == "load" for x in E.walk(formula)) or any(compared(g, formula) for g in term.guards)
        if not gets:
            check_keeps_zero(expert)
        term = without_rows(r, dataclasses.replace(term, factors=expert.weighed), token, r.position[expert.node])
    found = chosen(r, term, formula, token)
    whole = term.put({formula: found.ids}).whole if formula in term.bound else term.whole
    return Part(canonical(r, found), number, None if number is not None else formula, expert, whole, found.k)


def compared_number(term: Term, expert: Expert) -> int:
    """The number that the ids of an expert's tokens are compared with."""
    for g in term.guards:
        if E.op_of(g) == "eq":
            number, rest = E.operands(g)[0].as_coeff_Add()
            sign, load = rest.as_coeff_Mul()
            if E.op_of(load) == "load" and abs(sign) == 1:
                return int(-number * sign)
    raise Refuse("no comparison with the ids says which tokens an expert gets", expert.node)


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
    left = []
    for term in plain:
        settled = without_rows(r, term, token, at)
        held = [x for x in settled.factors if E.mentions(x, d)]
        owner = None
        if len(held) == 1 and E.op_of(held[0]) == "load":
            bias = bias_of(r, held[0], d, parts[0].expert.down.columns)
            rest = dataclasses.replace(settled, factors=tuple(x for x in settled.factors if x is not held[0]))
            free = [p for p in parts if bias and not p.expert.down_bias]
            owner = next((p for p in free if (same := is_bias(r, p, rest, bias, token)) is not None), None)
        if owner:
            rest = E.substitute(bias.rest, {same: owner.k}) if same != 0 else bias.rest
            owner.expert = dataclasses.replace(owner.expert, down_bias=dataclasses.replace(bias, rest=rest))
        else:
            left.append(settled)
    return left


def is_bias(r: RowReader, p: Part, term: Term, bias: Weight, token: Token) -> Expr | None:
    """The term's k where it is chosen, without its load, as the part is."""
    try:
        number = expert_number(bias)
        if (number is None) != (p.number is not None):
            return None
        found = chosen(r, term, number if p.number is None else sympy.Integer(p.number), token)
        return found.k if canonical(r, found) == p.choice else None
    except Refuse:
        return None


def base_of_sum(r: RowReader, plain: list[Term], token: Token, d: Expr, width: Expr, anchor: fx.Node) -> fx.Node | None:
    """A tensor that the experts' results are added to, as it is."""
    if not plain:
        return None
    (term, *others), want = plain, sympy.expand(token.t * width + d)
    if not others and len(term.factors) == 1 and not (term.bound or term.guards or term.links):
        (load,) = term.factors
        if E.op_of(load) == "load":
            name, *idx = E.operands(load)
            node = r.nodes[name.name[1:]]
            if sympy.expand(number_of(r, node, tuple(settle(i, r.bounds) for i in idx)) - want) == 0:
                return node
    raise Refuse("something else than results of experts is added", anchor)


def in_columns(parts: list[Part]) -> list[Column]:
    columns: list[Column] = []
    for p in parts:
        column = next((c for c in columns if c.choice == p.choice and not c.single and p.number is not None), None)
        if column is None or any(q.number == p.number for q in column.parts):
            columns.append(Column(p.choice, [p]))
        else:
            column.parts.append(p)
    for c in columns:
        c.parts.sort(key=lambda p: p.number or 0)
    return columns


def check_whole(r: RowReader, columns: list[Column], base: fx.Node | None, anchor: fx.Node) -> None:
    """Experts written one by one are 0 to E-1, and alike; rows that were replaced hold one result each."""
    for c in columns:
        numbers = [p.number for p in c.parts]
        if not c.single and numbers != list(range(len(numbers))):
            raise Refuse(f"the experts are {numbers}, not 0 to {len(numbers) - 1} once each", anchor)
        if len({p.expert.kind() for p in c.parts}) > 1:
            raise Refuse("the experts differ in width, activation or what is applied to their results", anchor)
        ids = c.choice.ids
        router = places(r, r.nodes[E.operands(ids)[0].name[1:]]) if E.op_of(ids) == "load" else None
        if not c.single and router is not None and router != len(numbers):
            raise Refuse(f"the router chooses among {router} experts, of which {len(numbers)} are added up", anchor)
    if len({(p.expert.x, bool(p.expert.weighed)) for c in columns for p in c.parts}) > 1:
        raise Refuse("the experts read different tokens, or weigh them in different ways", anchor)
    for column, part, whole in ((c, p, p.whole) for c in columns for p in c.parts):
        seen = set().union(*(e.free_symbols for e in whole))
        if whole and (len(columns) > 1 or base is not None or (column.choice.k != 0 and part.k not in seen)):
            raise Refuse("results replace each other where a token has several experts", anchor)


def build(
    r: RowReader, facts: Facts, anchor: fx.Node, token: Token, columns: list[Column], base: fx.Node | None
) -> MoEMatch:
    stacks = [weights_of(r, c) for c in columns]
    if any(s != stacks[0] for s in stacks[1:]):
        raise Refuse("the choices of a token go through different experts", anchor)
    first = columns[0].parts[0].expert
    choices = []
    for c in columns:
        ids, k, counts, factors = c.choice.ids, c.choice.k, c.choice.counts, c.choice.factors
        count = sympy.Integer(count_of(r, c))
        wraps = int(count) if c.single and not in_range(r, ids, count) else 0
        choices.append(Choices(ids, k, r.ranges.get(k, sympy.Integer(1)), counts, factors, wraps))
    dtype, out = first.x.meta["val"].dtype, anchor.meta["val"].dtype
    out_text = "" if out == dtype else str(out).removeprefix("torch.")
    spec = MoESpec(first.act, first.layout, "input" if first.weighed else "output", out_text)
    region = check_region(r, facts, anchor, [n for c in columns for p in c.parts for n in p.expert.nodes])
    match = MoEMatch(
        spec, anchor, region, first.x, token.t, token.size, tuple(choices), *stacks[0], base, facts.saves(anchor)
    )  # fmt: skip
    for node in (r.nodes[name] for name in match.read()):
        if r.changed_between(node, r.used_at.get(node, r.position[node]) - 1, r.position[anchor]):
            raise Refuse(f"{node.name} is written to between its use and the sum of the experts' results", node)
    return match


def count_of(r: RowReader, c: Column) -> int:
    """E"""
    if not c.single:
        return len(c.parts)
    w = c.parts[0].expert.down
    step = int(w.rest.coeff(c.parts[0].formula))
    inside = [s for s in (w.feature, w.column) if s > step]
    return (min(inside) if inside else int(sympy.Mul(*r.shape(w.node)))) // step


def weights_of(r: RowReader, c: Column) -> tuple[tuple[Weights, ...], ...]:
    """up, down, up_bias, down_bias"""
    experts, formula, count = [p.expert for p in c.parts], c.parts[0].formula, count_of(r, c)

    def each(roles: list[list[Weight]]) -> tuple[Weights, ...]:
        return tuple(stacked(r, list(ws), formula, count) for ws in zip(*roles))

    biases = [[e.down_bias] * bool(e.down_bias) for e in experts]
    if len({e.down_bias is None for e in experts}) > 1:
        raise Refuse("some experts have a bias, others have none", experts[0].node)
    return (
        each([e.ups for e in experts]),
        each([[e.down] for e in experts]),
        each([e.up_biases for e in experts]),
        each(biases),
    )


def check_region(r: RowReader, facts: Facts, anchor: fx.Node, products: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes between the first projections and the anchor, proven to serve the anchor alone."""
    last = r.position[anchor]
    forward, queue = set(products), list(products)
    while queue:
        for user in queue.pop().users:
            if user not in forward and r.position.get(user, last + 1) <= last:
                forward.add(user)
                queue.append(user)
    backward, queue = {anchor}, [anchor]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source in forward and source not in backward:
                backward.add(source)
                queue.append(source)
    region = tuple(sorted(backward, key=r.position.__getitem__))
    for node in region[:-1]:
        for user in node.users:
            if user not in backward and isinstance(node.meta.get("val"), torch.Tensor) and _observes(user):
                where = "as a result" if user.op == "output" else f"at {where_of(user)}"
                raise Refuse(f"what an expert computes is used elsewhere too, {where}", node)
        if facts.grad[node] != facts.grad[anchor]:
            raise Refuse("gradient mode changes between the experts and the sum of their results", node)
    return region


def _observes(user: fx.Node) -> bool:
    return "sym_size" not in str(user.target)
