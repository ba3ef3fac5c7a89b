"""Calls of functions in processes of their own, each with a time limit: what hangs or crashes is killed, and counted.

    for i, outcome in each(function, arguments, limit=60): ...      as they end; Outcome(value) or Outcome(None, reason)
    with Worker(function) as worker: worker.call(argument, 60)      one after the other, in one process while it lives

A worker runs serve.py, which takes the function and then its arguments from a pipe, so that it neither shares memory
with its parent nor runs its main module. It compiles kernels even where the parent interprets them, and is in a session
of its own: Ctrl-C is for the parent, and a kill reaches all that the call started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
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
    """A process that makes one call of a function at a time. It starts with the first, and anew after a kill."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.process: subprocess.Popen | None = None
        self.pipe: Connection

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        command = [sys.executable, str(Path(__file__).parent / "serve.py"), str(theirs.fileno())]
        environment = compiling_environment() | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.pipe.send(self.function)
        # No call yet: it says when the function is there.
        self.index, self.deadline = -1, time.monotonic() + IMPORTS

    def give(self, index: int, argument: Any, limit: float) -> None:
        self.index, self.limit, self.deadline = index, limit, time.monotonic() + limit
        self.pipe.send(argument)

    def take(self) -> Outcome | None:
        """What came; None before the deadline. After a crash and past the deadline the process is no more."""
        if self.pipe.poll():
            try:
                good, value = self.pipe.recv()
                return Outcome(value) if good else Outcome(None, value)
            except (EOFError, OSError):
                code = self.process.wait() if self.process else 0
                self.stop()
                failure = f"crashed with exit code {code}"
        elif time.monotonic() >= self.deadline:
            self.stop()
            failure = f"more than {self.limit if self.index >= 0 else IMPORTS:g} s"
        else:
            return None
        if self.index < 0:
            raise RuntimeError(f"a worker process does not start: {failure}")
        return Outcome(None, failure)

    def call(self, argument: Any, limit: float) -> Outcome:
        try:
            if self.process is None:
                self.start()
                self._wait()
            self.give(0, argument, limit)
            return self._wait()
        except BaseException:
            self.stop()  # its answer would be taken for that of the next call
            raise

    def _wait(self) -> Outcome:
        while (outcome := self.take()) is None:
            self.pipe.poll(max(0.0, self.deadline - time.monotonic()))
        return outcome

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.pipe.close()
            self.process = None


def each(
    function: Callable[[Any], Any], arguments: Sequence[Any], limit: float, count: int = 0
) -> Iterator[tuple[int, Outcome]]:
    """(index of the argument, outcome) of every call, as they end; count: workers, as many as processors by default."""
    todo = list(enumerate(arguments))[::-1]
    workers = [Worker(function) for _ in range(min(count or os.cpu_count() or 1, len(todo)))]
    try:
        for w in workers:
            w.start()
        while busy := [w for w in workers if w.process is not None]:
            wait([w.pipe for w in busy], max(0.0, min(w.deadline for w in busy) - time.monotonic()))
            for w in busy:
                outcome = w.take()
                if outcome is None:
                    continue
                if w.index >= 0:
                    yield w.index, outcome
                if not todo:
                    w.stop()
                elif w.process is None:
                    w.start()
                else:
                    w.give(*todo.pop(), limit)
    finally:
        for w in workers:
            w.stop()
