"""What a kernel is asked by its tests: specs, shapes, and the comparison with the formula in float64."""

from __future__ import annotations

import pytest
import torch

from tests.harness import tolerated
from tvcompile.kernels import Problem
from tvcompile.kernels.attention import attention_ref
from tvcompile.kernels.problem import Given, Need
from tvcompile.spec import AttentionSpec

B, H, H_KV, D = 2, 4, 2, 16
EMPTY = ("nan", "nan_cut", "mean", "mean_cut", "zero")
PADDED = "scale=0.25; keep = kv <= q & pad[b, kv]; empty="
SPECS = {
    "plain": "scale=0.25",
    "causal": "scale=0.25; keep = kv <= q",
    "window": "scale=0.25; keep = kv <= q & q - kv < 40; empty=nan",
    "two_sided": "scale=0.25; keep = abs(q - kv) <= 17; empty=mean_cut",
    "dilated": "scale=0.25; keep = kv <= q & (q - kv)%2 == 0",
    "global_and_local": "scale=0.25; keep = kv <= q & (kv < 5 | q - kv < 33)",
    "chunks": "scale=0.25; keep = kv//48 == q//48; empty=zero",
    "prefix": "scale=0.25; keep = kv <= q | kv < ids[b]",
    "documents": "scale=0.25; keep = kv <= q & ids[b, q] == ids[b, kv]; empty=zero",
    "padded_positions": "scale=0.25; keep = ids[b, kv] <= ids[b, q] & ids[b, q] <= ids[b, kv] + 3; empty=zero",
    "mask": "scale=0.25; keep = mask[b, h, q, kv]; empty=zero",
    "softcap": "scale=0.25; score = 5.0*tanh(s/5.0); keep = kv <= q",
    "alibi": "scale=0.25; score = s + slope[h]*float32(kv - q); keep = kv <= q",
    "table": "scale=0.25; score = s + bias[min(abs(q - kv), 31), h]",
    "relative": "scale=0.25; score = s + bias[b, abs(q - kv)]; keep = abs(q - kv) < 40; empty=mean",
    "bias": "scale=0.25; score = s + bias[h, q, kv]; keep = kv <= q",
    "row_bias_and_temperature": "scale=0.25; score = s*slope[h]/1.5 - bias[b, kv]; keep = kv <= q",
    "sink": "scale=0.25; keep = kv <= q & q - kv < 40; sink = sink[h]",
    "off_by_one": "scale=0.25; keep = kv <= q; sink = 0.0",
    "padded_sink": "scale=0.25; keep = kv <= q & pad[b, kv]; sink = sink[h]; empty=zero",
    "dropout": "scale=0.25; keep = kv <= q; dropout=0.3",
    "dropout_padded": "scale=0.25; keep = kv <= q & pad[b, kv]; dropout=0.3; empty=mean",
    "alibi_padded": "scale=0.25; score = s + slope[h]*float32(kv - q); keep = kv <= q & pad[b, kv]; empty=mean",
    "table_padded": "scale=0.25; score = s + bias[min(abs(q - kv), 31), h]; keep = pad[b, kv]; empty=nan",
} | {f"padded_{e}": PADDED + e for e in EMPTY}
SHAPES = {
    "square": (130, 130),
    "odd": (67, 131),
    "few_rows": (3, 100),
    "few_keys": (90, 21),
}


def captures_of(spec: str, S_q: int, S_kv: int, dtype: torch.dtype) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    S = max(S_q, S_kv)
    pad = torch.ones(B, S, dtype=torch.bool)
    pad[0, : S // 3] = False
    pad[1, S // 2 + 3 :] = False
    documents = torch.randint(0, 4, (B, S), generator=gen).sort(-1).values
    if "+ 3" in spec:
        documents[:, S // 4 : S // 3] = torch.iinfo(torch.int64).max
    loads = dict(_loads(spec))
    bias = {2: (32, H), 3: (H, S, S)}.get(loads.get("bias", 0), (1,))
    bias = (B, S) if "bias[b, " in spec else bias
    made = {
        "pad": pad,
        "ids": torch.tensor([5, 60]) if loads.get("ids") == 1 else documents,
        "mask": torch.rand(B, H, S, S, generator=gen) < 0.4,
        "slope": torch.rand(H, generator=gen).to(dtype),
        "bias": torch.randn(bias, generator=gen).to(dtype),
        "sink": torch.randn(H, generator=gen).to(dtype),
    }
    return [made[name] for name in AttentionSpec.parse(spec).captures()]


def _loads(spec: str) -> list[tuple[str, int]]:
    from tvcompile import expr as E

    formulas = AttentionSpec.parse(spec).formulas()
    return [(E.operands(x)[0].name, len(E.operands(x)) - 1) for f in formulas for x in E.loads(f)]


def eager(q, k, v, captures, spec, seed):
    """The formula with both matrix products in the tensors' dtype, as eager programs make them."""
    p = Problem.of(q, k, v, captures, [], spec, seed)
    k, v = (x.repeat_interleave(p.group, 1) for x in (k, v))
    s = (q @ k.mT).to(p.scope.dtype)
    unit = torch.eye(s.shape[-1], dtype=s.dtype).expand(B, H, -1, -1)
    weights, lse = attention_ref(s, unit, unit, captures, [], spec, seed)
    return weights.to(q.dtype) @ v, lse


def results(run, q, k, v, captures, direction):
    """out, lse and the gradients of q, k, v and the float captures, by autograd."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    held = [c.detach().requires_grad_(c.is_floating_point()) for c in captures]
    out, lse, *_ = run(*leaves, held)
    sources = leaves + [c for c in held if c.requires_grad]
    grads = torch.autograd.grad(out, sources, direction.to(out.dtype), allow_unused=True)
    return [out.detach().to(q.dtype), lse.detach(), *grads]


def by_kernel(kernel, q, k, v, captures, spec, seed, direction):
    """The same by a kernel, as far as it serves; None for what it does not give."""
    p = Problem.of(q, k, v, captures, [], spec, seed)
    floats = [n for n, c in p.scope.captures.items() if c.is_floating_point()]
    reason = kernel.supports(Need(p.spec, q.dtype))
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    out, lse, *rest = kernel.forward(p)
    for wanted in (tuple(floats), ()):
        if kernel.supports(Need(p.spec, q.dtype, wanted)) is None:
            g = kernel.backward(p, Given(direction, out, lse, *rest), wanted)
            grads = [x.to(q.dtype) for x in (g.dq, g.dk, g.dv)]
            held = [g.captures[n].to(q.dtype) if n in wanted else None for n in floats]
            return [out, lse, *grads, *held]
    return [out, lse]


def compare(kernel, spec, shape, dtype, D_v=D):
    S_q, S_kv = shape
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(B, H, S_q, D, generator=gen).to(dtype)
    k = torch.randn(B, H_KV, S_kv, D, generator=gen).to(dtype)
    v = torch.randn(B, H_KV, S_kv, D_v, generator=gen).to(dtype)
    direction = torch.randn(B, H, S_q, D_v, generator=gen).to(dtype)
    captures, seed = captures_of(spec, S_q, S_kv, dtype), torch.tensor(11)
    got = by_kernel(kernel, q, k, v, captures, spec, seed, direction)
    own = results(lambda a, b, c, d: eager(a, b, c, d, spec, seed), q, k, v, captures, direction)
    wide = [x.double() if x.is_floating_point() else x for x in captures]
    exact = results(
        lambda a, b, c, d: attention_ref(a, b, c, d, [], spec, seed),
        q.double(), k.double(), v.double(), wide, direction.double(),
    )  # fmt: skip
    names = ["out", "lse", "dq", "dk", "dv", "dcapture", "dcapture"]
    for name, g, e, x in zip(names, got, own, exact):
        if g is None or e is None:
            continue
        verdict = tolerated(g, e.to(g.dtype), x)
        assert not verdict, f"{kernel.name} {name}: {verdict}"
