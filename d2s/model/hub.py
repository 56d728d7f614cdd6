"""Finds models by folder, package or name on the Hugging Face hub, and explains why one cannot be read."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from transformers.utils import logging as hf_logging

PACKAGE = "package:"
LFS_POINTER = b"version https://git-lfs"
_REPORTER = logging.getLogger("transformers.modeling_utils")


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars and its table of missing weights inside the `with` block.

    `towers` reports missing weights itself. Other warnings of transformers stay visible.
    """
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    _REPORTER.addFilter(_is_no_table)
    try:
        yield
    finally:
        _REPORTER.removeFilter(_is_no_table)
        if bars:
            hf_logging.enable_progress_bar()


def _is_no_table(record: logging.LogRecord) -> bool:
    return " LOAD REPORT" not in record.getMessage()


def one_line(error: Exception) -> str:
    """Returns the first line of an error's message, cut to 300 characters, or else the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def reason(error: Exception, place: str | Path) -> str:
    """Returns in one line why a model cannot be read: a git-lfs pointer in its folder, or else `error`."""
    place = Path(place)
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        if file.is_file():
            with open(file, "rb") as stream:
                if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                    return (
                        f"{file.name} is a git-lfs pointer, not the file: run `git lfs pull` in {file.parent}"
                    )
    return one_line(error)


def locate(name: str) -> str:
    """Returns the path of `package:<module>/<folder>`, or any other name with a leading ~ expanded.

    Raises ValueError if the package is not installed or has no such folder.
    """
    if not name.startswith(PACKAGE):
        return os.path.expanduser(name)
    module, _, folder = name.removeprefix(PACKAGE).partition("/")
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"tower name {name!r}: package {module!r} is not installed, install it with pip")
    path = Path(spec.submodule_search_locations[0], folder)
    if not path.is_dir():
        raise ValueError(f"tower name {name!r}: the package has no folder {folder!r}")
    return str(path)


def reachable(name: str) -> str:
    """Returns `locate(name)` if it is a folder or in the hub's cache, or if the hub can be reached.

    Else raises ValueError at once. Without this check, the hub's client would fail only after half a minute.
    """
    path, host = locate(name), urlsplit(ENDPOINT).hostname
    if Path(path).is_dir() or HF_HUB_OFFLINE or "https" in getproxies():
        return path
    try:
        if not try_to_load_from_cache(path, "config.json"):
            socket.getaddrinfo(host, 443)
    except HFValidationError as error:
        reason = "there is no such folder, and no such name on the hub"
        raise ValueError(f"tower name {name!r}: {reason}") from error
    except OSError as error:
        reason = f"not a folder, not in the cache, and {host} cannot be reached"
        raise ValueError(f"tower name {name!r}: {reason}") from error
    return path
