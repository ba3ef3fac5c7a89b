"""What benchmarks.attention measured: the table it prints, and a plot; the bars of benchmarks.moe too.

python -m benchmarks.plot attention.json ...      draws attention.png beside it
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

COLORS = {
    "tv": "#d62728",
    "eager": "#bbbbbb",
    "inductor": "#7f7f7f",
    "flash": "#1f77b4",
    "cudnn": "#2ca02c",
    "efficient": "#17becf",
    "math": "#8c564b",
    "flex": "#9467bd",
    "by hand": "#ff7f0e",
    "grouped_mm": "#1f77b4",
    "batched_mm": "#17becf",
    "tv op": "#ff9896",
    "dense": "#2ca02c",
}
NAMES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}
FUSED = ("by hand", "flash", "cudnn", "efficient", "math", "flex")


def show(found: dict[str, Any]) -> None:
    """The table and its notes, never narrower than the figures."""
    console = Console(width=max(Console().width, 140))
    console.print(table(found), *notes(found), sep="\n", highlight=False, markup=False)


def table(found: dict[str, Any]) -> Table:
    """A line for each measurement: ms, on a GPU with TFLOP/s or GB/s under it; the gains of tv over Inductor and over
    the fastest fused call."""
    rows, on_gpu = [r for r in found["rows"] if "skipped" not in r], "gpu" in found
    named = [n for n in found["ways"] if n not in FUSED]
    fused = [n for n in found["ways"] if n in FUSED]
    columns = ["case", *(["B", "H", "S", "D"] if on_gpu else []), "dtype", "pass"]
    columns += [{"inductor": "Inductor"}.get(n, n) for n in named] + ["gain"] + fused + (["gain"] if fused else [])
    title = f"{found['gpu']}: ms, TFLOP/s (decode: GB/s)" if on_gpu else f"ms at {','.join(map(str, found['shape']))}"
    result = Table(*columns, title=title, **({"box": box.SIMPLE, "pad_edge": False} if on_gpu else {}))
    for row in rows:
        head = [row["case"], *(size(row) if on_gpu else []), row["dtype"], row["pass"]]
        if "ms" not in row:
            result.add_row(*head, "wrong")
            continue
        ms = row["ms"]
        best = min((ms[n] for n in fused if n in ms), default=None)
        cells = [cell(row, n, on_gpu) for n in named] + [gain(ms.get("inductor"), ms.get("tv"))]
        cells += [cell(row, n, on_gpu) for n in fused] + ([gain(best, ms.get("tv"))] if fused else [])
        result.add_row(*head, *cells)
    return result


def size(row: dict) -> list[str]:
    heads = str(row["H"]) if row["H"] == row["H_kv"] else f"{row['H']}/{row['H_kv']}"
    return [str(row["B"]), heads, short(row["S_kv"]), str(row["D"])]


def short(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def cell(row: dict, name: str, on_gpu: bool) -> str:
    ms = row["ms"].get(name)
    if ms is None:
        return "oom" if row["why"].get(name) == "out of memory" else "-" if on_gpu else ""
    if not on_gpu:
        return f"{ms:.1f}"
    figure = f"{ms:.0f}" if ms >= 1000 else f"{ms:.3g}"
    return f"{figure}\n{row.get('gbs', row['tflops'])[name]:.0f}"


def gain(other: float | None, ours: float | None) -> str:
    return f"{other / ours:.2f}" if other and ours else ""


def notes(found: dict[str, Any]) -> Iterator[str]:
    """Why there is no figure, each reason once, and what there was no time for."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        for name, why in row.get("why", {}).items():
            if why != "not written":
                cases.setdefault((name, why), []).append(label(row, " "))
    for (name, why), where in cases.items():
        yield f"{name}: {why} ({len(where)}x: {', '.join(where[:3])}{', ...' if len(where) > 3 else ''})"
    skipped: dict[str, list[str]] = {}
    for row in found["rows"]:
        if "skipped" in row:
            skipped.setdefault(row["skipped"], []).append(label(row, " "))
    for why, where in skipped.items():
        yield f"not measured, {why}: {', '.join(where)}"


def label(row: dict, separator: str = "\n") -> str:
    heads = "" if row["H"] == row["H_kv"] else f" {row['H']}/{row['H_kv']}"
    return f"{row['case']}{heads}{separator}S={short(row['S_kv'])} D={row['D']} {row['dtype']} {row['pass']}"


def draw(found: dict[str, Any], file: Path) -> None:
    """Bars of TFLOP/s, and of GB/s for decoding: a panel for each pass, a group of bars for each case and size."""
    order = [*NAMES, "decode", *dict.fromkeys(r["case"] for r in found["rows"])]
    at = lambda r: (order.index(panel(r)), r["D"], order.index(r["case"]), r["H"] // r["H_kv"], r["S_kv"])
    panels = []
    for name, group in itertools.groupby(sorted((r for r in found["rows"] if r.get("ms")), key=at), panel):
        key, unit = ("gbs", "GB/s of K and V") if name == "decode" else ("tflops", "TFLOP/s of kept pairs")
        groups = [(label({**r, "pass": ""}).strip(), r[key]) for r in group]
        panels.append((NAMES.get(name, name), unit, groups))
    bars(panels, found["ways"], about(found), file)


def about(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {found[k]}" for k in ("driver", "cuda", "torch", "triton") if found.get(k))
    return f"{found.get('gpu') or found['machine']}; {versions}"


def bars(panels: list[tuple[str, str, list]], ways: list[str], below: str, file: Path) -> None:
    """A panel for each (title, unit, [(label, {way: figure}), ...])."""
    try:
        import matplotlib
    except ImportError:
        print(f"{file} is not drawn: it needs matplotlib (pip install tvcompile[bench])")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not panels:
        return
    ways = [n for n in ways if any(n in figures for *_, groups in panels for _, figures in groups)]
    widest = max(len(groups) for *_, groups in panels)
    figure, axes = pyplot.subplots(len(panels), squeeze=False, figsize=(max(8, 1.3 * widest), 3.4 * len(panels)))
    for axis, (title, unit, groups) in zip(axes[:, 0], panels):
        for i, way in enumerate(ways):
            places = [x + (i + 0.5) / (len(ways) + 1) - 0.5 for x in range(len(groups))]
            heights = [figures.get(way, 0) for _, figures in groups]
            axis.bar(places, heights, 1 / (len(ways) + 1), color=COLORS[way], label=way)
        axis.set_xticks(range(len(groups)), [text for text, _ in groups], fontsize=7)
        axis.set(title=title, ylabel=unit)
        axis.set_xlim(-0.6, max(len(groups), widest / 2) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=len(ways), loc="upper center", fontsize=8, frameon=False)
    figure.supxlabel(below, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def panel(row: dict) -> str:
    return "decode" if row["case"] == "decode" else row["pass"]


def main() -> None:
    for name in sys.argv[1:]:
        draw(json.loads(Path(name).read_text()), Path(name).with_suffix(".png"))


if __name__ == "__main__":
    main()
