"""Shortens text for messages, so that each message is one line of bounded length."""

import re

LIMIT = 300
"""Maximum number of characters of a value in a message."""
LINE_LIMIT = 800
"""Maximum number of characters of a whole message, after its values have been shortened."""
_LONG_VALUE = re.compile(rf"'[^']{{{LIMIT},}}'|\S{{{LIMIT},}}")


def shorten(text: str, limit: int = LIMIT) -> str:
    """Returns the text. If it is longer than `limit`, replaces its middle by "... (N characters) ..."."""
    if len(text) <= limit:
        return text
    middle = f" ... ({len(text):,} characters) ... "
    tail = (limit - len(middle)) // 3
    return text[: limit - len(middle) - tail] + middle + text[-tail:]


def one_line(text: str, limit: int = LINE_LIMIT) -> str:
    """Returns the text as one line. Shortens long words, long quoted values, and then the whole line."""
    # Saves time: the middle of a very long text is cut out anyway.
    if len(text) > 100 * limit:
        text = shorten(text, 100 * limit)
    return shorten(_LONG_VALUE.sub(lambda found: shorten(found[0]), " ".join(text.split())), limit)
