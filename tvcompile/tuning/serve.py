"""What a worker process runs: one function, called with what comes through a pipe. It imports nothing of this package.

python serve.py FD        function -> (True, None), then argument -> (True, value) or (False, reason), again and again
"""

import os
import sys
import threading
import time
from multiprocessing.connection import Connection


def serve(pipe: Connection) -> None:
    """Makes calls until the other end is gone; its first word is that the function and its imports are there."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    function = pipe.recv()
    pipe.send((True, None))
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(argument)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
        pipe.send(answer)


def _end_with(parent: int) -> None:
    """A call that hangs does not outlive the program that asked for it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    # The folder of this file is no place to import from.
    sys.path.pop(0)
    serve(Connection(int(sys.argv[1])))
