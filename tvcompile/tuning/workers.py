"""Calls of functions in processes of their own, each with a time limit: what hangs or crashes is killed, and counted.

    for i, outcome in each(function, arguments, limit=60): ...      as they end; Outcome(value) or Outcome(None, reason)

A worker runs serve.py, which takes the function and then its arguments from a pipe, so that it neither shares memory
with its parent nor runs its main module. It compiles kernels even where the parent interprets them.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from ..options import compiling_environment

IMPORTS = 180.0  # seconds that a new process may take


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The value of a call, or the reason why it has none."""

    value: Any
    failure: str | None = None


class Worker:
    """A process that makes one call of a function at a time."""

    def __init__(self, function: Callable) -> None:
        self.pipe, theirs = Pipe()
        command = [sys.executable, str(Path(__file__).parent / "serve.py"), str(theirs.fileno())]
        environment = compiling_environment() | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdout=subprocess.DEVNULL)
        theirs.close()
        self.pipe.send(function)
        # No call yet: it says when the function is there.
        self.index, self.deadline = -1, time.monotonic() + IMPORTS

    def give(self, index: int, argument: Any, limit: float) -> None:
        self.index, self.deadline = index, time.monotonic() + limit
        self.pipe.send(argument)

    def take(self) -> Outcome:
        """What came; the worker is dead if that is a crash."""
        try:
            good, value = self.pipe.recv()
            return Outcome(value) if good else Outcome(None, value)
        except (EOFError, OSError):
            return Outcome(None, f"crashed with exit code {self.process.wait()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def each(
    function: Callable[[Any], Any], arguments: Sequence[Any], limit: float, count: int = 0
) -> Iterator[tuple[int, Outcome]]:
    """(index of the argument, outcome) of every call, as they end; count: workers, as many as processors by default."""
    todo = list(enumerate(arguments))[::-1]
    count = min(count or os.cpu_count() or 1, len(todo))
    workers: list[Worker] = []
    try:
        while todo or workers:
            while todo and len(workers) < count:
                workers.append(Worker(function))
            ready = wait([w.pipe for w in workers], max(0.0, min(w.deadline for w in workers) - time.monotonic()))
            for w in list(workers):
                if w.pipe in ready:
                    outcome = w.take()
                elif time.monotonic() >= w.deadline:
                    outcome = Outcome(None, f"more than {limit:g} s")
                else:
                    continue
                if w.index >= 0:
                    yield w.index, outcome
                elif outcome.failure:
                    raise RuntimeError(f"a worker process does not start: {outcome.failure}")
                if todo and w.pipe in ready and w.process.poll() is None:
                    w.give(*todo.pop(), limit)
                else:
                    w.stop()
                    workers.remove(w)
    finally:
        for w in workers:
            w.stop()
