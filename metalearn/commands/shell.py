"""The words that start a command, and a clean exit when its output is closed (``| head``)."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from metalearn.core.quoting import quote_word

_SIGPIPE_EXIT = 128 + 13
"""The status that a shell reports for a program that SIGPIPE has ended; Python ignores that signal."""


def invocation(command: str) -> list[str]:
    """Return the words that start the command again, without its arguments."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [_program("python"), "-m", "metalearn", command]
    return [_program("metalearn"), command] if program.stem == "metalearn" else [_program("python"), sys.argv[0]]


def tensorboard(folder: Path) -> str:
    """Return the command line that shows the plots in a folder."""
    near = _near(folder)
    program = quote_word(_program("tensorboard"))
    return f"{program} --logdir {quote_word(folder if str(near).startswith(('-', '~')) else near)}"


def _program(name: str) -> str:
    """Return the name of a program of this environment, or its path where a shell would find another one or none."""
    if not sys.executable:  # where Python is embedded in another program
        return name
    ours = Path(sys.executable).with_name(name)
    if name == "python" and not ours.exists():
        ours = Path(sys.executable)  # python3 alone
    found = shutil.which(ours.name)
    if not ours.exists() or (found and Path(found).parent.resolve() == ours.parent.resolve()):
        return ours.name
    if found and name != "python" and ours.samefile(found):  # as pipx links scripts; all pythons may link to one
        return name
    near = str(_near(ours))
    return near if "/" in near and "=" not in near else str(ours)  # else a shell takes it for another thing


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def discard(stream: TextIO) -> None:
    """Drop what is written to a stream that is closed at its other end.

    What is buffered still has to go somewhere: https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def exit_when_stdout_closes() -> Iterator[None]:
    """Exit without a traceback in the block if nobody reads the output any more, as in ``metalearn --help | head``."""
    stream = sys.stdout
    if stream is None:  # the shell has closed it: >&-
        yield
        return
    if isinstance(stream, io.TextIOWrapper) and not (stream.encoding == "utf-8" and stream.errors == "surrogateescape"):
        stream.reconfigure(errors="replace")  # as ± in an ASCII locale
    sys.stdout = _Stdout(stream)
    try:
        yield
        sys.stdout.flush()  # here, where it can be handled, and not by the interpreter on its way out
    finally:
        sys.stdout = stream


class _Stdout:
    """A text stream that ends the process once its pipe is broken.

    ``SystemExit`` passes through ``logging`` and ``rich``, which handle a ``BrokenPipeError`` in ways of their own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._exit(error)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._exit(error)

    def _exit(self, error: OSError) -> NoReturn:
        if error.errno not in (errno.EPIPE, errno.EIO):  # EIO is a terminal's that is gone
            raise error
        discard(self._stream)
        sys.exit(_SIGPIPE_EXIT)
