"""Helpers for all commands. They report a user's mistake or a file error in one line and exit with code 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from d2s.common.messages import one_line, shorten


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a usage error in one line, without argparse's list of all options."""

    def error(self, message: str) -> NoReturn:
        """Prints the message on stderr and exits with code 2."""
        self.exit(2, f"error: {one_line(message)}; {self.prog} --help explains\n")


def positive(text: str) -> int:
    """Parses a whole number of at least 1. Used as `type` of argparse options."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{shorten(repr(text))} is not a whole number of at least 1")
    return int(text)


def user_path(text: str) -> Path:
    """Parses a path. Expands a leading ~, which shells do not do in `--run=~/x`. A `type` for argparse."""
    return Path(text).expanduser()


def run(
    work: Callable[[], int | None],
    interrupted: str = "interrupted",
    failure: type[Exception] | tuple[()] = (),
) -> int:
    """Runs the work of a command and prints its errors, each in one line.

    Args:
        work: does the work and returns the exit code, or None for 0.
        interrupted: message to print after Ctrl-C.
        failure: type of the errors that give exit code 1, because they are not the user's mistake.
    Returns:
        The exit code: the result of `work`; 1 after `failure`; 2 after ValueError or OSError; 130 after Ctrl-C.
    """
    try:
        return work() or 0
    except failure as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
    except OSError as error:
        # A failed rename has two file names. The first is temporary; the user knows only the second.
        name = error.filename2 or error.filename
        what = error.strerror or str(error) or type(error).__name__
        print(f"error: {one_line(f'{name}: {what}' if name is not None else what)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 2
