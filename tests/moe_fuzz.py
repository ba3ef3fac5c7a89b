"""Random mixtures of experts, as Python source: refused, or right.

`python -m tests.moe_fuzz --n 500 --seed 0 [--train]` prints progress, the share fused and every failing program with
its inputs; `--show` only prints programs. A seed always gives one program: a router, a dispatch, a kind of experts and
a combine, in a third of the programs with one change that makes it a near miss.
"""

from __future__ import annotations

import random
import sys

import torch

from tests import fuzz, moe_fuzz_misses as misses, moe_fuzz_parts as parts
from tests.moe_fuzz_dispatches import DISPATCHES
from tests.moe_spellings.grouped import grouped_mm
from tests.spellings.base import MAKERS

SCOPE = {"grouped_mm": grouped_mm}


def separated(shape, dtype, gen):
    """Logits of which no two in a row are near each other: 0.5 apart and more, in random order."""
    order = torch.rand(shape, generator=gen).argsort(-1)
    return (order * 0.5 - 0.8).to(dtype).requires_grad_()


def weight(shape, dtype, gen):
    return (torch.randn(shape, generator=gen) / 3).to(dtype).requires_grad_()


MAKERS |= {"separated": separated, "weight": weight}


def generate(seed: int) -> fuzz.Program:
    """The program of a seed."""
    rng = random.Random(seed)
    w = parts.Writer(rng)
    parts.start(w)
    dispatch, own = w.pick(*DISPATCHES.values())
    w.own = w.own and own
    parts.weights(w)
    parts.router(w)
    dispatch(w)
    parts.leave(w)
    header = f"def program({', '.join(name for name, _, _ in w.arguments)}):\n"
    source = header + "".join(f"    {line}\n" for line in w.lines)
    near_miss = ""
    if rng.random() < 0.35:
        near_miss, source = misses.near_miss(rng, source)
    dtype = getattr(torch, rng.choices(list(fuzz.DTYPES), list(fuzz.DTYPES.values()))[0])
    return fuzz.Program(seed, source, tuple(w.arguments), dtype, near_miss, SCOPE)


def run(seeds: range, train: bool | None = None, progress: bool = False) -> fuzz.Tally:
    return fuzz.run(seeds, train, progress, generate, "mixtures")


if __name__ == "__main__":
    sys.exit(fuzz.main(generate, "mixtures", __doc__))
