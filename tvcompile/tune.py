"""python -m tvcompile.tune: searches for configs ahead of time, and what is kept of earlier searches.

    python -m tvcompile.tune --model package.module:function --effort quick
    python -m tvcompile.tune --attention 1,8,2,2048,128 --dtype bfloat16 --spec "keep = kv <= q"
    python -m tvcompile.tune --experts 512,2,8,1024,2816 --spec "act = g*sigmoid(g)*u; layout=chunk"
    python -m tvcompile.tune --list | --clear | --export FILE | --import FILE

The function returns (model, inputs) or (model, inputs, keyword arguments). The model is compiled and run once to
collect its sites; where an input or a parameter wants a gradient, backward passes are tuned too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import report
from .arch import SHARED, Device, family
from .moe_spec import MoESpec
from .options import CHOICES
from .sites import unknown
from .spec import AttentionSpec
from .tuning import search, static_report, store
from .tuning.rates import rates
from .tuning.work import Attention, Capture, Experts, Work

Problem = tuple[Work, torch.device]
ATTENTION = "B", "H", "H_kv", "S_q", "S_kv", "D", "D_v"
EXPERTS = "T", "K", "E", "H", "F", "H_out"


class Usage(Exception):
    """What is wrong with the command line, and what to write instead."""


def parser() -> argparse.ArgumentParser:
    assert __doc__
    form = argparse.RawDescriptionHelpFormatter
    title = "python -m tvcompile.tune"
    p = argparse.ArgumentParser(title, description=__doc__, formatter_class=form, conflict_handler="resolve")
    what = p.add_argument_group("what is tuned")
    what.add_argument("--model", metavar="MODULE:FUNCTION", help="a function that returns (model, inputs[, kwargs])")
    what.add_argument("--attention", metavar="SIZES", help="B,H,H_kv,S,D or B,H,H_kv,S_q,S_kv,D[,D_v]")
    what.add_argument(
        "--experts", metavar="SIZES", help="T,K,E,H,F[,H_out]: tokens, experts per token, experts, features"
    )
    what.add_argument("--spec", default="", help="as a report prints it; attention without a scale gets 1/sqrt(D)")
    what.add_argument(
        "--capture", action="append", default=[], metavar="DTYPE:SIZES", help="e.g. bool:1,2048; repeat it"
    )
    what.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    what.add_argument("--forward-only", action="store_true", help="no backward passes for sizes given by hand")
    p.add_argument("--effort", default="quick", choices=CHOICES["tune"][1:])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kept = p.add_argument_group("what was measured before")
    kept.add_argument("--list", action="store_true", help="print it")
    kept.add_argument("--clear", action="store_true", help="forget it")
    kept.add_argument("--export", metavar="FILE", help="write it to a file")
    kept.add_argument("--import", dest="import_", metavar="FILE", help="add what --export wrote")
    static_report.add_arguments(p)
    return p


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Exit status: 0, 1 where nothing could be done, 2 for a wrong command line, 130 after Ctrl-C."""
    console = console or Console()
    p = parser()
    options = p.parse_args(arguments)
    try:
        for name, act in KEPT.items():
            if value := getattr(options, name):
                return act(value, console)
        if any(getattr(options, name, None) for name in ("static", "validate", "tables")):
            if options.static and options.model:
                return rank(options, console)
            return static_report.run(options, console)
        return tune(problems(options), options.effort, console)
    except Usage as error:
        console.print(f"tvcompile.tune: {error}", style="red", highlight=False, markup=False)
        console.print(f"{p.prog} --help lists the options", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        return 130


def rank(options: argparse.Namespace, console: Console) -> int:
    """The static model's ranking for every pass of a model's sites, on boards of the architectures that are named."""
    works = [work for work, _ in collected(options.model)]
    for arch in options.arch or ():
        if family(arch) is None:
            raise Usage(f"--arch {arch}: known are {', '.join(SHARED)}")
        device = Device.typical(arch, options.units or rates(arch).units)
        for ask in {ask.key: ask for work in works for ask in work.asks(device)}.values():
            console.print(static_report.title(ask), markup=False, highlight=False)
            static_report.show(ask, static_report.ranked(ask, console), options.show, console)
    if not options.arch:
        raise Usage(f"--static needs --arch, one or more of {', '.join(SHARED)}")
    return 0


# What is kept


def show(_: Any, console: Console) -> int:
    store.load()
    table = Table("what for", "config", "", "times the formula's", show_lines=True)
    for (file, key), entry in sorted(store.entries().items()):
        fields = ", ".join(f"{name}={value!r}" for name, value in entry.config.items())
        table.add_row(escape(f"{key}\n({file})"), escape(fields), escape(entry.source), f"{entry.ratio:.2f}")
    console.print(table if table.row_count else "nothing was measured yet")
    return 0


def clear(_: Any, console: Console) -> int:
    console.print(f"{store.clear()} configs forgotten")
    return 0


def export(file: str, console: Console) -> int:
    store.load()
    console.print(f"{store.export(file)} configs written to {file}", markup=False)
    return 0


def import_(file: str, console: Console) -> int:
    try:
        console.print(f"{store.import_(file)} configs read from {file}", markup=False)
    except (OSError, ValueError) as error:
        raise Usage(f"--import {file}: {error}") from None
    return 0


KEPT: dict[str, Callable[[Any, Console], int]] = {
    "list": show, "clear": clear, "export": export, "import_": import_,
}  # fmt: skip


# What is tuned


def problems(options: argparse.Namespace) -> list[Problem]:
    """What the command line names. Raises Usage."""
    if options.model:
        return collected(options.model)
    if options.attention:
        return [(attention(options), torch.device(options.device))]
    if options.experts:
        return [(experts(options), torch.device(options.device))]
    raise Usage("say what to tune (--model, --attention, --experts), or --list, --clear, --export, --import")


def collected(name: str) -> list[Problem]:
    """The problems of a model's sites."""
    model, args, kwargs = _called(name)
    torch._dynamo.reset()
    with report.collect() as found:
        torch.compile(model, backend="tv", options={"tv.codegen": "none", "tv.tune": "none"})(*args, **kwargs)
    if not found.works:
        refused = "".join(f"\n  {r}" for r in found.refusals)
        raise Usage(f"--model {name}: no attention and no experts were fused" + refused)
    torch._dynamo.reset()
    return found.works


def _called(name: str) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    module, colon, function = name.partition(":")
    if not colon:
        raise Usage(f"--model {name}: write module:function, e.g. package.models:small")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the user, as python -m finds them
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise Usage(f"--model {name}: {error}") from None
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3) or not callable(made[0]):
        raise Usage(f"--model {name}: it has to return (model, inputs) or (model, inputs, kwargs), not {type(made)}")
    model, inputs, *rest = made
    return model, inputs if isinstance(inputs, (tuple, list)) else (inputs,), dict(rest[0]) if rest else {}


def attention(options: argparse.Namespace) -> Attention:
    """--attention as a problem."""
    sizes: Any = _numbers("--attention", options.attention)
    if len(sizes) == 5:
        sizes.insert(4, sizes[3])
    if len(sizes) == 6:
        sizes.append(sizes[5])
    if len(sizes) != 7 or sizes[1] % sizes[2]:
        raise Usage("--attention takes B,H,H_kv,S,D or B,H,H_kv,S_q,S_kv,D[,D_v], and H is a multiple of H_kv")
    text = options.spec
    if "scale" not in text:
        text = "; ".join(filter(None, (f"scale={sizes[5] ** -0.5:.12g}", text)))
    spec = _parsed(AttentionSpec.parse, text)
    captures = tuple(map(_capture, options.capture))
    if len(captures) != len(spec.captures()):
        names = ", ".join(spec.captures()) or "nothing"
        raise Usage(f"`{spec}` captures {names}: give --capture DTYPE:SIZES for each, in this order")
    if spec.sizes():
        raise Usage(f"`{spec}` names sizes ({', '.join(spec.sizes())}): use --model")
    how: Any = {"captures": captures, "backward": not options.forward_only}
    return Attention(spec, options.dtype, **dict(zip(ATTENTION, sizes)), **how)


def experts(options: argparse.Namespace) -> Experts:
    """--experts as a problem."""
    sizes: Any = _numbers("--experts", options.experts)
    if len(sizes) == 5:
        sizes.append(sizes[3])
    if len(sizes) != 6 or sizes[1] > sizes[2]:
        raise Usage("--experts takes T,K,E,H,F[,H_out], and K is at most E")
    spec = _parsed(MoESpec.parse, options.spec or "act = g*sigmoid(g)*u; layout=chunk")
    how: Any = {"backward": not options.forward_only}
    return Experts(spec, options.dtype, **dict(zip(EXPERTS, sizes)), **how)


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.strip().isdigit() and int(p) for p in parts):
        raise Usage(f"{option} {text}: sizes are positive numbers between commas")
    return [int(p) for p in parts]


def _capture(text: str) -> Capture:
    dtype, colon, sizes = text.partition(":")
    if not isinstance(getattr(torch, dtype, None), torch.dtype) or not colon:
        raise Usage(f"--capture {text}: write DTYPE:SIZES, e.g. bool:1,2048 or float32:8")
    return Capture(dtype, tuple(_numbers("--capture", sizes)) if sizes else ())


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise Usage(f"--spec: {error}") from None


def tune(todo: list[Problem], effort: str, console: Console) -> int:
    """Searches, and prints what was found."""
    store.load()
    able = [(work, device) for work, device in todo if not unknown(work)]
    sites: list[search.Site] = []
    if not any(work.asks(Device.of(device)) for work, device in able):
        console.print("nothing to search: none of these takes a config (on the CPU, experts without a backward pass)")
        return 0
    for device in dict.fromkeys(device for _, device in able):
        works = [work for work, of in able if of == device]
        passes = len(search.pending(works, Device.of(device)))
        console.print(f"{len(works)} sites, {passes} passes to search on {device}")
        sites += search.tune(works, device, effort, console)
    table = Table("pass", "what for", "config", "", show_lines=True)
    for site in sites:
        table.add_row(site.ask.pass_, *map(escape, (str(site.work.spec), str(site.found.config), site.found.text)))
    console.print(table if sites else "every pass has a measured config; --clear forgets them")
    return 0 if all(site.found.complete for site in sites) else 130


if __name__ == "__main__":
    sys.exit(main())
