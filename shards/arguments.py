"""The arguments of `python -m d2s.shard`, and what their texts mean."""

import argparse
import re
from pathlib import Path

from d2s.common.command import positive
from d2s.shards import sources
from d2s.shards.build.dense import KEYS
from d2s.shards.build.layout import ShardSize

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_FAULT = argparse.ArgumentTypeError


def shard_size(text: str) -> ShardSize:
    """`1000` samples, or `500MB` of images."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise _FAULT(f"{text!r} is neither a number of samples (1000) nor of bytes (500MB)")
    if match[2]:
        return ShardSize(samples=None, bytes=int(match[1]) * _UNITS[match[2].upper()])
    return ShardSize(samples=int(match[1]))


def counts(text: str) -> dict[str, int]:
    """`train=2000,val=200`: at least one each."""
    found: dict[str, int] = {}
    for name, value in pairs(text).items():
        if not value.isdigit():
            raise _FAULT(f"{name}={value} is not a number; write train=2000,val=200,test=200")
        if not int(value):
            raise _FAULT(f"split {name!r} is empty; give it at least 1, or leave it out")
        found[name] = int(value)
    return found


def pairs(text: str) -> dict[str, str]:
    """`a=x,b=y`."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise _FAULT(f"{part!r} is not NAME=VALUE; separate several by commas")
        if name.strip() in found:
            raise _FAULT(f"{name.strip()!r} is given twice")
        found[name.strip()] = value.strip()
    return found


def split_lists(text: str) -> dict[str, Path]:
    """`train=FILE,val=FILE`."""
    return {name: Path(value) for name, value in pairs(text).items()}


def caption_file(text: str) -> tuple[str | None, Path]:
    """`FILE`, or `val=FILE`."""
    match = re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", text)
    return (match[1], Path(match[2])) if match and not Path(text).exists() else (None, Path(text))


def columns(text: str) -> tuple[str, ...]:
    """`a,b`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_dense(command: argparse.ArgumentParser) -> None:
    """The options of captions that lie apart."""
    add = command.add_argument_group(
        "captions that lie apart",
        "The file is streamed; every row has to find its image and every image its row."
        " Memory: about 100 bytes an image for the whole plan, whatever the size of the file.",
    ).add_argument
    add("--dense", type=Path, help="JSON lines or parquet, a file or a folder of them")
    add("--dense-key", default="filename", choices=KEYS, help="what they are joined by (default: filename)")
    add(
        "--dense-key-column",
        default="",
        metavar="NAME",
        help="column that holds it (default: named as the key)",
    )
    add(
        "--dense-columns",
        type=columns,
        default=("text",),
        metavar="A,B",
        help="dense captions (default: text)",
    )
    add(
        "--sparse-columns",
        type=columns,
        default=(),
        metavar="A,B",
        help="sparse captions; they replace those of the source (default: none)",
    )
    choices = ("stop", "allow")
    add("--dense-missing", default="stop", choices=choices, help="images without a row (default: stop)")
    add("--dense-extra", default="stop", choices=choices, help="rows without an image (default: stop)")


def add_common(command: argparse.ArgumentParser) -> None:
    """Workers, and what to do about bad input."""
    add = command.add_argument
    add("--workers", type=positive, default=1, metavar="N", help="processes; the bytes do not depend on it")
    add(
        "--on-error",
        default="stop",
        choices=("stop", "quarantine"),
        help="bad input: stop at it, or list it in quarantine.jsonl and leave it out (default: stop)",
    )


def part(text: str) -> tuple[int, int]:
    """`3/8` as (3, 8)."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/8")
    return int(number), int(parts)


def add_build(command: argparse.ArgumentParser) -> None:
    """The options of `build`."""
    add = command.add_argument
    add("--source", required=True, choices=sources.NAMES, help="layout of the input")
    add(
        "--captions",
        type=caption_file,
        nargs="+",
        default=[],
        metavar="FILE",
        help="caption file (release: the folder with *_ids.txt); coco, jsonl and parquet take several, val=FILE",
    )
    add("--images", type=Path, metavar="DIR", help="folder of images (img2dataset: of its tars)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make; it has to be empty")
    add("--split", default="train", help="split of a source that knows none (default: train)")
    add(
        "--split-lists",
        type=split_lists,
        default={},
        metavar="train=FILE,...",
        help="flickr: the split lists",
    )
    add(
        "--holdout",
        type=counts,
        default={},
        metavar="val=500,...",
        help="images to take from train for a split",
    )
    add(
        "--columns",
        type=pairs,
        default={},
        metavar="path=image,...",
        help="jsonl, parquet: names of its columns",
    )
    add("--resize", type=positive, metavar="PIXELS", help="shrink the shorter side (default: keep the file)")
    add("--quality", type=int, default=95, help="JPEG quality of images that are re-encoded (default: 95)")
    add("--shard-size", type=shard_size, default=ShardSize(), metavar="SIZE", help="1000 samples, or 500MB")
    add("--seed", type=int, default=0, help="of the order within each split, and of scenes (default: 0)")
    add("--count", type=counts, default={}, metavar="train=2000,...", help="scenes: images a split")
    add("--size", type=positive, default=64, metavar="PIXELS", help="scenes: pixels a side (default: 64)")
    add(
        "--part",
        type=part,
        metavar="I/N",
        help="make the I-th of N parts of the shards, beside other machines; the last to end joins them",
    )
    add(
        "--resume",
        action="store_true",
        help="continue a build that was interrupted; of a complete one, compare settings and caption files",
    )
    add_common(command)
    add_dense(command)


def idle(args: argparse.Namespace) -> list[str]:
    """The options that were given but change nothing under the others, each with the reason."""
    found = []

    def check(name: str, default: object, used: bool, reason: str) -> None:
        if not used and getattr(args, name, default) != default:
            found.append(f"--{name.replace('_', '-')} has no effect {reason}")

    source = getattr(args, "source", None)
    if source is not None:
        with_source = f"with source {source}"
        check("captions", [], source not in ("img2dataset", "scenes"), with_source)
        check("images", None, source != "scenes", with_source)
        check("split", "train", source not in ("karpathy", "release", "scenes"), with_source)
        check("split_lists", {}, source == "flickr", with_source)
        check("columns", {}, source in ("jsonl", "parquet"), with_source)
        check("count", {}, source == "scenes", with_source)
        check("size", 64, source == "scenes", with_source)
    for name, default in (("dense_key", "filename"), ("dense_key_column", ""), ("dense_missing", "stop")):
        check(name, default, args.dense is not None, "without --dense")
    check("dense_extra", "stop", args.dense is not None, "without --dense")
    check("dense_columns", ("text",), args.dense is not None or source == "release", "without --dense")
    return found
