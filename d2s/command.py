"""What the commands share: a mistake of the user's, or of the machine's files, is one line and exit code 2."""

import sys
from collections.abc import Callable

from d2s.shards.arguments import Parser

__all__ = ["Parser", "run"]


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
