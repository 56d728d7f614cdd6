"""Reads captions and images. Each module turns one input layout into a stream of entries, one for each image.

A source module has

- `NEEDS`: the fields of `SourceOptions` that the user must give;
- `USES`: further fields that have an effect;
- `entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]`.
"""

from importlib import import_module
from types import ModuleType

from d2s.shards.sources.entry import SourceOptions

NAMES = ("karpathy", "coco", "flickr", "release", "jsonl", "csv", "parquet", "img2dataset", "scenes")
_MODULES = dict.fromkeys(("jsonl", "csv", "parquet"), "table")


def source(name: str) -> ModuleType:
    """Returns the module that reads the source `name`, one of NAMES."""
    return import_module(f"d2s.shards.sources.{_MODULES.get(name, name)}")


def check_options(name: str, options: SourceOptions) -> None:
    """Raises ValueError if an option that the source needs is missing, or if a given path does not exist."""
    for need in source(name).NEEDS:
        if not getattr(options, need):
            raise ValueError(f"source {name} needs {'--count' if need == 'counts' else f'--{need}'}")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images {options.images}: no such folder")
    paths = [("--captions", path) for _, path in options.captions]
    paths += [("--split-lists", path) for path in options.split_lists.values()]
    for flag, path in paths:
        if not path.exists():
            raise ValueError(f"{flag} {path}: no such file")


def unused_options(name: str, options: SourceOptions) -> list[str]:
    """Returns the names of the options that the user gave but that source `name` ignores."""
    module, default = source(name), SourceOptions()
    choices = ("captions", "images", "split", "split_lists", "columns", "suffixes", "counts", "size")
    given = [option for option in choices if getattr(options, option) != getattr(default, option)]
    return [option for option in given if option not in (*module.NEEDS, *module.USES)]
