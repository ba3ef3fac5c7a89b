"""A process that compiles and times candidates, so that one which hangs or crashes takes nothing with it.

    with Worker(limit=60) as worker:
        worker.ratio(work, ask, config, "cpu", rounds=15)      raises Unfit: failed, wrong, crashed, or past its limit

Jobs and answers are lines of JSON. The process stays for the next job; after a kill the next job starts another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch

from .trial import Clock, Trial, Unfit
from .work import Work, from_json, to_json

START = "import sys; sys.path[:] = {path!r}; from tvcompile.tuning.worker import serve; serve()"
STARTING = 180.0  # seconds that a process may take until it takes jobs


class Worker:
    """limit: seconds that a job may take."""

    def __init__(self, limit: float = 60.0):
        self.limit = limit
        self.process: subprocess.Popen | None = None
        self.rest = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ratio(self, work: Work, pass_: str, config: Any, device: str, rounds: int) -> float:
        """How many times as fast as the formula's a config is. Raises Unfit."""
        how = {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
        job = {"work": to_json(work), "pass_": pass_, "config": dataclasses.asdict(config)}
        return float(self.do({**job, **how, "device": device, "rounds": rounds}))

    def do(self, job: dict[str, Any]) -> Any:
        """The answer to a job. Raises Unfit."""
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            answer = self._answer(self.limit)
        except (BrokenPipeError, EOFError):
            code = self.process.wait()
            self.kill()
            raise Unfit(f"crashed: exit status {code}") from None
        except TimeoutError:
            self.kill()
            raise Unfit(f"not done after {self.limit:g} s") from None
        except BaseException:
            self.kill()  # its answer would be taken for that of the next job
            raise
        if "error" in answer:
            raise Unfit(answer["error"])
        return answer["value"]

    def _start(self) -> None:
        command = [sys.executable, "-c", START.format(path=sys.path)]
        # In a session of its own: Ctrl-C is for the search, and a kill reaches what it started.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self.rest = b""
        try:
            self._answer(STARTING)
        except BaseException as error:
            self.kill()
            if isinstance(error, (EOFError, TimeoutError)):
                raise RuntimeError("the process that times candidates did not start") from None
            raise

    def _answer(self, limit: float) -> dict[str, Any]:
        """The next line. Raises EOFError where the process ended, TimeoutError."""
        assert self.process is not None and self.process.stdout is not None
        end = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                more = os.read(self.process.stdout.fileno(), 1 << 16)
                if not more:
                    raise EOFError
                self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and all that it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait()
        self.process = None


# In the process


def serve() -> None:
    """Takes jobs from stdin and answers them on what was stdout; what kernels print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    desk = Desk()
    print(json.dumps({"value": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = {"value": desk.do(json.loads(line))}
        except Unfit as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


def _end_with(parent: int) -> None:
    """A job that hangs does not outlive the program that asked for it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class Desk:
    """Does jobs; the tensors of the last problem are kept for the next one."""

    def __init__(self) -> None:
        self.key = ""
        self.trial: Trial | None = None

    def do(self, job: dict[str, Any]) -> Any:
        if "sleep" in job:  # what tests ask for
            time.sleep(job["sleep"])
        if "exit" in job:
            os._exit(job["exit"])
        if "work" not in job:
            return job
        key = json.dumps([job["work"], job["pass_"], job["device"]])
        if key != self.key or self.trial is None:
            self.trial, self.key = None, ""
            self.trial, self.key = _trial(job), key
        return self.trial.ratio(self.trial.ask.answer(**job["config"]), job["rounds"])


def _trial(job: dict[str, Any]) -> Trial:
    from .. import kernels  # noqa: F401  registers the ops

    torch.set_num_threads(job["threads"])
    torch.set_float32_matmul_precision(job["precision"])
    device = torch.device(job["device"])
    return Trial(from_json(job["work"]), job["pass_"], device, clock_of(device))


def clock_of(device: torch.device) -> Clock:
    """Seconds; on a GPU those until all that was asked of it is done."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
