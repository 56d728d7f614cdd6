"""What the commands share: a mistake of the user's, or of the machine's files, is one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line, where argparse would print all options first."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help explains\n")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(work: Callable[[], None]) -> int:
    """Does the work of a command. Returns its exit code: 0, 2 after one line of what is wrong, 130 interrupted."""
    try:
        work()
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except OSError as error:
        # Of a failed rename the second name is the file that was asked for.
        name = error.filename2 or error.filename
        what = error.strerror or " ".join(str(error).split()) or type(error).__name__
        print(f"error: {f'{name}: ' if name is not None else ''}{what}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    else:
        return 0
    return 2
