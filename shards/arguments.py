"""Defines the commands of `python -m d2s.shard`, their options, and functions that parse option values."""

import argparse
import re
from pathlib import Path

from d2s.common.command import Parser, positive, user_path
from d2s.common.messages import shorten
from d2s.shards.build.caption_join import KEYS, JoinOptions
from d2s.shards.build.layout import ShardSize
from d2s.shards.sources import NAMES, unused_options
from d2s.shards.sources.entry import SourceOptions

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_Fault = argparse.ArgumentTypeError


def _shard_size(text: str) -> ShardSize:
    """Parses `1000` (samples) or `500MB` (of images)."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise _Fault(f"{shorten(repr(text))} is neither a number of samples (1000) nor of bytes (500MB)")
    if match[2]:
        return ShardSize(samples=None, bytes=int(match[1]) * _UNITS[match[2].upper()])
    return ShardSize(samples=int(match[1]))


def _counts(text: str) -> dict[str, int]:
    """Parses `train=2000,val=200`; each number must be at least 1."""
    found = _pairs(text)
    for name, value in found.items():
        if not value.isdecimal():
            raise _Fault(f"{name}={value} is not a number; write train=2000,val=200,test=200")
        if not int(value):
            raise _Fault(f"split {name!r} is empty; give it at least 1, or leave it out")
    return {name: int(value) for name, value in found.items()}


def _pairs(text: str) -> dict[str, str]:
    """Parses `a=x,b=y` to {a: x, b: y}."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = (side.strip() for side in part.partition("="))
        if not name or not value:
            raise _Fault(f"{shorten(repr(part))} is not NAME=VALUE; separate several by commas")
        if name in found:
            raise _Fault(f"{shorten(repr(name))} is given twice")
        found[name] = value
    return found


def _column_pairs(text: str) -> dict[str, str]:
    """Parses `path=x,sparse=a,sparse=b` to {path: x, sparse: "a,b"}."""
    found: dict[str, str] = {}
    for part in text.split(","):
        for name, value in _pairs(part).items():
            found[name] = f"{found[name]},{value}" if name in found else value
    return found


def _path_pairs(text: str) -> dict[str, Path]:
    """Parses `train=FILE,val=FILE` to {train: path, val: path}."""
    return {name: user_path(value) for name, value in _pairs(text).items()}


def _caption_file(text: str) -> tuple[str | None, Path]:
    """Parses `FILE` to (None, path), and `val=FILE` to ("val", path)."""
    match = re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", text)
    return (match[1], user_path(match[2])) if match and not Path(text).exists() else (None, user_path(text))


def _columns(text: str) -> tuple[str, ...]:
    """Parses `a,b` to (a, b)."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _part(text: str) -> tuple[int, int]:
    """Parses `3/8` to (3, 8)."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise _Fault(f"{shorten(repr(text))} is not I/N with I from 1 to N, such as 3/8")
    return int(number), int(parts)


def parser() -> argparse.ArgumentParser:
    """Builds the parser for all commands. The field `command` of its result is the name of the command."""
    top = Parser(prog="python -m d2s.shard", description="Data sets as tar shards.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        example = f"example: python -m d2s.shard {name} {example}"
        return commands.add_parser(name, help=text, description=f"{text}.", epilog=example)

    build = command(
        "build",
        "make a data set of captions and images: checked, shuffled, reproducible to the byte",
        "--source karpathy --captions dataset_flickr30k.json --images flickr30k-images --dense dense.jsonl"
        " --resize 480 --workers 8 --out data/f30k",
    )
    _add_build_options(build)
    _add_input_options(build)
    index = command(
        "index",
        "describe tars of webdataset or img2dataset where they lie, without copying them",
        "laion --dense recap/ --dense-key key --dense-columns re_caption --sparse-columns org_caption",
    )
    index.add_argument("folder", type=user_path, metavar="DIR", help="folder with *.tar or <split>/*.tar")
    index.add_argument("--split", default="train", help="split of tars in no subfolder (default: train)")
    text = "folder for the description and for links to the tars (default: beside the tars)"
    index.add_argument("--out", type=user_path, metavar="DIR", help=text)
    text = "fields of the JSON in the tars that hold captions"
    index.add_argument("--columns", type=_column_pairs, default={}, metavar="sparse=caption,...", help=text)
    _add_suffixes(index)
    index.add_argument("--no-decode", action="store_true", help="read only the headers of the images")
    index.add_argument("--force", action="store_true", help="index again what is indexed already")
    _add_input_options(index)

    verify = command("verify", "look for damage in every byte of a data set", "data/f30k --workers 8")
    stats = command("stats", "print counts, caption lengths, image sizes and bytes", "data/f30k")
    show = command("show", "print the captions of a sample and write its image", "data/f30k 1000092795")
    for added in (verify, stats, show):
        added.add_argument("folder", type=user_path, metavar="DIR")
    verify.add_argument("--workers", type=positive, default=1, metavar="N", help="processes")
    verify.add_argument("--no-decode", action="store_true", help="trust the checksums; do not decode images")
    show.add_argument("key", metavar="KEY")
    show.add_argument("--out", type=user_path, help="file or folder for the image (default: KEY.jpg here)")
    return top


def _add_build_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    default = SourceOptions()
    add("--source", required=True, choices=NAMES, help="layout of the input")
    text = "caption file (release: the folder with *_ids.txt); coco, jsonl, csv and parquet take several, val=FILE"
    add("--captions", type=_caption_file, nargs="+", default=(), metavar="FILE", help=text)
    add("--images", type=user_path, metavar="DIR", help="folder of images (img2dataset: of its tars)")
    add("--out", type=user_path, required=True, metavar="DIR", help="folder to make; it has to be empty")
    add("--split", help="split of images whose source names none, or only in a file's name (default: train)")
    text = "flickr: the split lists"
    add("--split-lists", type=_path_pairs, default={}, metavar="train=FILE,...", help=text)
    text = "images to take from train for a split"
    add("--holdout", type=_counts, default={}, metavar="val=500,...", help=text)
    text = (
        "jsonl, csv, parquet: names of its columns, several as sparse=a,sparse=b, numbers without a header;"
        " img2dataset: sparse=FIELD,dense=FIELD of the JSON in the tars"
    )
    add("--columns", type=_column_pairs, default={}, metavar="path=image,...", help=text)
    _add_suffixes(command)
    add("--resize", type=positive, metavar="PIXELS", help="shrink the shorter side (default: keep the file)")
    add("--quality", type=int, default=95, help="JPEG quality of images that are re-encoded (default: 95)")
    add("--shard-size", type=_shard_size, default=ShardSize(), metavar="SIZE", help="1000 samples, or 500MB")
    add("--seed", type=int, default=0, help="of the order within each split, and of scenes (default: 0)")
    text = "scenes: images in each split"
    add("--count", dest="counts", type=_counts, default={}, metavar="train=2000,...", help=text)
    text = "scenes: pixels a side (default: 64)"
    add("--size", type=positive, default=default.size, metavar="PIXELS", help=text)
    text = "make the I-th of N parts of the shards, beside other machines; the last to end joins them"
    add("--part", type=_part, metavar="I/N", help=text)
    text = "continue a build that was interrupted; of a complete one, compare settings and caption files"
    add("--resume", action="store_true", help=text)


def _add_suffixes(command: argparse.ArgumentParser) -> None:
    text = "tars: suffixes of image, caption, dense, json in a sample (default: any image, txt, none, json)"
    command.add_argument("--suffixes", type=_pairs, default={}, metavar="image=jpg,...", help=text)


def _add_input_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that `build` and `index` share: workers, bad input, separate captions."""
    add, choices = command.add_argument, ("stop", "quarantine")
    add("--workers", type=positive, default=1, metavar="N", help="processes; the bytes do not depend on it")
    text = "bad input: stop at it, or list it in quarantine.jsonl and leave it out (default: stop)"
    add("--on-error", default="stop", choices=choices, help=text)
    add = command.add_argument_group(
        "captions in separate files",
        "The file is streamed. Every row must find its image and every image its row."
        " Memory: about 100 bytes an image for the whole build, whatever the size of the file.",
    ).add_argument
    choices = ("stop", "allow")
    add("--dense", type=user_path, help="JSON lines, a JSON array, CSV or parquet; a file or a folder")
    add("--dense-key", default="filename", choices=KEYS, help="what they are joined by (default: filename)")
    text = "column that holds it (default: named as the key)"
    add("--dense-key-column", default="", metavar="NAME", help=text)
    text = "dense captions (default: text)"
    add("--dense-columns", type=_columns, default=("text",), metavar="A,B", help=text)
    text = "sparse captions; they replace those of the source (default: none)"
    add("--sparse-columns", type=_columns, default=(), metavar="A,B", help=text)
    add("--dense-missing", default="stop", choices=choices, help="images without a row (default: stop)")
    add("--dense-extra", default="stop", choices=choices, help="rows without an image (default: stop)")
    text = "further rows of an image, each with further captions; equal ones count once (default: stop)"
    add("--dense-repeated", default="stop", choices=choices, help=text)


def join_options(args: argparse.Namespace) -> JoinOptions | None:
    """Returns the options for separate captions; None without --dense. ValueError if options contradict."""
    if args.dense is None:
        if args.sparse_columns:
            raise ValueError("--sparse-columns names columns of the --dense file; give one")
        return None
    if args.dense_missing == "stop" and not args.dense_columns and not args.sparse_columns:
        raise ValueError("--dense-columns and --sparse-columns are both empty: nothing to join")
    return JoinOptions(
        path=args.dense,
        key=args.dense_key,
        key_column=args.dense_key_column,
        columns=args.dense_columns,
        sparse_columns=args.sparse_columns,
        missing=args.dense_missing,
        extra=args.dense_extra,
        repeated=args.dense_repeated,
    )


def warnings(args: argparse.Namespace, options: SourceOptions) -> list[str]:
    """Returns a warning for each option of `build` or `index` that the user gave but that has no effect."""
    found = []
    if args.command == "build":
        for name in unused_options(args.source, options):
            found.append((name.replace("counts", "count"), f"with source {args.source}"))
    if args.dense is None:
        default = parser().parse_args(["index", "."])
        for name in (
            "dense_key",
            "dense_key_column",
            "dense_missing",
            "dense_extra",
            "dense_repeated",
            "dense_columns",
        ):
            used = name == "dense_columns" and getattr(args, "source", "") == "release"
            if getattr(args, name) != getattr(default, name) and not used:
                found.append((name, "without --dense"))
    return [f"--{name.replace('_', '-')} has no effect {reason}" for name, reason in found]
