"""The parts that random attention programs are written from, each as lines of source.

A `Writer` collects arguments and lines. The parts agree on names: q, k, v, the scores s in the
order that `w.order` says ("qk", or "kq" for scores that are still transposed), the weights p.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

FILLS = ["float('-inf')", "torch.finfo(s.dtype).min", "-1e4 * 3", "-1e9"]
FILL_WEIGHTS = [6, 5, 1, 2]


@dataclass
class Writer:
    """The program so far and its sizes."""

    rng: random.Random
    lines: list[str] = field(default_factory=list)
    arguments: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    grouped: bool = False
    order: str = "qk"
    masks: int = 0

    def __call__(self, line: str) -> None:
        self.lines += [part.format(**self.sizes) for part in line.split("\n")]

    def argument(self, name: str, kind: str, letters: str) -> str:
        taken = {a for a, _, _ in self.arguments}
        name = name if name not in taken else f"{name}{len(taken)}"
        shape = tuple(1 if x == "1" else self.sizes[x] for x in letters)
        self.arguments.append((name, kind, shape))
        return name

    def pick(self, *options):
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def four(self, x: str, swap: bool = True) -> str:
        """A mask or bias over [B, H, M, N] (or broadcast) in the layout of the scores now."""
        return f"{x}.transpose(-1, -2)" if swap and self.order == "kq" else x


def choose_sizes(w: Writer) -> None:
    rng = w.rng
    B, R, G = rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3])
    M, N = rng.choice([1, 5, 9, 16]), rng.choice([7, 9, 16, 21])
    if rng.random() < 0.6:
        M = N
    D, E = rng.choice([4, 8, 16]), rng.choice([4, 8, 12])
    if rng.random() < 0.7:
        E = D
    if rng.random() < 0.2:  # every dim alike: only the order tells them apart
        B = G = M = N = D = E = rng.choice([2, 4, 6])
        R = 1
    H = G * R
    w.sizes = {"B": B, "G": G, "R": R, "H": H, "M": M, "N": N, "D": D, "E": E, "BH": B * H}
    w.sizes |= {"HD": H * D, "GD": G * D, "GE": G * E}


LAYOUTS = {
    "bhsd": (("BHMD", "BGND", "BGNE"), ""),
    "bshd": (("BMHD", "BNGD", "BNGE"), "{x} = {x}.transpose(1, 2)"),
    "sbhd": (("MBHD", "NBGD", "NBGE"), "{x} = {x}.permute(1, 2, 0, 3)"),
}
FLAT = {"q": ("M", "H", "D", "HD"), "k": ("N", "G", "D", "GD"), "v": ("N", "G", "E", "GE")}


def inputs(w: Writer) -> None:
    """q [B, H, S_q, D], k [B, G, S_kv, D], v [B, G, S_kv, D_v] from some layout of arguments."""
    choose_sizes(w)
    layout = w.pick("flat", *LAYOUTS)
    if layout == "flat":
        flat_inputs(w)
        return
    shapes, move = LAYOUTS[layout]
    for x, letters in zip("qkv", shapes):
        w.argument(x, "", letters)
        if move:
            w(move.format(x=x))


def flat_inputs(w: Writer) -> None:
    """[B, S, heads * D], as projections give them."""
    for x, (length, heads, width, flat) in FLAT.items():
        w.arguments.append((x, "", (w.sizes["B"], w.sizes[length], w.sizes[flat])))
        B, S, H, D = (w.sizes[name] for name in ("B", length, heads, width))
        split = w.pick(f"view({B}, {S}, {H}, {D})", f"unflatten(-1, ({H}, {D}))")
        w(f"{x} = {x}.{split}.transpose(1, 2)")


def scale(w: Writer, x: str) -> str:
    """`x` times a positive number, in some notation."""
    return w.pick(
        f"{x} * 0.5", f"{x} / 2", f"{x} / 4.0", f"0.3 * {x}", f"{x} * {{D}} ** -0.5",
        f"{x}.mul(0.7)",
        f"{x} * 1.0", f"torch.div({x}, 3)", f"{x} / {{D}} ** 0.5",
    )  # fmt: skip


REPEATS = [
    "{x} = {x}.repeat_interleave({{R}}, dim=1)",
    "{x} = {x}[:, :, None].expand(-1, -1, {{R}}, -1, -1).reshape({{B}}, {{H}}, {{N}}, -1)",
    "{x} = {x}.unsqueeze(2).repeat(1, 1, {{R}}, 1, 1).flatten(1, 2)",
]
CONTRACTIONS = [
    "s = q @ k.mT", "s = torch.matmul(q, k.transpose(-2, -1))", "s = q @ k.permute(0, 1, 3, 2)",
    "s = torch.einsum('bhqd,bhkd->bhqk', q, k)", "s = torch.einsum('bhkd,bhqd->bhqk', k, q)",
    "s = (k @ q.mT).mT", "s = torch.einsum('bhqd,bhkd->bqhk', q, k).transpose(1, 2)",
    "s = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1)",
    "s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view({B}, {H}, {M}, {N})",
    "s = torch.baddbmm(torch.zeros(1, dtype=q.dtype), q.reshape({BH}, {M}, -1), "
    "k.reshape({BH}, {N}, -1).mT, alpha=0.5).view({B}, {H}, {M}, {N})",
]  # fmt: skip

GROUPED = [
    "s = torch.einsum('bgrqd,bgkd->bgrqk', q.reshape({B}, {G}, {R}, {M}, {D}), k).flatten(1, 2)",
    "s = (q.unflatten(1, ({G}, {R})) @ k.unsqueeze(2).mT).flatten(1, 2)",
    "s = (q.reshape({B}, {G}, -1, {D}) @ k.mT).reshape({B}, {H}, {M}, {N})",
]


def scores(w: Writer) -> None:
    """s = scaled q k^T, kv heads repeated for the heads of their group."""
    if w.chance(0.2):
        norm = w.pick("{x} = F.rms_norm({x}, ({{D}},))", "{x} = F.normalize({x}, dim=-1)")
        w(norm.format(x="q") + "\n" + norm.format(x="k"))
    place = w.pick("q", "k", "both", "scores", "scores", "scores", "none")
    if place in ("q", "both"):
        w(f"q = {scale(w, 'q')}")
    if place in ("k", "both"):
        w(f"k = {scale(w, 'k')}")
    if w.sizes["R"] > 1 and w.chance(0.25):
        w.grouped = True
        w(w.rng.choice(GROUPED))
    elif w.sizes["R"] > 1:
        for x in "kv":
            w(w.rng.choice(REPEATS).format(x=x))
    if w.grouped:
        pass
    elif w.chance(0.12):
        w("s = k @ q.mT")
        w.order = "kq"
    else:
        w(w.rng.choice(CONTRACTIONS))
    if place == "scores":
        w(w.pick("s = {}", "s = {}", "s = ({})").replace("{}", scale(w, "s")))
    elif w.chance(0.1):
        w(w.pick("s /= 2", "s *= 0.5", "s.mul_(0.8)"))


PREDICATES = [
    "j <= i", "j <= i", "j <= i", "i - j >= 0", "j <= i + ({N} - {M})", "~(j > i)",
    "(j <= i) & (i - j < 4)", "(j <= i) & (j > i - 3)", "(i - j).abs() <= 3", "i // 4 == j // 4",
    "(j // 3 <= i // 3)", "(i - j) % 2 == 0", "(j <= i) | (j < 3)",
    "(j < 2) | (i - j < 4) & (j <= i)",
    "torch.ones({M}, {N}, dtype=torch.bool).tril()", "torch.ones({M}, {N}).tril(1) == 1",
    "~torch.ones({M}, {N}, dtype=torch.bool).triu(1)", "j < i", "i != j", "j >= i", "j < {N} - 2",
]  # fmt: skip
ARGUMENT_MASKS = [
    ("right", "BN", "{x}[:, None, None, :]"), ("left", "BN", "{x}[:, None, None]"),
    ("right", "BN", "{x}.view({{B}}, 1, 1, {{N}})"), ("allowed", "MN", "{x}"),
    ("allowed", "B1MN", "{x}"), ("allowed", "BHMN", "{x}"), ("allowed", "HMN", "{x}"),
]  # fmt: skip
APPLY = [
    "s = s.masked_fill(~{m}, {f})", "s = torch.where({m}, s, {f})", "s.masked_fill_(~{m}, {f})",
    "s = s + torch.zeros_like({m}, dtype=s.dtype).masked_fill(~{m}, {f})",
    "s = s + torch.where({m}, torch.tensor(0.0, dtype=s.dtype), {f})",
    "s = s.masked_fill({m} == 0, {f})",
    "s += torch.where({m}, torch.zeros((), dtype=s.dtype), {f})",
    "s = s + (1.0 - ({m}).to(s.dtype)) * -128.0",
]  # fmt: skip


def keep(w: Writer) -> str:
    """The name of a bool mask: a predicate of positions, of captured tensors, or both."""
    w.masks += 1
    name = f"keep{w.masks}"
    terms = []
    if w.chance(0.75):
        w("i, j = torch.arange({M})[:, None], torch.arange({N})[None, :]")
        terms.append(f"({w.rng.choice(PREDICATES)})")
    if not terms or w.chance(0.35):
        kind, letters, view = w.rng.choice(ARGUMENT_MASKS)
        terms.append(view.format(x=w.argument("mask", kind, letters)))
    if w.sizes["M"] == w.sizes["N"] and w.chance(0.12):
        ids = w.argument("ids", "ids", "BN")
        terms.append(f"({ids}[:, None, :, None] == {ids}[:, None, None, :])")
    w(f"{name} = " + w.pick(" & ", " & ", " & ", " | ").join(terms))
    return name


def mask(w: Writer) -> None:
    """One masking of the scores."""
    name = keep(w)
    fill = w.rng.choices(FILLS, FILL_WEIGHTS)[0]
    w(w.rng.choice(APPLY).format(m=w.four(name), f=fill))


def bias(w: Writer) -> None:
    letters = w.pick("MN", "HMN", "BHMN", "B1MN", "1HMN", "B11N", "HM1")
    name = w.argument("bias", w.pick("", "", "const"), letters)
    w(w.pick("s = s + {x}", "s = s + {x}", "s += {x}", "s = s - {x}").format(x=w.four(name)))


def alibi(w: Writer) -> None:
    slopes = w.argument("slopes", "", "H")
    w("i, j = torch.arange({M})[:, None], torch.arange({N})[None, :]")
    distance = w.pick("(j - i)", "(i - j).abs()", "j")
    w(f"s = s + {w.four(f'({slopes}.view(-1, 1, 1) * {distance}.to(s.dtype))')}")


def table(w: Writer) -> None:
    w.sizes["T"] = w.sizes["M"] + w.sizes["N"]
    name = w.argument("table", "", "TH")
    w("i, j = torch.arange({M})[:, None], torch.arange({N})[None, :]")
    lookup = w.pick(f"{name}[j - i + {{M}} - 1]", f"F.embedding((j - i).clamp(-2, 2) + 2, {name})")
    w(f"s = s + {w.four(f'{lookup}.permute(2, 0, 1)')}")


def softcap(w: Writer) -> None:
    w(w.pick("s = 5.0 * torch.tanh(s / 5.0)", "s = torch.tanh(s / 3) * 3", "s = s.clamp(-2, 2)"))


def temperature(w: Writer) -> None:
    letters = w.pick("H11", "M1", "BHM1", "11")
    name = w.argument("heat", "positive", letters)
    w(f"s = s {w.pick('*', '/')} {w.four(name)}")


def cast_up(w: Writer) -> None:
    w("s = s.float()")


EDITS: list[tuple[Callable[[Writer], None], int]] = [
    (mask, 12), (bias, 3), (alibi, 2), (table, 2), (softcap, 2), (temperature, 2), (cast_up, 2),
]  # fmt: skip


def edits(w: Writer) -> None:
    """0 to 3 edits in any order: most orders commute with what follows, some do not."""
    for _ in range(w.rng.choices([0, 1, 2, 3], [2, 6, 4, 1])[0]):
        w.rng.choices([e for e, _ in EDITS], [n for _, n in EDITS])[0](w)
    if w.chance(0.06) and w.masks:
        w(f"s = {scale(w, 's')}")


SOFTMAXES = [
    "p = F.softmax(s, dim={d})", "p = torch.softmax(s, {d})", "p = s.softmax(dim={d})",
    "p = F.softmax(s, dim={d}, dtype=torch.float32).to(v.dtype)",
    "p = s.float().softmax({d}).to(v.dtype)",
    "p = F.log_softmax(s, {d}).exp()", "p = torch.exp(s - s.logsumexp({d}, keepdim=True))",
    "e = torch.exp(s - s.amax({d}, keepdim=True))\np = e / e.sum({d}, keepdim=True)",
    "e = (s - s.max({d}, keepdim=True).values).exp()\np = e / e.sum({d}, keepdim=True)",
    "s = s - s.max(dim={d}, keepdim=True).values\np = F.softmax(s, dim={d})",
    "p = torch.nn.Softmax(dim={d})(s)",
]  # fmt: skip


def softmax(w: Writer) -> None:
    """p over kv, perhaps with a sink; then p as [B, H, S_q, S_kv]."""
    dim = "-2" if w.order == "kq" else w.pick("-1", "-1", "3")
    if w.order == "qk" and w.chance(0.12):
        sink = w.argument("sinks", "", "H")
        w(f"s = torch.cat([s, {sink}.view(1, -1, 1, 1).expand({{B}}, -1, {{M}}, 1)], -1)")
        w("p = F.softmax(s, dim=-1)[..., :-1]")
    elif w.order == "qk" and w.chance(0.05):
        w("e = s.exp()\np = e / (1 + e.sum(-1, keepdim=True))")
    else:
        w(w.rng.choice(SOFTMAXES).replace("{d}", dim))
    w("p = p.to(v.dtype)")
    if w.order == "kq":
        w("p = p.transpose(-1, -2)")
    if w.chance(0.3):
        w(
            w.pick(
                "p = F.dropout(p, 0.0)",
                "p = F.dropout(p, 0.1, training=False)",
                "p = p.contiguous()",
            )
        )


VALUES = [
    "out = p @ v",
    "out = torch.matmul(p, v)",
    "out = torch.einsum('bhqk,bhkd->bhqd', p, v)",
    "out = torch.einsum('bhqk,bhkd->bqhd', p, v).transpose(1, 2)",
    "out = torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view({B}, {H}, {M}, {E})",
    "out = (p.unsqueeze(-1) * v.unsqueeze(2)).sum(-2)",
]
GROUPED_VALUES = [
    "out = torch.einsum('bgrqk,bgkd->bgrqd', p.unflatten(1, ({G}, {R})), v).flatten(1, 2)",
    "out = (p.unflatten(1, ({G}, {R})) @ v.unsqueeze(2)).flatten(1, 2)",
    "out = (p.reshape({B}, {G}, -1, {N}) @ v).reshape({B}, {H}, {M}, {E})",
]


def values(w: Writer) -> None:
    """out = p v."""
    w(w.rng.choice(GROUPED_VALUES if w.grouped else VALUES))


def leave(w: Writer) -> None:
    """How out leaves, and what else."""
    out = w.pick("out", "out.transpose(1, 2)", "out.transpose(1, 2).flatten(2)", "out * 2")
    w(f"return {out}, extra" if any("extra = " in line for line in w.lines) else f"return {out}")


def sdpa(w: Writer) -> None:
    """out by one scaled_dot_product_attention."""
    if w.chance(0.3):
        w(f"q = {scale(w, 'q')}")
    given = ["q", "k", "v"]
    masked = w.pick("", "", "causal", "bool", "bool", "float", "bias")
    if masked == "causal":
        given.append("is_causal=True")
    elif masked == "bias":
        given.append("attn_mask=" + w.argument("bias", "", w.pick("MN", "HMN", "BHMN", "B1MN")))
    elif masked:
        name = keep(w)
        if masked == "float":
            fill = w.rng.choices(FILLS, FILL_WEIGHTS)[0].replace("s.dtype", "q.dtype")
            w(f"{name} = torch.zeros_like({name}, dtype=q.dtype).masked_fill(~{name}, {fill})")
        given.append(f"attn_mask={name}")
    if w.chance(0.4):
        given.append(w.pick("scale=0.3", "scale=1.0", "scale={D} ** -0.5", "dropout_p=0.0"))
    if w.sizes["R"] > 1 and w.chance(0.5):
        given.append("enable_gqa=True")
    elif w.sizes["R"] > 1:
        for x in "kv":
            w(w.rng.choice(REPEATS).format(x=x))
    w(f"out = F.scaled_dot_product_attention({', '.join(given)})")


@dataclass(frozen=True)
class NearMiss:
    """A change that makes a program something else than attention, or attention by accident."""

    when: str
    write: Callable[[Writer], None]


def _on(when: str, *lines: str) -> NearMiss:
    return NearMiss(when, lambda w: w(w.rng.choice(lines)))


def _square_only(when: str, line: str) -> NearMiss:
    """A change whose shapes fit only if S_q == S_kv."""
    other = "p = p * 2" if when == "weights" else "s = -s"
    return NearMiss(when, lambda w: w(line if w.sizes["M"] == w.sizes["N"] else other))


def weights(*lines: str) -> NearMiss:
    return _on("weights", *lines)


def of_scores(*lines: str) -> NearMiss:
    return _on("scores", *lines)


LEAST_OF_TOP = "s.topk(2, -1).values[..., -1:]"
NEAR_MISSES: dict[str, NearMiss] = {
    "weights transposed": _square_only("weights", "p = p.mT"),
    "weights scaled": weights("p = p * 2", "p = p / 3", "p = p * p", "p = -p", "p = 1 - p"),
    "weights shifted": weights("p = p + 0.1", "p = p - p.mean(-1, keepdim=True)"),
    "weights reordered": weights("p = p.flip(-1)", "p = p.roll(1, -1)", "p = p.cumsum(-1)"),
    "weights of another head": weights("p = p.flip(1)", "p = p.roll(1, 1)", "p = p.roll(1, 0)"),
    "weights mixed": weights("p = p - p.mean(1, keepdim=True)", "p = p + p.flip(1)"),
    "weights used": weights("extra = p.sum(1)", "extra = p", "extra = p.amax(-1)"),
    "scores used": of_scores("extra = s", "extra = s.logsumexp(-1)", "extra = s.detach() * 2"),
    "weights masked": weights("p = p * (torch.arange({N}) < 4)", "p = p.masked_fill(p < 0.1, 0)"),
    "weights renormalised": weights("p = p * (p > 0.02)\np = p / (p.sum(-1, keepdim=True) + 1e-6)"),
    "weights detached": weights("p = p.detach()", "extra = p.detach()"),
    "scores detached": of_scores("s = s.detach()"),
    "weights bent": weights("p = torch.sigmoid(p)", "p = F.softmax(p, -1)", "p = p.clamp(max=0.3)"),
    "nan removed": weights("p = torch.nan_to_num(p)", "p = torch.nan_to_num(p, 0.0)"),
    "scores negated": of_scores("s = -s", "s = s * -0.5", "s = s * 0.0"),
    "scores scaled to little": of_scores("s = s * 1e-9", "s = s * 1e-3"),
    "scores bent": of_scores("s = torch.tanh(s)", "s = s.abs()", "s = F.silu(s)", "s = F.relu(s)"),
    "scores rounded": of_scores("s = s.round()", "s = s.int().to(v.dtype)", "s = s.trunc()"),
    "scores reordered": of_scores("s = s.roll(1, -1)", "s = s.flip(-1)", "s = s.flip(1)"),
    "scores transposed": _square_only("scores", "s = s.mT"),
    "scores centred": of_scores("s = s - s.mean(-1, keepdim=True)", "s = s - s.mean(1, True)"),
    "top scores": of_scores(f"s = s.masked_fill(s < {LEAST_OF_TOP}, float('-inf'))"),
    "another mask": NearMiss("scores", mask),
    "q written": of_scores("q = q * 1\nq.zero_()"),
    "k written": of_scores("k = k * 1\nk.mul_(2)"),
    "v written": of_scores("v = v * 1\nv.mul_(2)"),
    "v rearranged": weights("v = v.flip(-2)", "v = v * 2 + 1", "v = v.roll(1, 1)"),
    "mean added to v": weights("v = v + v.mean(-2, keepdim=True)"),
    "no gradient": weights("with torch.no_grad():\n    p = p * 1"),
    "no gradient nearby": weights("with torch.no_grad():\n    extra = v.sum()"),
}
