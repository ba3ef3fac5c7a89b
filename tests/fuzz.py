"""Random attention programs, as Python source: refused, or right.

`python -m tests.fuzz --n 2000 --seed 0 [--train]` prints progress, the share fused and every
failing program with its inputs; `--show` only prints programs. A seed always gives one program.
"""

from __future__ import annotations

import argparse
import linecache
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests import fuzz_parts as parts, harness
from tests.spellings.base import MAKERS

LEAST_FUSED = 0.6  # of the programs of one slice that are no near misses
DTYPES = {"float32": 8, "bfloat16": 2, "float16": 1}


@dataclass(frozen=True)
class Program:
    """Source of a function `program`, (name, kind, shape) of each of its arguments, what else it calls by name."""

    seed: int
    source: str
    arguments: tuple[tuple[str, str, tuple[int, ...]], ...]
    dtype: torch.dtype
    near_miss: str
    names: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Callable:
        """The function; its source lines show in tracebacks and in reports."""
        name = f"<fuzz {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, **self.names}
        exec(compile(self.source, name, "exec"), scope)
        return scope["program"]

    def make_inputs(self) -> list[torch.Tensor]:
        gen = torch.Generator().manual_seed(self.seed)
        return [MAKERS[kind](list(shape), self.dtype, gen) for _, kind, shape in self.arguments]

    def __str__(self) -> str:
        lines = [f"# seed {self.seed}, {self.dtype}, near miss: {self.near_miss or 'none'}"]
        lines += [f"# {name}: {kind or 'learned'} {shape}" for name, kind, shape in self.arguments]
        return "\n".join([*lines, self.source])


@dataclass
class Tally:
    """Counts of a run and what failed; `what` the programs are."""

    what: str = "attentions"
    programs: int = 0
    fused: int = 0
    near_misses: int = 0
    near_misses_fused: int = 0
    invalid: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        meant = self.programs - self.near_misses
        fused = self.fused - self.near_misses_fused
        share = fused / max(meant, 1)
        return (
            f"{self.programs} programs: {fused} of {meant} {self.what} fused ({share:.1%}), "
            f"{self.near_misses_fused} of {self.near_misses} near-misses fused, "
            f"{len(self.failures)} failures, {self.invalid} not valid in eager"
        )


def assert_right(tally: Tally, at_most: int) -> None:
    """Nothing failed, nearly all of up to `at_most` programs were valid, and most that were meant to be fused are."""
    print(tally)
    assert not tally.failures, "\n\n".join([str(tally), *tally.failures])
    assert tally.invalid <= 0.1 * at_most
    fused = (tally.fused - tally.near_misses_fused) / max(tally.programs - tally.near_misses, 1)
    assert fused >= LEAST_FUSED or tally.programs < at_most / 2, str(tally)


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    w = parts.Writer(rng)
    parts.inputs(w)
    near_miss = ""
    if rng.random() < 0.15:
        parts.sdpa(w)
    else:
        near_miss = rng.choice(sorted(parts.NEAR_MISSES)) if rng.random() < 0.3 else ""
        steps(w, parts.NEAR_MISSES.get(near_miss))
    parts.leave(w)
    header = f"def program({', '.join(name for name, _, _ in w.arguments)}):\n"
    source = header + "".join(f"    {line}\n" for line in w.lines)
    dtype = getattr(torch, rng.choices(list(DTYPES), list(DTYPES.values()))[0])
    return Program(seed, source, tuple(w.arguments), dtype, near_miss)


def steps(w: parts.Writer, change: parts.NearMiss | None) -> None:
    """Attention in plain steps, with a near miss before or after the softmax."""
    parts.scores(w)
    parts.edits(w)
    if change and change.when == "scores":
        change.write(w)
    parts.softmax(w)
    if change and change.when == "weights":
        change.write(w)
    parts.values(w)


def check(program: Program, train: bool, tally: Tally) -> None:
    """Compile and compare one program; count it."""
    call, inputs = program.load(), program.make_inputs()
    try:
        for dtype in (torch.float64, None):
            harness.reference(call, inputs, train, dtype)
    except (RuntimeError, IndexError):
        tally.invalid += 1
        return
    tally.programs += 1
    tally.near_misses += bool(program.near_miss)
    try:
        wrong, report = harness.judge(call, inputs, train)
    except Exception:
        tally.failures.append(f"{program}\n{traceback.format_exc(limit=-4)}")
        return
    tally.fused += bool(report.sites)
    tally.near_misses_fused += bool(report.sites and program.near_miss)
    if wrong:
        specs = [site.spec for site in report.sites]
        tally.failures.append(f"{program}\nspecs {specs}\n" + "\n".join(wrong))


def run(
    seeds: range, train: bool | None = None, progress: bool = False, make: Callable = generate, what: str = "attentions"
) -> Tally:
    """Check the programs of `seeds`; without `train`, every other one in training."""
    tally, start = Tally(what), time.perf_counter()
    for i, seed in enumerate(seeds, 1):
        failed = len(tally.failures)
        check(make(seed), seed % 2 == 1 if train is None else train, tally)
        if progress and len(tally.failures) > failed:
            print(f"\n{tally.failures[-1]}", flush=True)
        if progress and i % 100 == 0:
            print(f"{time.perf_counter() - start:.0f} s: {tally}", flush=True)
    return tally


def main(make: Callable = generate, what: str = "attentions", description: str | None = __doc__) -> int:
    cli = argparse.ArgumentParser(description=description)
    cli.add_argument("--n", type=int, default=2000)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--train", action="store_true", help="all in training, else every other one")
    cli.add_argument("--show", action="store_true", help="print the programs, run nothing")
    options = cli.parse_args()
    seeds = range(options.seed, options.seed + options.n)
    if options.show:
        print("\n".join(str(make(seed)) for seed in seeds))
        return 0
    tally = run(seeds, True if options.train else None, True, make, what)
    print(tally)
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
