"""Ranks configs for any architecture on any machine: cross-compiled, read, and priced by a model; never timed.

    predict(ask, config)                  Prediction(seconds, limiter, spills, ...)
    rank(ask, ask.candidates())           Ranking([(config, Prediction), ...] best first, what was left out and why)

What a compiled kernel holds (machine_code.Code) is kept in options.cache_folder()/static, in a folder named by the
sources that decide it and Triton's version, so that a second ranking compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import options
from . import workers
from .cross_compile import SWIGLU, spec_of
from .machine_code import Code, Loop
from .model import Prediction, predict as price
from .rates import rates
from .workload import load_of

LIMIT = 60.0  # seconds that compiling one config may take
STACK = 64  # bytes of a thread's stack that may be there without a spill
VERSIONS = 4  # folders of other versions that are kept


@dataclasses.dataclass(frozen=True)
class Ranking:
    """ranked: configs, best first; left: how many were left out, by reason; compiled: those not in the cache."""

    ranked: list[tuple[Any, Prediction]]
    left: dict[str, int]
    compiled: int

    def __iter__(self):
        return iter(self.ranked)

    def __len__(self) -> int:
        return len(self.ranked)

    def __getitem__(self, i: Any) -> Any:
        return self.ranked[i]


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile: an Ask, without what no kernel is compiled for, and a config."""

    ask: Any
    config: Any

    @staticmethod
    def of(ask: Any, config: Any) -> Job:
        """Units and lengths change nothing in the kernel, nor how often its keys are split."""
        device = dataclasses.replace(ask.device, units=1)
        if ask.op == "attention":
            ask = dataclasses.replace(ask, device=device, rows=0, keys=0, programs=1)
            return Job(ask, dataclasses.replace(config, splits=min(config.splits, 2)))
        return Job(dataclasses.replace(ask, device=device, rows=0), config)

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:24]


def predict(ask: Any, config: Any) -> Prediction:
    """What the model says of one config. Raises ValueError where it does not compile."""
    job = Job.of(ask, config)
    code = known(job)
    if code is None:
        # The interpreter's kernels do not compile, and what hangs is killed: never in this process.
        _, outcome = next(workers.each(compiled, [job], LIMIT, 1))
        if outcome.failure:
            raise ValueError(outcome.failure)
        code = outcome.value
    return _price(ask, config, code)


def _price(ask: Any, config: Any, code: Code) -> Prediction:
    about = rates(ask.device.arch)
    units = ask.device.units if ask.device.units > 1 else about.units
    return price(code, load_of(ask, config), about, units, config.num_warps)


def rank(
    ask: Any, configs: Sequence[Any], progress: Callable[[int, int], None] | None = None, limit: float = LIMIT
) -> Ranking:
    """Configs by the model's time; those that fail, spill or do not fit are left out and counted.

    progress: called with (how many are read, of how many); limit: seconds for each to compile.
    """
    jobs = [Job.of(ask, c) for c in configs]
    codes: dict[Job, Code | str] = {job: code for job in jobs if (code := known(job)) is not None}
    todo = [job for job in dict.fromkeys(jobs) if job not in codes]
    total, done = len(set(jobs)), len(codes)
    if progress:
        progress(done, total)
    for i, outcome in workers.each(compiled, todo, limit):
        codes[todo[i]] = outcome.failure or outcome.value
        done += 1
        if progress:
            progress(done, total)
    ranked, left = [], Counter[str]()
    for config, job in zip(configs, jobs):
        found = codes[job]
        if reason := _reason(ask, found):
            left[reason] += 1
        else:
            assert isinstance(found, Code)
            ranked.append((config, _price(ask, config, found)))
    ranked.sort(key=lambda pair: pair[1].seconds)
    return Ranking(ranked, dict(left), len(todo))


def _reason(ask: Any, code: Code | str) -> str | None:
    """Why a config is left out."""
    if isinstance(code, str):
        return code
    if code.spills:
        return "spills"
    if code.ctas == 0 or ask.device.shared and code.shared > ask.device.shared:
        return "does not fit"
    return None if any(loop.flop for loop in code.loops + code.partitions) else "no loop with products"


# Compiling


def compiled(job: Job) -> Code:
    """Compiles a job here, and keeps what is read of it."""
    from . import amd_code, machine_code
    from .cross_compile import compile_launch

    arch = job.ask.arch
    kernel = compile_launch(launch_of(job), arch)
    if arch.startswith("sm") and (stack := machine_code.stack(kernel)) > STACK:
        # What spills is left out: no need to know how it loops.
        code = Code(0, stack // 4, kernel.metadata.shared, 0, {}, [])
    else:
        read = amd_code.read if arch.startswith("gfx") else machine_code.read
        code = read(kernel, arch, job.config.num_warps)
    _keep(job, code)
    return code


def launch_of(job: Job) -> Any:
    """The launch that a config is for."""
    from .cross_compile import expert_launches, launches

    ask, config = job.ask, job.config
    dtype = getattr(torch, ask.dtype)
    if ask.op == "attention":
        return launches(ask.pass_, config, dtype, ask.D, ask.D_v, spec_of(ask.work))[0]
    N, K = ask.N or 2048, ask.K or 2048
    # Of g and u together, where N or K are both.
    features = {"up": (K, N // 2, K), "down": (N, K, N), "dact": (K, N, K), "dx": (N, K // 2, N), "dw": (K, N // 2, K)}
    H, F, H_out = features[ask.pass_]
    sizes: dict[str, Any] = {"T": 4096, "K": ask.top or 2, "E": ask.E or 64, "H": H, "F": F, "H_out": H_out}
    others = dataclasses.replace(ask, rows=128)

    def configs(pass_: str) -> Any:
        return config if pass_ == ask.pass_ else dataclasses.replace(others, pass_=pass_).formula()[-1]

    found = expert_launches(configs, dtype, SWIGLU, ask.pass_ in ("dact", "dx", "dw"), **sizes)
    names = {"up": "experts_up", "dact": "experts_dact", "dw": "experts_outer"}
    return found[names.get(ask.pass_, "experts_rows")][0]


# What was read, on disk


@functools.lru_cache(maxsize=1)
def sources() -> str:
    """A hash of all that decides what is read of a config: kernels, formulas, the reading, rates, Triton's version."""
    import triton

    package = Path(__file__).resolve().parent.parent
    files = [*package.glob("*.py"), *(package / "kernels").glob("*.py")]
    here = ("cross_compile", "machine_code", "amd_code", "rates", "workload", "static")
    files += [package / f"tuning/{name}.py" for name in here] + [package / "tuning/tables/devices.json"]
    found = hashlib.sha256(triton.__version__.encode())
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def folder() -> Path:
    return options.cache_folder() / "static" / sources()


def known(job: Job) -> Code | None:
    """What was read of a job before, on this machine."""
    try:
        found = json.loads((folder() / f"{job.key}.json").read_text())
        loops, partitions = ([Loop(**x) for x in found.pop(name)] for name in ("loops", "partitions"))
        return Code(**found, loops=loops, partitions=partitions)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _keep(job: Job, code: Code) -> None:
    """Whole or not at all; a cache that cannot be written is none."""
    try:
        if not folder().is_dir():
            folder().mkdir(parents=True, exist_ok=True)
            _forget()
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".tmp", delete=False) as file:
            json.dump(dataclasses.asdict(code), file)
        os.replace(file.name, folder() / f"{job.key}.json")
    except OSError:
        pass


def _forget() -> None:
    """Removes all but the youngest folders."""
    found = sorted(folder().parent.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
    for old in found[VERSIONS:]:
        shutil.rmtree(old, ignore_errors=True)
