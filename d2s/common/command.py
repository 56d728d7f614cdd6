"""What the commands share: a mistake of the user, or an error of the file system, is one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from d2s.common.text import one_line, shorten


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line; argparse would print all options first."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"error: {one_line(message)}; {self.prog} --help explains\n")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{shorten(repr(text))} is not a whole number of at least 1")
    return int(text)


def run(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Runs the work of a command and reports its errors.

    Args:
        work: returns the exit code, None for 0.
        interrupted: the line to print after Ctrl-C.
    Returns:
        The exit code: that of the work; 2 after ValueError or OSError, with one line; 130 after Ctrl-C.
    """
    try:
        return work() or 0
    except ValueError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
    except OSError as error:
        # After a failed rename, the second name is the one that the user knows.
        name = error.filename2 or error.filename
        what = error.strerror or str(error) or type(error).__name__
        print(f"error: {one_line(f'{name}: {what}' if name is not None else what)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 2
