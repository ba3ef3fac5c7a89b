"""Searches for configs that are faster than the formula's, on the machine at hand.

    quick   the first FEW of what the static model ranks are timed; on a CPU all that an Ask names
    full    from the best of these on: one field at a time goes to its neighbours until nothing improves

Each candidate runs in a process of its own (workers.py), is checked there before it may win (trial.py), and is timed in
turns with the formula's config. One that fails is skipped and counted with its reason. The best is timed once more; it
wins if it is GAIN times as fast then. Else the formula's config stays, and that is kept too, so that it is not searched
again. What was timed is written down as it comes, so that a search that was broken off goes on where it was.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import options
from ..arch import Device
from . import static, store
from .ask import Ask
from .lookup import choose
from .trial import Clock, Job, Unfit, ratio_of
from .work import Work
from .workers import Worker

EFFORTS = ("none", "quick", "full")
FEW = 8  # candidates that `quick` times on a GPU
GAIN = 1.03  # times as fast as the formula's config: less is noise
BETTER = 1.01  # times as fast as the best so far, for a step of `full`
ROUNDS, AGAIN = 9, 21  # of timing a candidate, and of timing the best once more
LIMIT = {"cpu": 60.0, "cuda": 120.0}  # seconds that a candidate may take
BUDGET = {"quick": 20.0, "full": 600.0}  # seconds for an Ask, after which no more candidates are tried
WAIT = 600.0  # seconds that a process waits for another one's search
Ratio = Callable[[Any, int], float]  # (config, rounds) -> times as fast as the formula's; raises Unfit


@dataclasses.dataclass
class Found:
    """What a search found: the config, how many times as fast as the formula's it is, what was skipped and why.

    complete: False where Ctrl-C or the budget ended it
    """

    config: Any
    ratio: float
    tried: int
    skipped: collections.Counter[str]
    complete: bool = True

    @property
    def text(self) -> str:
        about = f"{self.tried} timed" + "".join(f", {n} skipped: {why}" for why, n in self.skipped.most_common(3))
        gain = f"{self.ratio:.2f} times as fast as the formula's" if self.ratio > 1.0 else "nothing is faster"
        return f"{gain} ({about})" + ("" if self.complete else ", not finished")


# What is tried


def shortlist(ask: Ask, effort: str) -> list[Any]:
    """What is timed first, without the formula's config."""
    standard = ask.formula()[0]
    if ask.arch == "cpu":
        found = ask.candidates()
    else:
        found = [config for config, _ in static.rank(ask, ask.candidates())][:FEW]
        found = [choice.config for choice in choose(ask)] + found
    return [config for config in dict.fromkeys(found) if config != standard]


def neighbours(config: Any, ask: Ask, known: Sequence[Any]) -> list[Any]:
    """Configs that differ in one field: a number goes one step down or up, of those that `known` shows and of its half
    and double; anything else to every value that `known` shows."""
    found = []
    for field in dataclasses.fields(config):
        here, seen = getattr(config, field.name), {getattr(c, field.name) for c in known}
        if type(here) is int:
            steps = sorted(seen | {here, here // 2, here * 2})
            at = steps.index(here)
            seen = {*steps[max(0, at - 1) : at], *steps[at + 1 : at + 2]}
        for value in sorted(seen - {here}):
            with contextlib.suppress(ValueError):  # it is no config
                other = dataclasses.replace(config, **{field.name: value})
                found += [other] * ask.fits(other)
    return found


# The search


class Journal:
    """What was timed of one Ask, line by line in a file; no file: in memory alone."""

    def __init__(self, file: Path | None):
        self.file = file
        self.lines: dict[str, float | str] = {}
        for line in file.read_text().splitlines() if file is not None and file.exists() else ():
            with contextlib.suppress(ValueError, TypeError):  # a line that was cut off
                name, value = json.loads(line)
                self.lines[name] = value

    @staticmethod
    def of(ask: Ask) -> Journal:
        key = hashlib.sha256(ask.key.encode()).hexdigest()[:16]
        return Journal(options.cache_folder() / "search" / f"{store.family(ask)}-{key}.jsonl")

    @property
    def begun(self) -> bool:
        return bool(self.lines)

    def timed(self, config: Any, run: Callable[[], float]) -> float:
        """The ratio of a config, from the file or from now on there. Raises Unfit, as it did the first time."""
        name = str(config)
        if name not in self.lines:
            try:
                self.lines[name] = run()
            except Unfit as why:
                self.lines[name] = str(why)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as file:
                    file.write(json.dumps([name, self.lines[name]]) + "\n")
        value = self.lines[name]
        if isinstance(value, str):
            raise Unfit(value)
        return value

    def close(self) -> None:
        """The search is over."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


class _Over(Exception):
    """The budget is used up."""


def search(
    ask: Ask, effort: str, ratio: Ratio, clock: Clock, journal: Journal | None = None,
    step: Callable[[Found, int], None] = lambda found, of: None, budget: float | None = None, seed: int = 0,
) -> Found:  # fmt: skip
    """The best config of an Ask; step(found so far, how many there are) is told of every candidate."""
    journal, standard = journal or Journal(None), ask.formula()[0]
    found, known = Found(standard, 1.0, 0, collections.Counter()), shortlist(ask, effort)
    end, order = math.inf, random.Random(seed)
    tried: dict[Any, float] = {standard: 1.0}

    def better(config: Any) -> bool:
        """Whether a config is the best now. The first one also makes the tensors and the reference: it is free."""
        nonlocal end
        if clock() >= end:
            raise _Over
        tried[config] = 0.0
        try:
            tried[config] = journal.timed(config, lambda: ratio(config, ROUNDS))
            found.tried += 1
        except Unfit as why:
            found.skipped[str(why)] += 1
        end = min(end, clock() + (BUDGET[effort] if budget is None else budget))
        won = tried[config] > found.ratio * (1.0 if found.config == standard else BETTER)
        if won:
            found.config, found.ratio = config, tried[config]
        step(found, len(known))
        return won

    def around() -> list[Any]:
        near = [c for c in neighbours(found.config, ask, [standard, *known]) if c not in tried]
        order.shuffle(near)
        return near

    try:
        with contextlib.suppress(_Over):
            for config in known:
                better(config)
            while effort == "full" and any(map(better, around())):
                pass
        found.config, found.ratio = _confirmed(tried, standard, ratio)
    except KeyboardInterrupt:
        found.complete = False
        if found.ratio < GAIN:
            found.config, found.ratio = standard, 1.0
    return found


def _confirmed(tried: dict[Any, float], standard: Any, ratio: Ratio) -> tuple[Any, float]:
    """The first of the two best that is GAIN times as fast as the formula's config when it is timed once more."""
    for config in sorted(tried, key=lambda c: -tried[c])[:2]:
        if config != standard and tried[config] >= GAIN:
            with contextlib.suppress(Unfit):
                if (value := ratio(config, AGAIN)) >= GAIN:
                    return config, value
    return standard, 1.0


# Sites


@dataclasses.dataclass
class Site:
    """One Ask of a program's sites, and what its search found."""

    work: Work
    ask: Ask
    found: Found


def pending(works: Sequence[Work], device: Device) -> list[tuple[Work, Ask]]:
    """What has no measured config yet, or one of a search that was broken off; every key once."""
    asked = {ask.key: (work, ask) for work in works for ask in work.asks(device) if ask.formula()}
    return [(work, ask) for work, ask in asked.values() if store.find(ask) is None or Journal.of(ask).begun]


def tune(works: Sequence[Work], device: torch.device, effort: str, console: Console | None = None) -> list[Site]:
    """Searches for what has no measured config yet, and keeps what it finds. Ctrl-C ends it; what was found stays."""
    sites: list[Site] = []
    here = Device.of(device)
    if not pending(works, here):
        return []
    with store.turn("tune", wait=WAIT) as mine:
        # What another process found meanwhile is known now.
        left = pending(works, here) if mine else []
        with Worker(ratio_of) as worker:
            with _progress(console or Console(stderr=True)) as progress:
                if left and (warning := busy(device)):
                    progress.print(warning, style="yellow", highlight=False)
                for work, ask in left:
                    sites.append(Site(work, ask, _one(work, ask, device, effort, worker, progress)))
                    if not sites[-1].found.complete:
                        break
    return sites


def busy(device: torch.device) -> str:
    """A warning where other programs leave less than half of a CPU to the times that are to be taken, or ""."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"the machine is busy (load {load:.1f} on {cores} cores): what is timed now may be wrong later" * (
        load > cores / 2
    )


def _one(work: Work, ask: Ask, device: torch.device, effort: str, worker: Worker, progress: Progress) -> Found:
    bar = progress.add_task(escape(ask.key), total=None, best="1.00x")

    def step(found: Found, of: int) -> None:
        done = found.tried + found.skipped.total()
        progress.update(bar, completed=done, total=max(of, done), best=f"{found.ratio:.2f}x")

    job = Job(work, ask.pass_, str(device), torch.get_num_threads(), torch.get_float32_matmul_precision())

    def ratio(config: Any, rounds: int) -> float:
        outcome = worker.call((job, config, rounds), LIMIT[device.type])
        if outcome.failure or isinstance(outcome.value, str):
            raise Unfit(outcome.failure or outcome.value)
        return outcome.value

    journal = Journal.of(ask)
    found = search(ask, effort, ratio, time.monotonic, journal, step)
    progress.update(bar, visible=False)
    progress.print(f"{ask.key}: {found.text}", highlight=False, markup=False)
    gain = f"{found.ratio:.2f} times as fast as" if found.ratio > 1.0 else "nothing is faster than"
    source = f"measured on {name_of(device)}, {time.strftime('%Y-%m-%d')}: {gain} the formula's"
    store.keep(ask, store.Entry(dataclasses.asdict(found.config), source, found.ratio))
    if found.complete:
        journal.close()
    return found


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("best {task.fields[best]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


@functools.lru_cache(maxsize=8)
def name_of(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
