"""Random attention programs served by the Triton kernels: in Triton's interpreter, or on the GPU where there is one.

The programs are those of fuzz.py with more rows and keys where there are few heads, so that `keep` leaves several runs
of FULL, PARTIAL and EMPTY blocks; all are in training. Blocks, packing and splits vary with the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
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
from tvcompile.kernels import blocks, flash  # noqa: E402
from tvcompile.tuning import FEW_ROWS, Config  # noqa: E402

PROGRAMS = int(os.environ.get("TV_FUZZ_TRITON_PROGRAMS", "720"))
SLICE = 60
LEAST_SERVED = 0.45  # of all programs: those in bfloat16 are not run, and some are refused
FEW_HEADS = 6
ROWS = {5: 19, 9: 33, 16: 48}
KEYS = {7: 23, 9: 33, 16: 48, 21: 70}
# The interpreter's bfloat16 is wrong.
DTYPES = (torch.float32, torch.float16)


def grown(w: parts.Writer, choose=parts.choose_sizes) -> None:
    """The fuzzer's sizes, longer where there are few heads; equal ones stay equal, and so do those alike."""
    choose(w)
    s = w.sizes
    if s["BH"] <= FEW_HEADS and s["M"] in {1, *ROWS} and s["N"] in KEYS:
        square = s["M"] == s["N"]
        s["N"] = KEYS[s["N"]]
        s["M"] = s["N"] if square else ROWS.get(s["M"], 1)


@dataclass
class Served:
    """What the Triton kernels did for one program."""

    forward: int = 0
    backward: int = 0
    refused: list[str] = field(default_factory=list)


def varied(seed: int, served: Served) -> Kernel:
    """The Triton kernels as kernels of the CPU, at configs drawn from the seed."""
    rng = random.Random(seed)
    fwd, dq, dkdv = (Config(*rng.choice([(16, 16), (16, 32), (32, 16)]), 4, 1) for _ in range(3))
    fwd = dataclasses.replace(fwd, descriptors=rng.random() < 0.2)
    few = dataclasses.replace(fwd, packed=rng.random() < 0.7, splits=rng.choice([1, 2, 3]))
    few = few if few.packed else fwd

    def supports(need: Need) -> str | None:
        reason = flash.supports(dataclasses.replace(need, arch="sm90"))
        served.refused += [reason] * (reason is not None)
        return reason

    def forward(p: Problem):
        served.forward += 1
        rows = p.q.shape[2] * p.group
        return kernel(few if rows <= FEW_ROWS and not p.spec.dropout else fwd).forward(p)

    def backward(p: Problem, given: Given, wanted: tuple[str, ...]):
        served.backward += 1
        return kernel(fwd, dq, dkdv).backward(p, given, wanted)

    return Kernel("triton.flash", "cpu", supports, forward, backward)


@contextlib.contextmanager
def only(served_by: Kernel, chunk: int) -> Iterator[None]:
    """No other kernel is asked; in the interpreter, runs are looked for in `chunk` blocks at a time."""
    attention.choose.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention, "KERNELS", (served_by,)))
        if triton.knobs.runtime.interpret:
            stack.enter_context(mock.patch.object(blocks, "CHUNK", triton.language.constexpr(chunk)))
        yield
    attention.choose.cache_clear()


@dataclass
class Tally:
    """Counts of a slice: programs and attentions whose forward and backward the Triton kernels gave."""

    programs: int = 0
    skipped: int = 0
    served: int = 0
    forwards: int = 0
    backwards: int = 0
    fuzz: fuzz.Tally = field(default_factory=fuzz.Tally)
    refused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.programs} programs: {self.skipped} in bfloat16 not run, {self.served} served by Triton with "
            f"{self.forwards} forwards and {self.backwards} backwards, {len(self.refused)} of no Triton form, "
            f"{len(self.fuzz.failures)} failures, {self.fuzz.invalid} not valid in eager"
        )


def run(seeds: range) -> Tally:
    tally = Tally()
    for seed in seeds:
        tally.programs += 1
        with mock.patch.object(parts, "choose_sizes", grown):
            program = fuzz.generate(seed)
        if program.dtype not in DTYPES:
            tally.skipped += 1
            continue
        served = Served()
        with only(varied(seed, served), random.Random(seed).choice([2, 4, 128])):
            fuzz.check(program, True, tally.fuzz)
        tally.served += bool(served.forward and served.backward)
        tally.forwards += served.forward
        tally.backwards += served.backward
        tally.refused += served.refused[:1]
    return tally


@pytest.mark.parametrize("first", range(0, PROGRAMS, SLICE))
def test_programs_served_by_triton_are_right(first, record_property):
    tally = run(range(first, min(first + SLICE, PROGRAMS)))
    record_property("fuzz of Triton", str(tally))
    print(tally)
    assert not tally.fuzz.failures, "\n\n".join([str(tally), *tally.fuzz.failures])
    assert tally.forwards == tally.fuzz.fused
    assert tally.served >= LEAST_SERVED * tally.programs or tally.programs < SLICE / 2, str(tally)
