"""Child processes that never outlive the command that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from metalearn.training.run_folder import check_is_no_link

METALEARN = (
    sys.executable,
    "-c",
    "import sys; sys.path[:1] == [''] and sys.path.append(sys.path.pop(0))\n"
    "from metalearn.commands.main import main; main()",
)
"""The words that start a command as ``python -m metalearn`` does, but search the working directory last, not first.

A ``random.py`` of the user's there would take the place of the standard library's. (``-P`` needs Python 3.11.)
"""

_POLL_S = 0.5
_GRACE_S = 20.0  # for a child to end after SIGTERM


@dataclass
class ProcessPool:
    """A context manager for child processes; on exit, those still running are terminated, then killed."""

    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    closing: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.closing = True  # a thread that waits for its turn starts no more
            remaining = list(self.running)
        for child in remaining:
            child.terminate()
        try:
            deadline = time.monotonic() + _GRACE_S
            for child in remaining:
                child.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # it ignores SIGTERM, or the user is in a hurry
            for child in remaining:
                child.kill()
                child.wait()

    def run(
        self, command: Sequence[str], console: Path, *, threads: int | None, callback: Callable[[str], None]
    ) -> tuple[int, str]:
        """Run a command, append its output to the file ``console``, and return its exit status and output.

        ``threads`` is its ``OMP_NUM_THREADS`` unless the environment sets it; ``callback`` gets what was written in
        the last half second, if anything.

        Raises:
            ChildProcessError: if the pool is closing.
        """
        console.parent.mkdir(parents=True, exist_ok=True)
        check_is_no_link(console)
        limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        environment = {**limit, **os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
        written = ""
        with console.open("ab") as sink, console.open("r", errors="replace") as source:
            source.seek(0, os.SEEK_END)
            with self.lock:
                if self.closing:
                    raise ChildProcessError("the command is being stopped, and starts no more processes")
                # In a new session, so that Ctrl-C reaches it once, through ``__exit__``: a second signal would end it
                # before it has saved its state.
                child = subprocess.Popen(
                    command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self.running.add(child)
            ended = False
            while not ended:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_S)
                ended = child.returncode is not None
                piece = source.read()
                written += piece
                callback(piece)
            self.running.discard(child)
        return child.returncode, written
