"""The parts that random mixtures of experts are written from, each as lines of source.

The parts agree on names: x [T,H], logits [T,E], w and ids [T,K], E, K, T. The experts' weights are w_up, w_down (and
w_gate), each one tensor or a list; biases are b_up and so on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

ROUTERS = [
    "w, ids = logits.softmax(-1).topk(K, -1)",
    "w, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float32), K)\nw = w.to(x.dtype)",
    "w, ids = torch.topk(logits, K, dim=-1)\nw = w.softmax(-1)",
    "w, ids = logits.sigmoid().topk(K, sorted=False)",
    "p = logits.sigmoid()\nids = (p + 0.1).topk(K)[1]\nw = p.gather(-1, ids) * 2.5",
    "w, ids = logits.softmax(-1).sort(-1, descending=True)\nw, ids = w[:, :K], ids[:, :K]",
    "w, ids = logits.float().softmax(-1).topk(K)",
]
ONE = ["w, ids = logits.softmax(-1).max(-1, keepdim=True)", "ids = logits.argmax(-1, keepdim=True)\nw = ids * 0 + 0.5"]
RENORMALISE = [
    "w = w / w.sum(-1, keepdim=True)",
    "w = w / (w.sum(dim=-1, keepdim=True) + 1e-20)",
    "w = F.normalize(w, p=1)",
]

# Before the tokens come to the experts.
COMPUTED = [
    "x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)",
    "x = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)",
    "x = F.layer_norm(x, x.shape[-1:])",
    "x = x + torch.tanh(x)",
]

GATED = {
    "silu": "F.silu({g}) * {u}",
    "gelu": "{u} * F.gelu({g})",
    "gelu_tanh": "F.gelu({g}, approximate='tanh') * {u}",
    "relu": "F.relu({g}) * {u}",
    "sigmoid": "{u} * {g}.sigmoid()",
    "by_hand": "{g} * torch.sigmoid({g}) * {u}",
    "clamped": "({u}.clamp(-2, 2) + 1) * {g}.clamp(max=2) * torch.sigmoid(1.702 * {g}.clamp(max=2))",
}
PLAIN = {
    "relu": "F.relu({u})",
    "gelu": "F.gelu({u})",
    "silu": "F.silu({u})",
    "relu2": "F.relu({u}).square()",
    "tanh": "torch.tanh({u})",
    "power": "F.relu({u}) ** 2",
}
SPLITS = {
    "chunk": ["g, u = {p}.chunk(2, -1)", "g, u = {p}.split({F}, dim=-1)", "g, u = {p}[..., :{F}], {p}[..., {F}:]"],
    "swapped": ["u, g = {p}.chunk(2, dim=-1)"],
    "interleave": ["g, u = {p}[..., ::2], {p}[..., 1::2]", "g, u = {p}.unflatten(-1, ({F}, 2)).unbind(-1)"],
}


@dataclass
class Writer:
    """The program so far, and what its experts are."""

    rng: random.Random
    lines: list[str] = field(default_factory=list)
    arguments: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    layout: str = "plain"
    act: str = ""
    order: str = "io"
    bias: bool = False
    own: bool = False

    def __call__(self, text: str, indent: int = 0) -> None:
        self.lines += ["    " * indent + line for line in text.split("\n")]

    def pick(self, *options):
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability


def start(w: Writer) -> None:
    """Sizes, the kind of experts, tokens."""
    rng = w.rng
    B, S, E = rng.choice([1, 2, 3]), rng.choice([1, 4, 7]), rng.choice([2, 3, 4])
    K = rng.randint(1, min(E, 3))
    if rng.random() < 0.1:  # sizes alike
        B, S, E, K = 2, 2, 4, 2
    w.sizes = {"B": B, "S": S, "T": B * S, "E": E, "K": K, "H": rng.choice([8, 16, 24]), "F": rng.choice([8, 16])}
    if rng.random() < 0.65:
        w.layout, w.act = rng.choice(["chunk", "swapped", "interleave", "separate"]), GATED[rng.choice(list(GATED))]
    else:
        w.act = PLAIN[rng.choice(list(PLAIN))]
    w.order, w.bias, w.own = w.pick("io", "oi"), w.chance(0.3), w.chance(0.3)
    w(f"E, K, T = {E}, {K}, {B * S}")
    if w.chance(0.5):
        w.arguments += [("x", "", (B, S, w.sizes["H"])), ("logits", "separated", (B * S, E))]
        w(w.pick(f"x = x.view(-1, {w.sizes['H']})", "x = x.flatten(0, 1)", f"x = x.reshape(T, {w.sizes['H']})"))
    else:
        w.arguments += [("x", "", (B * S, w.sizes["H"])), ("logits", "separated", (B * S, E))]
    if line := w.pick(*[None] * 3, *COMPUTED):
        w(line)


def weights(w: Writer) -> None:
    """The experts' parameters as arguments, made a list where each expert has its own."""
    H, FF, E = w.sizes["H"], w.sizes["F"], w.sizes["E"]
    wide = FF if w.layout in ("plain", "separate") else 2 * FF
    parts = [("up", H, wide), ("down", FF, H)] + [("gate", H, FF)] * (w.layout == "separate")
    for name, inside, outside in parts:
        shape = (inside, outside) if w.order == "io" else (outside, inside)
        for kind, of in (("w", shape), ("b", (outside,))):
            if kind == "b" and not w.bias:
                continue
            each = [f"{kind}_{name}{e}" for e in range(E)] if w.own else [f"{kind}_{name}"]
            w.arguments += [(n, "weight" if kind == "w" else "", of if w.own else (E, *of)) for n in each]
            if w.own:
                w(f"{kind}_{name} = [{', '.join(each)}]")


def router(w: Writer) -> None:
    w(w.pick(*(ROUTERS if w.sizes["K"] > 1 or w.chance(0.6) else ONE)))
    if w.chance(0.4):
        w(w.pick(*RENORMALISE))


Product = Callable[[str, str], str]  # (x, "up") -> source of x times the weights, bias added


def mlp(w: Writer, x: str, product: Product, indent: int = 0, into: str = "y") -> None:
    """`into` = the experts of `x`."""
    if w.layout == "plain":
        w(f"h = {w.act.format(u='(' + product(x, 'up') + ')')}", indent)
    elif w.layout == "separate":
        w(f"g, u = {product(x, 'gate')}, {product(x, 'up')}\nh = {w.act.format(g='g', u='u')}", indent)
    else:
        split = w.pick(*SPLITS[w.layout]).format(p="p", F=w.sizes["F"])
        w(f"p = {product(x, 'up')}\n{split}\nh = {w.act.format(g='g', u='u')}", indent)
    w(f"{into} = {product('h', 'down')}", indent)


def of_expert(w: Writer) -> Product:
    """x times the weights of expert e."""

    def product(x: str, name: str) -> str:
        if w.order == "oi":
            return f"F.linear({x}, w_{name}[e]" + (f", b_{name}[e])" if w.bias else ")")
        return f"{x} @ w_{name}[e]" + (f" + b_{name}[e]" if w.bias else "")

    return product


# Dispatches: from x, w, ids to out [T,H]

HITS = {
    "where": "token, k = torch.where(ids == e)",
    "nonzero": "token, k = (ids == e).nonzero(as_tuple=True)",
    "unbound": "token, k = torch.nonzero(ids == e).unbind(1)",
    "one_hot": "k, token = torch.where(F.one_hot(ids, E).permute(2, 1, 0)[e])",
}
WRITES = [
    "out.index_add_(0, token, y.to(out.dtype))",
    "out = out.index_add(0, token, y.to(out.dtype))",
    "out[token] += y.to(out.dtype)",
    "out.index_put_((token,), y.to(out.dtype), accumulate=True)",
    "out.scatter_add_(0, token[:, None].expand(-1, x.shape[-1]), y.to(out.dtype))",
]
ZEROS = ["out = torch.zeros_like(x)", "out = x.new_zeros(x.shape)", "out = torch.zeros(x.shape, dtype=x.dtype)"]


def where_loop(w: Writer) -> None:
    write = w.pick(*WRITES)
    w(w.pick(*ZEROS) + "\nfor e in range(E):")
    w(HITS[w.pick(*HITS)], 1)
    w(w.pick("r = x[token]", "r = x.index_select(0, token)"), 1)
    mlp(w, "r", of_expert(w), 1)
    w(w.pick("y = y * w[token, k, None]", "y = w[token, k].unsqueeze(-1) * y"), 1)
    w(write, 1)


def boolean_loop(w: Writer) -> None:
    w(w.pick(*ZEROS) + "\nfor e in range(E):")
    w("m = (ids == e).any(-1)\nr = x[m]", 1)
    mlp(w, "r", of_expert(w), 1)
    c = w.pick("(w * (ids == e)).sum(-1)", "torch.where(ids == e, w, 0.0).sum(-1)", "w.masked_fill(ids != e, 0).sum(1)")
    w(f"c = {c}\ny = y * c[m].unsqueeze(-1)", 1)
    w(w.pick("out[m] += y.to(out.dtype)", "out[m] = out[m] + y.to(out.dtype)"), 1)


def choices_loop(w: Writer) -> None:
    w(w.pick(*ZEROS) + "\nfor k in range(K):\n    for e in range(E):")
    w("m = ids[:, k] == e\nr = x[m]", 2)
    mlp(w, "r", of_expert(w), 2)
    w("y = y * w[m, k, None]\nout[m] += y.to(out.dtype)", 2)


def pairs_loop(w: Writer) -> None:
    w("rows, flat = x.repeat_interleave(K, 0), ids.reshape(-1)\nys = torch.zeros_like(rows)\nfor e in range(E):")
    w("r = rows[flat == e]", 1)
    mlp(w, "r", of_expert(w), 1)
    w("ys[flat == e] = y", 1)
    w(f"y = ys.view(T, K, -1)\n{combine(w)}")


def masked_sum(w: Writer) -> None:
    coefficient = w.pick(
        "(w * (ids == e)).sum(-1, keepdim=True)", "torch.where(ids == e, w, 0.0).sum(-1, keepdim=True)",
        "(w * (ids == e).to(w.dtype)).sum(-1).unsqueeze(-1)", "dense[:, e].unsqueeze(1)", "dense[:, e, None]",
    )  # fmt: skip
    if "dense" in coefficient:
        w(dense(w))
    w("out = torch.zeros_like(x)\nfor e in range(E):")
    mlp(w, "x", of_expert(w), 1)
    w(f"c = {coefficient}", 1)
    w(w.pick("y = c * y", "y = y * c"), 1)
    w(w.pick("out = out + y.to(out.dtype)", "out += y"), 1)


def dense(w: Writer) -> str:
    """dense [T,E]: weights where chosen, else 0."""
    return w.pick(
        "dense = torch.zeros(T, E, dtype=w.dtype).scatter(1, ids, w)",
        "dense = torch.zeros(T, E, dtype=w.dtype).scatter_(1, ids, w)",
        "dense = torch.zeros(T, E, dtype=w.dtype).scatter_add(1, ids, w)",
        "dense = (F.one_hot(ids, E) * w.unsqueeze(-1)).sum(1)",
        "dense = torch.einsum('tk,tke->te', w, F.one_hot(ids, E).to(w.dtype))",
    )


def stacked(w: Writer) -> None:
    w("ys = []\nfor e in range(E):")
    mlp(w, "x", of_expert(w), 1)
    w("ys.append(y)", 1)
    how = w.pick("einsum", "gather", "index")
    if how == "einsum":
        w(f"{dense(w)}\nout = torch.einsum('te,eth->th', dense.to(x.dtype), torch.stack(ys))")
        return
    w("ys = torch.stack(ys, 1)")
    if how == "gather":
        w("y = ys.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))")
    else:
        w("y = ys[torch.arange(T)[:, None], ids]")
    w(combine(w))


def combine(w: Writer) -> str:
    """out [T,H] from y [T,K,H]."""
    return w.pick(
        "out = (y * w.unsqueeze(-1)).sum(1)",
        "out = (w[..., None] * y).sum(dim=-2)",
        "out = torch.einsum('tkh,tk->th', y, w.to(y.dtype))",
        "out = torch.bmm(w.to(y.dtype).unsqueeze(1), y).squeeze(1)",
    )


def all_experts(w: Writer) -> None:
    """All experts as one product."""
    matmul = w.chance(0.5)

    def product(x: str, name: str) -> str:
        bias = f" + b_{name}[:, None]" if w.bias else ""
        if matmul:
            return f"{x} @ w_{name}{'' if w.order == 'io' else '.mT'}{bias}"
        return f"torch.einsum('eti,{'eio' if w.order == 'io' else 'eoi'}->eto', {x}, w_{name}){bias}"

    rows = w.pick("x.repeat(E, 1).view(E, T, -1)", "x.unsqueeze(0).expand(E, -1, -1)")
    w(f"{dense(w)}\nrows = {rows}")
    mlp(w, "rows", product)
    w(w.pick("out = (y * dense.T.unsqueeze(-1)).sum(0)", "out = torch.einsum('eth,te->th', y, dense.to(y.dtype))"))


def batched(w: Writer) -> None:
    """W[ids]."""
    how = w.pick("einsum", "matmul", "bmm")
    flat = how == "bmm"

    def product(x: str, name: str) -> str:
        chosen = w.pick(f"w_{name}[{'flat' if flat else 'ids'}]", f"w_{name}[ids]{'.flatten(0, 1)' if flat else ''}")
        bias = f" + b_{name}[ids]" if w.bias else ""
        if how == "einsum":
            return f"torch.einsum('tki,{'tkio' if w.order == 'io' else 'tkoi'}->tko', {x}, {chosen}){bias}"
        chosen += "" if w.order == "io" else ".mT"
        if how == "matmul":
            return f"({x}.unsqueeze(-2) @ {chosen}).squeeze(-2){bias}"
        bias = f" + b_{name}[flat]" if w.bias else ""
        return f"torch.bmm({x}.unsqueeze(1), {chosen}).squeeze(1){bias}"

    if flat:
        w("flat = ids.reshape(-1)\nrows = x.repeat_interleave(K, dim=0)")
    else:
        w(w.pick("rows = x.unsqueeze(1).expand(-1, K, -1)", "rows = x[:, None].repeat(1, K, 1)"))
    mlp(w, "rows", product)
    w(("y = y.view(T, K, -1)\n" if flat else "") + combine(w))


OFFSETS = [
    "counts = torch.histc(ids_g.float(), bins=E, min=0, max=E - 1)\noffsets = counts.cumsum(0, dtype=torch.int32)",
    "offsets = F.one_hot(flat, E).sum(0).cumsum(0).int()",
    "offsets = torch.searchsorted(ids_g, torch.arange(E), right=True).to(torch.int32)",
    "counts = torch.zeros(E, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))\n"
    "offsets = counts.cumsum(0).int()",
]
BACKS = [
    "inverse = torch.empty_like(perm)\ninverse[perm] = torch.arange(T * K)\nout = y[inverse].view(T, K, -1).sum(1)",
    "out = y[perm.argsort()].view(T, K, -1).sum(dim=1)",
    "out = torch.zeros(T, y.shape[1], dtype=y.dtype).index_add_(0, perm // K, y)",
    "back = torch.zeros_like(y)\nback[perm] = y\nout = back.view(T, K, -1).sum(1)",
    "out = torch.zeros(T, y.shape[1], dtype=y.dtype).scatter_add(0, (perm // K)[:, None].expand_as(y), y)",
]


def grouped(w: Writer) -> None:
    def product(x: str, name: str) -> str:
        weight = f"w_{name}" if w.order == "io" else f"w_{name}.transpose(-2, -1)"
        return f"grouped_mm({x}, {weight}, offsets)" + (f" + b_{name}[ids_g]" if w.bias else "")

    w("flat = ids.reshape(-1)")
    w(w.pick("ids_g, perm = torch.sort(flat)", "perm = flat.argsort(stable=True)\nids_g = flat[perm]"))
    w(w.pick(*OFFSETS))
    w(w.pick("rows = x[perm // K]", "rows = x.index_select(0, perm // K)", "rows = x.repeat_interleave(K, 0)[perm]"))
    mlp(w, "rows", product)
    w(f"y = y * w.reshape(-1)[perm].unsqueeze(-1)\n{w.pick(*BACKS)}")


def capacity(w: Writer) -> None:
    """Places in experts; choices one after the other."""
    C = w.pick(1, 2, w.sizes["T"] * w.sizes["K"])

    def product(x: str, name: str) -> str:
        bias = f" + b_{name}[:, None]" if w.bias else ""
        return f"torch.einsum('eci,{'eio' if w.order == 'io' else 'eoi'}->eco', {x}, w_{name}){bias}"

    w("hits = F.one_hot(ids.T.reshape(-1), E)\nplace = ((hits.cumsum(0) - 1) * hits).sum(-1)")
    w(f"kept = (place < {C}).to(x.dtype)")
    w(f"where = F.one_hot(place.clamp(max={C} - 1), {C}).to(x.dtype) * kept[:, None]")
    w("slots = (hits.to(x.dtype)[:, :, None] * where[:, None]).view(K, T, E, -1)")
    w("dispatch = slots.sum(0)\ncombine = (slots * w.to(x.dtype).T[:, :, None, None]).sum(0)")
    w("rows = torch.einsum('tec,th->ech', dispatch, x)")
    mlp(w, "rows", product)
    w("out = torch.einsum('tec,ech->th', combine, y)")


def leave(w: Writer) -> None:
    """What becomes of the result."""
    w(
        w.pick(
            *["return out"] * 4,
            "return (x + 0.5 * out)",
            "return x + out * x[:, :1].sigmoid()",
            "return out.to(x.dtype) * 2",
            "return out, logits.logsumexp(-1)",
        )
    )
