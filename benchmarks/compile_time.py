"""Seconds to compile a Llama of 6, 12 and 24 layers, with Inductor alone and with tv.

    python -m benchmarks.compile_time [--train] [--layers 6 12 24] [--repeat 3]

Each compilation has a process of its own and no cache; the two compilers alternate. `passes` are
ours (Report.pass_seconds); linear means that their seconds per layer do not grow with the layers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

BACKENDS = ("inductor", "tv")
BATCH, SEQ = 2, 128


def measure(backend: str, layers: int, train: bool, impl: str) -> dict[str, Any]:
    """Compiles in this process: {"seconds": total, "passes": {name: seconds}, "sites": count}."""
    import torch

    # The first compilation of a process pays for imports and for finding a C++ compiler.
    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(64))
    model, inputs = llama(layers, train, impl)
    compiled = torch.compile(model, backend=backend)

    def step() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            logits = compiled(**inputs, use_cache=False).logits
            if train:
                logits.float().square().mean().backward()
        return time.perf_counter() - start

    if backend != "tv":
        return {"seconds": step() - min(step() for _ in range(3)), "passes": {}, "sites": 0}
    import tvcompile

    with tvcompile.collect() as report:
        seconds = step()
    seconds -= min(step() for _ in range(3))
    return {"seconds": seconds, "passes": dict(report.pass_seconds), "sites": len(report.sites)}


def llama(layers: int, train: bool, impl: str) -> tuple[Any, dict[str, Any]]:
    """A narrow Llama: what it costs to compile depends on its layers, not on its width."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=impl)
    ids = torch.randint(0, 256, (BATCH, SEQ))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return model.train(train), {"input_ids": ids, "attention_mask": mask}


def in_a_process(backend: str, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a new process, with every cache off and empty."""
    command = [sys.executable, "-m", "benchmarks.compile_time", "--one", backend]
    command += ["--layers", str(layers), "--impl", options.impl] + ["--train"] * options.train
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
        }
        out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def median(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Median total seconds, median seconds of our passes."""
    totals = [run["seconds"] for run in runs]
    return statistics.median(totals), statistics.median(sum(r["passes"].values()) for r in runs)


def table(options: argparse.Namespace) -> None:
    """Measures all sizes and prints a line for each."""
    print(f"Llama, {options.impl}, {'training' if options.train else 'inference'}; seconds, median")
    print(f"{'layers':>6} {'inductor':>9} {'tv':>7} {'tv/ind':>7} {'passes':>7} {'share':>6} ms/layer")
    rates, slowest = {}, {}
    for layers in options.layers:
        runs: dict[str, list] = {backend: [] for backend in BACKENDS}
        for i in range(options.repeat):
            for backend in BACKENDS[:: 1 if i % 2 == 0 else -1]:
                runs[backend].append(in_a_process(backend, layers, options))
        (stock, _), (total, passes) = (median(runs[backend]) for backend in BACKENDS)
        rates[layers] = passes / layers
        slowest = runs["tv"][-1]["passes"]
        line = f"{layers:6d} {stock:9.2f} {total:7.2f} {total / stock:6.2f}x {passes:7.2f}"
        print(f"{line} {passes / total:6.1%} {1e3 * rates[layers]:8.1f}", flush=True)
        fused = {run["sites"] for run in runs["tv"]}
        if fused != {layers}:
            print(f"       fused {sorted(fused)} of {layers} sites: the times do not compare")
    few, many = min(rates), max(rates)
    growth = rates[many] / rates[few] if rates[few] else float("nan")
    print(f"passes per layer, {many} layers against {few}: {growth:.2f}x (1 = linear)")
    for name, seconds in sorted(slowest.items(), key=lambda item: -item[1]):
        print(f"  {name:24} {seconds:6.2f} s at {options.layers[-1]} layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--impl", default="eager", choices=("eager", "sdpa"))
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers[0], options.train, options.impl)))
    else:
        table(options)


if __name__ == "__main__":
    main()
