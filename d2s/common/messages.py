"""Text in messages: values of any length on one line of bounded length."""

import re

LIMIT = 300
"""The most characters of a value that a message repeats."""
LINE_LIMIT = 800
"""The most characters of a whole message: its parts are shortened one by one, and this is the last resort."""
_LONG_VALUE = re.compile(rf"'[^']{{{LIMIT},}}'|\S{{{LIMIT},}}")


def shorten(text: str, limit: int = LIMIT) -> str:
    """The text, or its beginning and end around "... (N characters) ..." if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    middle = f" ... ({len(text):,} characters) ... "
    tail = (limit - len(middle)) // 3
    return text[: limit - len(middle) - tail] + middle + text[-tail:]


def one_line(text: str, limit: int = LINE_LIMIT) -> str:
    """The text with every run of white space as one blank, shortened, and so is each long word or quoted value."""
    # Only both ends can remain, so the middle of a very long text need not be split into words.
    if len(text) > 100 * limit:
        text = shorten(text, 100 * limit)
    return shorten(_LONG_VALUE.sub(lambda found: shorten(found[0]), " ".join(text.split())), limit)
