"""Audits the configs that are chosen, without a GPU: they compile, fit the shared memory and do not spill.

    python tools/tables.py [--arch sm90] [--op attention] [--dtype bfloat16] [--part 3/40] [--json FILE]
    python tools/tables.py --write [--arch sm90] [--pass fwd] [--width 128] [--dtype float16]

For every architecture, dtype, width, class of work and pass of attention, and for every pass of the experts of ten
public models: the first choice and the formula's. What is chosen must not spill. Where a row of the table stands before
it, the formula's must not for want of registers; what ptxas spills though there are some, so that more programs run, is
counted and shown. --part i/n takes every n-th case from the i-th, in an order that mixes them.

--write compiles the rows of tables/attention.json with every class of work and writes into them which they serve and
how much shared memory they take, and adds rows for what none of them serves without a spill. Rows of 16 bits serve
bfloat16 and float16: --dtype float16 keeps of what they serve what does not spill there either. Run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MASKS = ("full", "causal", "mask", "data")
EDITS = ("sink", "mean", "score", "dropout", "bias")
WORKS = (*MASKS, *(f"causal+{x}" for x in EDITS))
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes
DTYPES = tuple(SIZES)
OF_SIZE = {2: ("bfloat16", "float16"), 4: ("float32",)}
TABLE = ROOT / "tvcompile/tuning/tables/attention.json"
# E, K, H, F of public mixtures.
MODELS = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "dbrx": (16, 4, 6144, 10752),
    "phi-3.5-moe": (16, 2, 4096, 6400),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "granite-3-moe": (40, 8, 1536, 512),
    "olmoe": (64, 8, 2048, 1024),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "deepseek-v3": (256, 8, 7168, 2048),
}
KERNELS = {
    "up": "experts_up",
    "down": "experts_rows",
    "dact": "experts_dact",
    "dx": "experts_rows",
    "dw": "experts_outer",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that a config is asked for. attention: width, work, rows; moe: model, tokens, listed."""

    op: str
    arch: str
    dtype: str
    pass_: str
    width: int = 0
    work: str = ""
    rows: int = 0
    model: str = ""
    listed: bool = False

    @property
    def ask(self) -> Any:
        from tvcompile.arch import Device
        from tvcompile.tuning import attention

        if self.op == "moe":
            return next(a for a in self.need_asks() if a.pass_ == self.pass_)
        device, wide = Device.typical(self.arch, 100), self.width
        return attention.Ask(device, self.pass_, self.dtype, wide, wide, self.work, self.rows, 4096, 8)

    def need_asks(self) -> list[Any]:
        import torch

        from tvcompile.arch import Device
        from tvcompile.kernels.experts import ExpertNeed
        from tvcompile.kernels.moe_triton import asks
        from tvcompile.moe_spec import MoESpec
        from tvcompile.tuning.cross_compile import SWIGLU

        E, K, H, F = MODELS[self.model]
        dtype, device = getattr(torch, self.dtype), Device.typical(self.arch, 100)
        return asks(ExpertNeed(MoESpec.parse(SWIGLU), dtype, True, self.rows, K, E, (H, F, H), not self.listed, device))

    def launch(self, config: Any) -> Any:
        import torch

        from tvcompile.tuning import choose
        from tvcompile.tuning.cross_compile import expert_launches, launches, spec_of

        dtype = getattr(torch, self.dtype)
        if self.op == "attention":
            return launches(self.pass_, config, dtype, self.width, self.width, spec_of(self.work))[0]
        E, K, H, F = MODELS[self.model]
        configs = {a.pass_: choose(a)[0].config for a in self.need_asks()} | {self.pass_: config}
        sizes: Any = {"T": self.rows, "K": K, "E": E, "H": H, "F": F, "H_out": H}
        backward = self.pass_ in ("dact", "dx", "dw")
        found = expert_launches(configs.__getitem__, dtype, backward=backward, listed=self.listed, **sizes)
        return found[KERNELS[self.pass_]][0]

    def __str__(self) -> str:
        problem = f"D={self.width} {self.work}" if self.op == "attention" else f"{self.model} {'listed ' * self.listed}"
        return f"{self.op} {self.arch} {self.dtype} {self.pass_} {problem} rows={self.rows}"


def cases(archs: list[str], ops: list[str], dtypes: list[str], passes: list[str]) -> Iterator[Case]:
    from tvcompile.arch import SHARED
    from tvcompile.tuning import attention, moe

    for arch in archs or SHARED:
        for dtype in dtypes or DTYPES:
            for pass_ in (p for p in attention.PASSES if "attention" in ops and p in (passes or [p])):
                for width in attention.WIDTHS:
                    for rows in (4, attention.few_rows(width, SIZES[dtype])) if pass_ == "decode" else (4096,):
                        yield from (Case("attention", arch, dtype, pass_, width, work, rows) for work in WORKS)
            for pass_ in (p for p in moe.PASSES if "moe" in ops and p in (passes or [p])):
                for model, sizes in MODELS.items():
                    for rows in (16, 512, 8192):
                        yield Case("moe", arch, dtype, pass_, rows=rows, model=model)
                    # Lists are tuples of pointers, 128 at most.
                    if sizes[0] in (8, 64):
                        yield Case("moe", arch, dtype, pass_, rows=8192, model=model, listed=True)


def compiled(case: Case, config: Any) -> dict[str, Any]:
    """registers, spills and shared memory of a case's kernel, and what is `wrong` with them; needed: spills of all."""
    from tvcompile.tuning import amd_code, machine_code
    from tvcompile.tuning.cross_compile import compile_launch

    row = {"case": str(case), "config": dataclasses.asdict(config), "spills": 0, "needed": 0, "shared": 0, "wrong": ""}
    try:
        kernel = compile_launch(case.launch(config), case.arch)
    except Exception as error:
        return row | {"wrong": f"{type(error).__name__}: {error}"[:300]}
    if case.arch.startswith("gfx"):
        code = amd_code.read(kernel, case.arch, config.num_warps)
    else:
        code = machine_code.read(kernel, case.arch, config.num_warps)
    row |= {"registers": code.registers, "spills": code.spills, "needed": code.spills, "shared": code.shared}
    if code.spills and case.arch.startswith("sm"):
        roomy = compile_launch(case.launch(config), case.arch, all_registers=True)
        row["needed"] = machine_code.read(roomy, case.arch, config.num_warps).spills
    limit = case.ask.device.shared
    if row["spills"]:
        row["wrong"] = f"{row['spills']} spills"
    elif row["shared"] > limit:
        row["wrong"] = f"{row['shared']} bytes of shared memory, {limit} at most"
    return row


def audited(case: Case) -> list[dict[str, Any]]:
    """The first choice of a case and the formula's first, compiled."""
    from tvcompile.tuning import choose

    found, formula = choose(case.ask), case.ask.formula()
    configs = {found[0].config: found[0].source}
    configs.setdefault(case.ask.fitted(formula[0]), "formula")
    rows = [{**compiled(case, config), "source": source} for config, source in configs.items()]
    return [{**row, "chosen": i == 0} for i, row in enumerate(rows)]


# Rows of the table

Cell = tuple[str, str, int, int]  # arch, pass_, size, width
LADDER = {
    "fwd": ((128, 64, 8), (64, 64, 8), (64, 32, 8), (32, 64, 4), (32, 32, 8), (32, 32, 4), (32, 16, 8), (16, 32, 4)),
    "dq": ((128, 64, 8), (64, 64, 8), (64, 32, 8), (32, 64, 8), (32, 32, 8), (32, 32, 4), (32, 16, 8), (16, 32, 4)),
    "dkdv": ((64, 64, 8), (32, 64, 8), (64, 32, 8), (32, 32, 8), (32, 32, 4), (16, 32, 8), (16, 32, 4)),
    "decode": ((16, 64, 4), (16, 32, 4), (16, 128, 4), (16, 64, 2), (16, 16, 4), (16, 16, 2)),
}
# Products of float32 are multiplications, whose operands lie in registers.
LADDER_FLOAT32 = {
    "fwd": ((32, 32, 8), (16, 32, 8), (16, 16, 8), (16, 16, 4)),
    "dq": ((64, 16, 8), (32, 32, 8), (32, 16, 8), (16, 32, 8), (16, 16, 8), (16, 64, 8), (16, 16, 4), (16, 32, 16)),
    "dkdv": ((32, 32, 8), (16, 64, 8), (16, 32, 8), (32, 16, 8), (16, 16, 8), (64, 16, 8), (16, 16, 4)),
    "decode": ((16, 32, 4), (16, 32, 8), (16, 16, 8), (16, 16, 4)),
}


def ladder(pass_: str, size: int) -> tuple[tuple[int, int, int], ...]:
    """Rows, keys and warps to try, the largest first."""
    return (LADDER_FLOAT32 if size == 4 else LADDER)[pass_]


class Works:
    """Which classes of work a config of a cell serves in these dtypes, compiled when asked."""

    def __init__(self, cell: Cell, config: dict[str, Any], dtypes: tuple[str, ...]):
        self.cell, self.config, self.dtypes = cell, config, dtypes
        self.results: dict[str, dict[str, Any]] = {}

    def good(self, work: str) -> bool:
        if work not in self.results:
            self.results[work] = self._compiled(work)
        return not self.results[work]["wrong"]

    def _compiled(self, work: str) -> dict[str, Any]:
        """Of all dtypes, and of a decode for the fewest and the most rows, the worst."""
        from tvcompile.tuning.attention import Config, few_rows

        arch, pass_, size, width = self.cell
        every_rows, found = (4, few_rows(width, size)) if pass_ == "decode" else (4096,), []
        for dtype, rows in itertools.product(self.dtypes, every_rows):
            case = Case("attention", arch, dtype, pass_, width, work, rows)
            found.append(compiled(case, case.ask.fitted(Config(**self.config))))
        return max(found, key=lambda r: (bool(r["wrong"]), r["shared"]))

    @property
    def shared(self) -> int:
        return max((r["shared"] for r in self.results.values() if not r["wrong"]), default=0)

    def masks(self, asked: Sequence[str] = MASKS) -> list[str]:
        return [m for m in asked if self.good(m)]

    def edits(self, asked: Sequence[str], masks: list[str]) -> list[str]:
        """Those served with a causal mask and with the heaviest that is, each alone and all together.

        What spills is no matter of weight alone: some spill with the lighter mask only.
        """
        if not masks:
            return []
        common = [m for m in masks if m in ("causal", masks[-1])]
        found = [e for e in asked if all(self.good(f"{m}+{e}") for m in common)]
        # Scores that load captures are edited as well.
        while len(found) > 1 and not self.good("+".join([masks[-1], *(e for e in found if e != "score")])):
            found.pop()
        return found


def covered(cell: Cell, rows: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """A cell's rows with the masks and edits that each serves, and a row for each of those that none serves.

    In the second of two dtypes what they serve is asked of what they served in the first.
    """
    arch, pass_, size, width = cell
    given = {"arch": arch, "pass_": pass_, "size": size, "width": width}
    kept, left_masks, left_edits = [], list(MASKS), list(EDITS)
    for row in rows:
        works, first = Works(cell, row["config"], (dtype,)), dtype == OF_SIZE[size][0]
        if not (masks := works.masks(MASKS if first else row["when"].get("mask", MASKS))):
            continue
        edits = works.edits(EDITS if first else row["when"].get("edits", EDITS), masks)
        when = {k: v for k, v in row["when"].items() if k not in ("mask", "edits")}
        limits = {"mask": masks} if len(masks) < len(MASKS) else {}
        limits |= {"edits": edits} if len(edits) < len(EDITS) else {}
        kept.append({**row, "when": when | limits, "shared": max(works.shared, 0 if first else row["shared"])})
        left_masks = [m for m in left_masks if m not in masks]
        left_edits = [e for e in left_edits if e not in edits]
    described = rows[0]["config"].get("descriptors", False) if rows and pass_ != "decode" else False
    for M, N, warps in ladder(pass_, size):
        if not left_masks and not left_edits:
            break
        waves = arch.startswith("gfx")  # of 64 threads
        config = {"BLOCK_M": M, "BLOCK_N": N, "num_warps": min(warps, 4) if waves else warps}
        config["num_stages"] = 2 if size == 2 and not waves else 1
        config |= {"descriptors": True} if described else {}
        config |= {"hoist": False} if pass_ == "dkdv" else {}
        works = Works(cell, config, OF_SIZE[size])
        # Masks alone are served before, once none is left.
        masks = works.masks() if left_masks else list(MASKS)
        edits = works.edits(EDITS if left_masks else tuple(left_edits), masks)
        if set(masks) & set(left_masks) or set(edits) & set(left_edits):
            row = {"mask": masks} if left_masks and len(masks) < len(MASKS) else {}
            row |= {"edits": edits} if len(edits) < len(EDITS) else {}
            kept.append({"when": given | row, "config": config, "shared": works.shared})
            left_masks = [m for m in left_masks if m not in masks]
            left_edits = [e for e in left_edits if e not in edits]
    return kept + last(cell, kept)


ALL = "+".join(["data", *(e for e in EDITS if e != "score")])


def last(cell: Cell, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for all that a cell's rows do not serve, as several edits at once: the largest without a spill."""
    arch, pass_, size, width = cell
    if not rows or any("mask" not in r["when"] and "edits" not in r["when"] for r in rows):
        return []
    described = rows[0]["config"].get("descriptors", False) and pass_ != "decode"
    stages = (1,) if size == 4 or arch.startswith("gfx") else (2, 1)
    for (M, N, warps), flight in itertools.product((*ladder(pass_, size), (16, 16, 4)), stages):
        config = {"BLOCK_M": M, "BLOCK_N": N, "num_warps": min(warps, 4) if arch.startswith("gfx") else warps}
        config |= {"num_stages": flight}
        config |= ({"descriptors": True} if described else {}) | ({"hoist": False} if pass_ == "dkdv" else {})
        works = Works(cell, config, OF_SIZE[size])
        if works.good(ALL) and works.good("data") and works.edits(EDITS, list(MASKS)) == list(EDITS):
            when = {"arch": arch, "pass_": pass_, "size": size, "width": width}
            return [{"when": when, "config": config, "shared": works.shared}]
    return []


def write(archs: list[str], dtypes: list[str], passes: list[str], widths: list[int]) -> int:
    from rich.progress import track

    from tvcompile.arch import SHARED
    from tvcompile.tuning.attention import PASSES, WIDTHS

    table = json.loads(TABLE.read_text(encoding="utf-8"))
    cells: dict[Cell, list[dict[str, Any]]] = {
        (arch, pass_, size, width): [] for arch in SHARED for pass_ in PASSES for size in (2, 4) for width in WIDTHS
    }
    for row in table["rows"]:
        cells[tuple(row["when"][n] for n in ("arch", "pass_", "size", "width"))].append(row)
    head = {k: v for k, v in table.items() if k != "rows"}
    for dtype in (d for d in DTYPES if d in (dtypes or DTYPES)):
        todo = [c for c in cells if c[0] in (archs or SHARED) and c[1] in (passes or PASSES) and c[2] == SIZES[dtype]]
        todo = [c for c in todo if c[3] in (widths or WIDTHS)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(covered, todo, [cells[cell] for cell in todo], itertools.repeat(dtype))
            for cell, rows in zip(todo, track(found, f"compiling {dtype}", len(todo))):
                cells[cell] = rows
                # Whole after each cell, so that what was found is kept.
                lines = [json.dumps(row) for rows in cells.values() for row in rows]
                text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
                TABLE.write_text(text, encoding="utf-8")
    return 0


def main() -> int:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=[])
    parser.add_argument("--op", nargs="*", default=["attention", "moe"])
    parser.add_argument("--dtype", nargs="*", default=[])
    parser.add_argument("--pass", nargs="*", default=[])
    parser.add_argument("--width", nargs="*", type=int, default=[])
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        return write(options.arch, options.dtype, getattr(options, "pass"), options.width)
    first, step = map(int, options.part.split("/"))
    todo = list(cases(options.arch, options.op, options.dtype, getattr(options, "pass")))
    random.Random(0).shuffle(todo)
    todo = todo[first % step :: step]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = [row for rows in track(pool.map(audited, todo), "compiling", len(todo)) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    shown = [row for row in found if row["wrong"]]
    wrong = [row for row in shown if row["chosen"] or row["needed"] or not row["spills"]]
    console = Console(highlight=False, soft_wrap=True)
    for row in shown:
        place = "wrong" if row in wrong else "behind a row"
        console.print(f"{place}: {row['case']} ({row['source']}): {row['wrong']}", markup=False)
    behind = len(shown) - len(wrong)
    console.print(f"{len(todo)} cases, {len(found)} configs, {len(wrong)} wrong, {behind} behind a row spill")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
