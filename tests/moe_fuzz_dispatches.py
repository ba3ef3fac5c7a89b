"""Dispatches of random mixtures of experts by matrices [T,E], and all dispatches by name."""

from __future__ import annotations

from tests.moe_fuzz_parts import (
    ZEROS,
    Writer,
    all_experts,
    batched,
    boolean_loop,
    capacity,
    choices_loop,
    combine,
    dense,
    grouped,
    masked_sum,
    mlp,
    of_expert,
    pairs_loop,
    stacked,
    where_loop,
)  # fmt: skip

CONDITIONS = [
    "dense > 0", "dense != 0", "dense > 0.2", "(dense != 0) & (x[:, :1] > 0)", "dense.bool()",
    "(dense != 0) & ((dense != 0).cumsum(0) <= 3)", "(dense != 0).to(x.dtype) * ((dense != 0).cumsum(0) < 3) > 0",
]  # fmt: skip


def matrix_loop(w: Writer) -> None:
    """Rows where a condition on a matrix [T,E] of weights holds."""
    w(f"{dense(w)}\nsent = {w.pick(*CONDITIONS)}\n{w.pick(*ZEROS)}\nfor e in range(E):")
    w(w.pick("token, = torch.where(sent[:, e])", "token = sent[:, e].nonzero()[:, 0]"), 1)
    w("r = x.index_select(0, token)", 1)
    mlp(w, "r", of_expert(w), 1)
    w("y = y * dense[token, e, None]\nout = out.index_add(dim=0, index=token, source=y.to(out.dtype))", 1)


def mapped(w: Writer) -> None:
    """Rows that a map [E,T] chose."""

    def product(x: str, name: str) -> str:
        weight = f"w_{name}" if w.order == "io" else f"w_{name}.transpose(-2, -1)"
        return f"grouped_mm({x}, {weight}, offsets)" + (f" + b_{name}[expert]" if w.bias else "")

    w(f"{dense(w)}\nsent = torch.zeros(T, E, dtype=torch.bool).scatter(1, ids, True)\nchosen = sent.T.contiguous()")
    w("token = torch.arange(T)[None].expand(E, -1).masked_select(chosen)")
    w("expert = torch.arange(E)[:, None].expand(-1, T).masked_select(chosen)")
    w("offsets = sent.sum(0).cumsum(0).int()\nrows = x.index_select(0, token)")
    mlp(w, "rows", product)
    w("y = y * dense.T.masked_select(chosen).unsqueeze(-1)")
    adds = "index_add(dim=0, index=token, source=y)", "scatter_add(dim=0, index=token[:, None].expand_as(y), src=y)"
    w(f"y = y.to(x.dtype)\nout = torch.zeros_like(x).{w.pick(*adds)}")


def one_hots(w: Writer) -> None:
    """Experts chosen by sums over one-hots."""

    def product(x: str, name: str) -> str:
        bias = f" + hot @ b_{name}" if w.bias else ""
        return f"torch.einsum('tke,tki,{'eio' if w.order == 'io' else 'eoi'}->tko', hot, {x}, w_{name}){bias}"

    w(w.pick("hot = F.one_hot(ids, E).to(x.dtype)", "hot = (ids.unsqueeze(-1) == torch.arange(E)).to(x.dtype)"))
    w("rows = x.unsqueeze(1).expand(-1, K, -1)")
    mlp(w, "rows", product)
    w(combine(w))


# name -> (function, whether each expert may have tensors of its own)
DISPATCHES = {
    "where_loop": (where_loop, True),
    "boolean_loop": (boolean_loop, True),
    "choices_loop": (choices_loop, True),
    "pairs_loop": (pairs_loop, True),
    "masked_sum": (masked_sum, True),
    "stacked": (stacked, True),
    "all_experts": (all_experts, False),
    "batched": (batched, False),
    "grouped": (grouped, False),
    "capacity": (capacity, False),
    "matrix_loop": (matrix_loop, True),
    "mapped": (mapped, False),
    "one_hots": (one_hots, False),
}
