"""How long a config takes to look up, and what tuning adds to a compilation that searches nothing.

python -m benchmarks.tuning     microseconds, medians: a lookup known already, a new one, reading the user's cache
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from tvcompile.arch import Device
from tvcompile.tuning import choose, moe, state, store
from tvcompile.tuning.attention import Ask
from tvcompile.tuning.kept import Kept

SM90 = Device.typical("sm90", 132)
ENTRY = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def microseconds(call: Callable[[], object], rounds: int = 7, calls: int = 2000) -> float:
    """Median over rounds of the mean of many calls."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


def asks() -> list[tuple[str, Callable[[], object]]]:
    attention = Ask(SM90, "fwd", "bfloat16", 128, 128, "causal", 4096, 4096)
    experts = moe.Ask(SM90, "up", "bfloat16", 384, 64, 2816, 2048, 6)
    lengths = iter(range(1, 1 << 30))
    return [
        ("attention, known", lambda: choose(attention)),
        ("attention, known, with its Ask made", lambda: choose(Ask(SM90, "fwd", "bfloat16", 128, 128, "causal", 4096))),
        ("experts, known", lambda: choose(experts)),
        ("attention, new", lambda: choose(dataclasses.replace(attention, rows=next(lengths)))),
        ("experts, new", lambda: choose(dataclasses.replace(experts, rows=next(lengths)))),
    ]


def main() -> None:
    table = Table("", "us, nothing measured", "us, 1000 measured")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TVCOMPILE_CACHE_DIR"] = folder
        rows = [(name, call, microseconds(call)) for name, call in asks()]
        compiling = [("store.load, at each graph", store.load), ("state, at each graph", state)]
        rows += [(name, call, microseconds(call, calls=200)) for name, call in compiling]
        row = dataclasses.asdict(store.Entry(ENTRY, "measured", 1.0))
        name = store.family(Ask(SM90, "fwd", "bfloat16"))
        many = {Ask(SM90, "fwd", "bfloat16", 128, 128, f"w{i}", 64, 64).key: row for i in range(1000)}
        Kept(store.folder() / f"{name}.json").update(many)
        store.load()
        for name, call, before in rows:
            after = microseconds(call, calls=200 if "graph" in name else 2000)
            table.add_row(name, f"{before:.1f}", f"{after:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
