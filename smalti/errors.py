"""Errors that a user can cause, and how a command turns them into one line and an exit code.

Exit codes: 0 done; 1 a bug of ours (traceback); 2 user error; 3 training diverged; 75 stopped by a signal with a
checkpoint written (run the same command again).
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_STOPPED = 2, 3, 75
EXIT_BROKEN_PIPE = 141  # as shells report a process that SIGPIPE ended


class UserError(Exception):
    """Something the user can put right. The message is one line: the key, its value, why, and the way out."""

    exit_code = EXIT_USER_ERROR


class Diverged(UserError):
    """Training met too many non-finite steps in a row; the last good checkpoint is kept."""

    exit_code = EXIT_DIVERGED


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written; the same command goes on from there."""

    exit_code = EXIT_STOPPED


def did_you_mean(word: str, possible: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a close misspelling of one of `possible`, else an empty string."""
    close = difflib.get_close_matches(word, list(possible), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run `command` and leave the process with its exit code; user errors become one line on stderr."""
    try:
        command()
        sys.stdout.flush()  # here, and not at the interpreter's end, where a broken pipe could not be caught
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped as stop:
        print(" ".join(str(stop).split()), file=sys.stderr)
        sys.exit(stop.exit_code)
    except BrokenPipeError:  # the reader of our output went away: `train.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    sys.exit(0)
