"""Which softmax weights are dropped: a hash of (seed, b, h, q, kv), the same in any order of blocks.

    u(b, h, q, kv) = mix(mix(row + seed) ^ kv)      row = ((b*H + h)*S_q + q), 32-bit integers
    weight         = u < (1-p) * 2^31 ? 1/(1-p) : 0

mix is the finalizer `lowbias32` of C. Wellons (2018), applied to each row once and to each pair once.
"""

from __future__ import annotations

from torch import Tensor

from .mods import Scope

MASK = 0xFFFFFFFF


def keep_weights(seed: Tensor | None, scope: Scope, p: float) -> Tensor:
    """[B,H,M,N] of the scope's block: 0 or 1/(1-p) in the scope's dtype."""
    if seed is None:
        raise ValueError("dropout needs a seed")
    heads, rows = scope.sizes["H"], scope.sizes["S_q"]
    row = (scope.index("b") * heads + scope.index("h")) * rows + scope.index("q")
    row = _mix(_mix(row + seed.to(row.device)) + (seed.to(row.device) >> 32))
    bits = _mix(row ^ scope.index("kv"))
    return (bits < int((1.0 - p) * 2**32)).to(scope.dtype).mul_(1.0 / (1.0 - p))


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash in int64 lanes."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
