"""Where captions and images come from. Each module turns one layout into a stream of entries.

A source module has `NEEDS` (options it cannot do without) and
`entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]`.
"""

from importlib import import_module
from types import ModuleType

from d2s.shards.format.sample import SourceOptions

NAMES = ("karpathy", "coco", "flickr", "release", "jsonl", "parquet", "img2dataset", "scenes")
_MODULES = {"jsonl": "table", "parquet": "table"}


def source(name: str) -> ModuleType:
    """The module of a source by its name."""
    assert name in NAMES, name
    return import_module(f"d2s.shards.sources.{_MODULES.get(name, name)}")


def check_options(name: str, options: SourceOptions) -> None:
    """Raises ValueError if an option that the source needs was not given, or a file or folder does not exist."""
    for need in source(name).NEEDS:
        if not getattr(options, need):
            raise ValueError(f"source {name} needs {'--count' if need == 'counts' else f'--{need}'}")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images {options.images}: no such folder")
    for flag, paths in (
        ("--captions", [path for _, path in options.captions]),
        ("--split-lists", options.split_lists.values()),
    ):
        for path in paths:
            if not path.exists():
                raise ValueError(f"{flag} {path}: no such file")
