"""The static model on the command line: --static ranks, --tables writes rows, --validate compares with measured times.

    python -m tvcompile.tune --static --arch sm90 --pass fwd --D 128 --S 4096 --work causal
    python -m tvcompile.tune --tables --arch sm90 --pass fwd dq          rows of arch x pass x width x work
    python -m tvcompile.tune --validate results.json

results.json: [{"ask": {"op": "attention", "arch": "sm90", "units": 132, "pass_": "fwd", "dtype": "bfloat16", "D": 128,
"D_v": 128, "work": "causal", "rows": 4096, "keys": 4096, "programs": 32}, "config": {"BLOCK_M": 128, ...},
"seconds": 0.00031}, ...]: timed configs of as many Asks as there are; `ask` has the fields of attention.Ask or moe.Ask.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..arch import SHARED, Device
from . import attention, moe, static, tables_file
from .rates import rates

ASKS: dict[str, Any] = {"attention": attention, "moe": moe}
NOTE = "[b]A model of machine code, not a measurement[/b]: it ranks configs, and its times are of no use by themselves."
TABLE_WORKS = ("full", "causal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("static model", "ranks configs for any architecture without a GPU")
    what.add_argument("--static", action="store_true", help="rank the candidates for the sizes given")
    what.add_argument(
        "--tables", action="store_true", help="rank every width and class of work; write the table's rows"
    )
    what.add_argument("--validate", type=Path, metavar="FILE", help="compare the ranking with measured times")
    what.add_argument(
        "--write", type=Path, metavar="FILE", help="the table that rows go to (--tables: the shipped one)"
    )
    what.add_argument("--arch", nargs="+", help=f"{', '.join(SHARED)}; several for --tables")
    what.add_argument("--op", choices=list(ASKS), default="attention")
    what.add_argument("--pass", nargs="+", dest="passes", help="fwd dq dkdv decode, or up down dact dx dw")
    what.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    what.add_argument(
        "--work", nargs="+", default=None, help="full, causal, mask, data, with +score, +bias, +dropout, ..."
    )
    what.add_argument("--units", type=int, default=0, help="multiprocessors; those of the usual board by default")
    what.add_argument("--show", type=int, default=12, help="lines that are printed")
    sizes = {"B": 2, "H": 16, "H_kv": 0, "S": 4096, "D": 128, "D_v": 0}
    for name, default in sizes.items():
        what.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"T": 4096, "E": 64, "N": 2816, "K": 2048, "top": 6}.items():
        what.add_argument(f"--{name}", type=int, default=default, help="of a product of --op moe")


def run(options: argparse.Namespace, console: Any) -> int:
    """What the options ask for; 0, or 2 where they make no sense."""
    if options.validate is not None:
        return validate(options.validate, console)
    archs = options.arch or (list(SHARED) if options.tables else [])
    if unknown := [a for a in archs if a not in SHARED] or not archs:
        console.print(f"--arch: {unknown if archs else 'which one?'}; known are {', '.join(SHARED)}", style="red")
        return 2
    passes = ASKS[options.op].PASSES
    if wrong := [p for p in options.passes or () if p not in passes]:
        console.print(f"--pass: {', '.join(wrong)}; {options.op} has {', '.join(passes)}", style="red")
        return 2
    console.print(NOTE)
    rows, dropped = [], []
    for ask in asks(options, archs):
        ranking = ranked(ask, console)
        if not options.tables:
            show(ask, ranking, options.show, console)
        row = tables_file.row_of(ask, ranking)
        rows += [row] if row else []
        dropped += [] if row else [tables_file.when_of(ask)]
        console.print(f"{title(ask)}: {_verdict(row)}", markup=False)
    if options.write or options.tables:
        path = options.write or tables_file.PATH / f"{options.op}.json"
        tables_file.write(path, rows, dropped)
        console.print(f"{len(rows)} rows written to {path}, {len(dropped)} left to the formula", markup=False)
    return 0


def _verdict(row: dict[str, Any] | None) -> str:
    return f"row {row['config']}" if row else "no row: the formula is within 3 % of the best, or nothing can be ranked"


def asks(options: argparse.Namespace, archs: Iterable[str]) -> Iterable[Any]:
    """The Asks of the options: of --tables every width, and the classes of work that are given."""
    module = ASKS[options.op]
    for arch in archs:
        device = Device.typical(arch, options.units or rates(arch).units)
        for pass_ in options.passes or (module.PASSES if options.tables else module.PASSES[:1]):
            if options.op == "moe":
                rows = max(1, options.T * options.top // options.E)
                yield moe.Ask(device, pass_, options.dtype, rows, options.E, options.N, options.K, options.top)
                continue
            heads = options.H_kv or options.H
            rows, lanes = options.S * (options.H // heads), options.B * heads
            if pass_ == "decode":
                rows, lanes = max(1, options.H // heads), options.B * heads
            for work in options.work or (TABLE_WORKS if options.tables else ("causal",)):
                for D in attention.WIDTHS if options.tables else (options.D,):
                    D_v = D if options.tables else options.D_v or D
                    yield attention.Ask(device, pass_, options.dtype, D, D_v, work, rows, options.S, lanes)


def title(ask: Any) -> str:
    return f"{ask.arch} {ask.op} {ask.pass_} {ask.dtype} {ask.problem}"


def ranked(ask: Any, console: Any) -> static.Ranking:
    """The ranking of all candidates, with a progress bar while they compile."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    configs = list(dict.fromkeys(ask.fitted(c) for c in ask.candidates()))
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title(ask), total=len(configs))
        return static.rank(ask, configs, lambda done, total: bar.update(task, completed=done, total=total))


def short(config: Any) -> str:
    """128x64 w8 s2 descriptors"""
    given = dataclasses.asdict(config)
    tile = "x".join(str(given[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in given)
    words = [tile, f"w{config.num_warps}", f"s{config.num_stages}"]
    words += [name for name in ("descriptors", "specialize", "halved") if given.get(name)]
    words += ["no hoist"] * (not given.get("hoist", True)) + [f"splits {n}" for n in [given.get("splits", 1)] if n > 1]
    return " ".join(words)


def show(ask: Any, ranking: static.Ranking, most: int, console: Any) -> None:
    from rich.table import Table

    formula = [ask.fitted(c) for c in ask.formula()]
    table = Table(title=title(ask), title_justify="left")
    for name in "config|model us|limit|tensor|reg|KiB|CTAs|".split("|"):
        table.add_column(name, no_wrap=name == "config")
    for i, (config, p) in enumerate(ranking):
        if i < most or config in formula:
            text = short(config)
            cells = [f"{p.seconds * 1e6:.1f}", p.limiter, f"{p.efficiency:.0%}", str(p.registers)]
            cells += [f"{p.shared / 1024:.0f}", str(p.ctas), "formula" if config in formula else ""]
            table.add_row(text, *cells)
    console.print(table)
    left = ", ".join(f"{n} {reason}" for reason, n in ranking.left.items())
    console.print(f"{len(ranking)} ranked; left out: {left or 'none'}; compiled now: {ranking.compiled}", markup=False)


# Against measured times


@dataclasses.dataclass(frozen=True)
class Agreement:
    """spearman: of predicted and measured times, nan for fewer than three; lost: measured time of the model's first
    choice over the best measured, less one; left: timed configs that the model leaves out."""

    ask: Any
    configs: int
    spearman: float
    lost: float
    left: int


def ask_of(given: dict[str, Any]) -> Any:
    """The Ask of a line of results.json. Raises TypeError or KeyError for fields that it does not have."""
    fields = dict(given)
    arch = fields.pop("arch")
    device = Device.typical(arch, fields.pop("units", rates(arch).units))
    if shared := fields.pop("shared", 0):
        device = dataclasses.replace(device, shared=shared)
    return ASKS[fields.pop("op", "attention")].Ask(device, **fields)


def agreements(results: list[dict[str, Any]], rank: Callable[..., Any] = static.rank) -> list[Agreement]:
    """How well the ranking agrees with what was timed, Ask by Ask."""
    timed: dict[Any, dict[Any, float]] = {}
    for line in results:
        ask = ask_of(line["ask"])
        timed.setdefault(ask, {})[ask.answer(**line["config"])] = float(line["seconds"])
    found = []
    for ask, seconds in timed.items():
        ranking = list(rank(ask, list(seconds)))
        measured = np.array([seconds[c] for c, _ in ranking])
        predicted = np.array([p.seconds for _, p in ranking])
        best = min(seconds.values())
        lost = measured[0] / best - 1 if len(ranking) else float("nan")
        found.append(Agreement(ask, len(seconds), spearman(predicted, measured), lost, len(seconds) - len(ranking)))
    return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of ranks, equal values sharing theirs; nan where it says nothing."""
    if len(a) < 3:
        return float("nan")
    ranks = [_ranks(x) - (len(x) - 1) / 2 for x in (a, b)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / size) if size else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2


def validate(file: Path, console: Any) -> int:
    from rich.table import Table

    try:
        found = agreements(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        console.print(f"{file}: {type(error).__name__}: {error}", style="red", markup=False)
        return 2
    table = Table("ask", "configs", "left out", "Spearman", "lost by its first choice")
    for a in found:
        table.add_row(title(a.ask), str(a.configs), str(a.left), f"{a.spearman:.2f}", f"{a.lost:.1%}")
    console.print(table)
    console.print(f"{len(found)} asks: median Spearman {_median(a.spearman for a in found):.2f}, ", end="")
    console.print(f"median loss {_median(a.lost for a in found):.1%}, worst {_worst(found):.1%}")
    return 0


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if v == v]
    return float(np.median(known)) if known else float("nan")


def _worst(found: list[Agreement]) -> float:
    return max((a.lost for a in found if a.lost == a.lost), default=float("nan"))
