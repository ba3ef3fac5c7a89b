"""Times configs of the attention kernels, for `python -m tvcompile.tune --validate`.

    python -m benchmarks.configs [--pass fwd dq dkdv] [--work causal full] [--D 128] [--S 4096] [--json FILE]

On a GPU: the candidates of each Ask that the static model keeps, the best `--most` of them, run interleaved; medians.
Each line of the file holds the Ask, the config and its seconds. What fails to run is left out and named. Without a
GPU there is nothing to time: `--static` of tvcompile.tune ranks there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from tvcompile.arch import Device
from tvcompile.kernels import flash
from tvcompile.kernels.problem import Given, Problem
from tvcompile.tuning import static
from tvcompile.tuning.attention import Ask, Config
from tvcompile.tuning.workload import spec_of

from . import attention_gpu as gpu

ROUNDS = 5


def line(ask: Ask, config: Config, seconds: float) -> dict[str, Any]:
    """What --validate reads."""
    fields = {f.name: getattr(ask, f.name) for f in dataclasses.fields(ask) if f.name != "device"}
    device = {"arch": ask.device.arch, "shared": ask.device.shared, "units": ask.device.units}
    return {"ask": {"op": ask.op, **device, **fields}, "config": dataclasses.asdict(config), "seconds": seconds}


def problem(ask: Ask, device: str) -> tuple[Problem, Given]:
    """Random tensors of an Ask's sizes: `programs` heads of one batch, as many keys as rows."""
    make = functools.partial(torch.randn, dtype=getattr(torch, ask.dtype), device=device)
    shape = (1, ask.programs, ask.rows)
    q, k, dout = make(*shape, ask.D), make(1, ask.programs, ask.keys, ask.D), make(*shape, ask.D_v)
    p = Problem.of(q, k, make(1, ask.programs, ask.keys, ask.D_v), [], [], spec_of(ask.work), None)
    return p, Given(dout, torch.zeros_like(dout), torch.zeros(shape, device=device))


def call(p: Problem, given: Given, pass_: str, config: Config) -> Callable[[], Any]:
    """One launch of a pass. Of the backward both kernels run: the other one by its formula, which is alike for all."""
    if pass_ == "fwd":
        return functools.partial(flash.forward, p, config)
    device, size = Device.of(p.q.device), str(p.q.dtype)[6:]
    own = {x: Ask(device, x, size, *p.features).formula()[0] for x in ("dq", "dkdv")} | {pass_: config}
    return functools.partial(flash.backward, p, given, (), own["dq"], own["dkdv"])


def timed(ask: Ask, configs: list[Config], device: str) -> Iterator[dict[str, Any]]:
    """A line for each config that runs."""
    p, given = problem(ask, device)
    clock = gpu.gpu_clock if device == "cuda" else gpu.host_clock
    times: dict[Config, list[float]] = {}
    calls = {c: call(p, given, ask.pass_, c) for c in configs}
    for _ in range(ROUNDS):
        for c, run in list(calls.items()):
            try:
                run()
                times.setdefault(c, []).append(clock(run)[0] / 1e3)
            except Exception as failure:
                print(f"left out: {c}: {gpu.reason(failure)}")
                del calls[c]
                times.pop(c, None)
    yield from (line(ask, c, statistics.median(seconds)) for c, seconds in times.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="passes", nargs="+", default=["fwd"], choices=["fwd", "dq", "dkdv"])
    parser.add_argument("--work", nargs="+", default=["causal"], help="classes that capture nothing")
    for name, default in {"D": [64, 128], "S": [4096]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--json", type=Path, default=Path("configs.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing to time; rank with `python -m tvcompile.tune --static --arch ...`")
    device = Device.of(torch.device("cuda"))
    sizes = [(x, w, D, S) for x in options.passes for w in options.work for D in options.D for S in options.S]
    found: list[dict[str, Any]] = []
    for pass_, work, D, S in track(sizes, "timing"):
        ask = Ask(device, pass_, "bfloat16", D, D, work, S, S, options.heads)
        configs = [c for c, _ in static.rank(ask, ask.candidates())][: options.most]
        found += timed(ask, configs, "cuda")
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
