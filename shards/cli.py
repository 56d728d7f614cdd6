"""The command line of the shards: build, verify, stats, show, index."""

import argparse
import re
import sys
from pathlib import Path

from d2s.shards import sources
from d2s.shards.build import BuildConfig, BuildReport, build
from d2s.shards.dense import KEYS, DenseOptions
from d2s.shards.plan import ShardSize
from d2s.shards.sample import Faults, SourceOptions

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _shard_size(text: str) -> ShardSize:
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of samples (1000) nor of bytes (500MB)"
        )
    if match[2]:
        return ShardSize(samples=None, bytes=int(match[1]) * _UNITS[match[2].upper()])
    return ShardSize(samples=int(match[1]))


def _counts(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not name.strip() or not number.strip().isdigit():
            raise argparse.ArgumentTypeError(
                f"{part!r} is not like train=2000; write train=2000,val=200,test=200"
            )
        if not int(number):
            raise argparse.ArgumentTypeError(
                f"split {name.strip()!r} is empty; give it at least 1, or leave it out"
            )
        counts[name.strip()] = int(number)
    return counts


def _columns(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m d2s.shard", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    return parser


def _add_build(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "build",
        help="captions and images -> tar shards with a manifest",
        description="Builds a data set: checked, shuffled, reproducible to the byte.",
        epilog="example: python -m d2s.shard build --source karpathy --captions dataset_flickr30k.json"
        " --images flickr30k-images --dense dense.jsonl --resize 480 --workers 8 --out data/f30k",
    )
    command.set_defaults(run=_build)
    add = command.add_argument
    add("--source", required=True, choices=sources.NAMES, help="layout of the input")
    add("--captions", type=Path, help="caption file (release: the folder with *_ids.txt)")
    add("--images", type=Path, help="folder of images (img2dataset: of its tars)")
    add("--out", type=Path, required=True, help="folder to make; it has to be empty")
    add("--split", help="split of a source that knows none (default: train)")
    add("--dense", type=Path, help="dense captions apart: JSON lines or parquet, a file or a folder of them")
    add("--dense-key", default="filename", choices=KEYS, help="what they are joined by (default: filename)")
    add("--dense-key-column", default="", help="column that holds it (default: named as the key)")
    add("--dense-columns", type=_columns, default=("text",), help="columns of dense captions (default: text)")
    add(
        "--sparse-columns",
        type=_columns,
        default=(),
        help="columns that replace the source's sparse captions",
    )
    add("--dense-missing", default="stop", choices=("stop", "allow"), help="an image without a dense row")
    add("--dense-extra", default="stop", choices=("stop", "allow"), help="a dense row without an image")
    add("--workers", type=_positive, default=1, help="processes; the bytes do not depend on it (default: 1)")
    add("--resize", type=_positive, help="shrink the shorter side to so many pixels (default: keep the file)")
    add("--quality", type=int, default=95, help="JPEG quality of images that are re-encoded (default: 95)")
    add(
        "--shard-size", type=_shard_size, default=ShardSize(), help="samples (1000, default) or bytes (500MB)"
    )
    add("--seed", type=int, default=0, help="of the order within each split, and of scenes (default: 0)")
    add(
        "--on-error",
        default="stop",
        choices=("stop", "quarantine"),
        help="bad input: stop, or list and leave out",
    )
    add("--resume", action="store_true", help="continue a build that was interrupted")
    add("--count", type=_counts, default={}, help="scenes: images a split, train=2000,val=200,test=200")
    add("--size", type=_positive, default=64, help="scenes: pixels a side (default: 64)")


def _build(args: argparse.Namespace) -> int:
    options = SourceOptions(
        captions=args.captions,
        images=args.images,
        split=args.split,
        counts=args.count,
        size=args.size,
        seed=args.seed,
        workers=args.workers,
    )
    sources.check_options(args.source, options)
    dense = None
    if args.dense is not None:
        dense = DenseOptions(
            path=args.dense,
            key=args.dense_key,
            key_column=args.dense_key_column,
            columns=args.dense_columns,
            sparse_columns=args.sparse_columns,
            missing=args.dense_missing,
            extra=args.dense_extra,
        )
    config = BuildConfig(
        source=args.source,
        resize=args.resize,
        quality=args.quality,
        shard_size=args.shard_size,
        seed=args.seed,
        quarantine=args.on_error == "quarantine",
    )
    faults = Faults(config.quarantine)
    entries = sources.source(args.source).entries(options, faults)
    report = build(
        entries, args.out, config, dense=dense, faults=faults, workers=args.workers, resume=args.resume
    )
    _print_report(report, args.out)
    return 0


def _print_report(report: BuildReport, out: Path) -> None:
    splits = ", ".join(f"{name} {count:,}" for name, count in report.samples.items())
    total = sum(report.samples.values())
    print(f"{out}: {total:,} samples ({splits}) in {report.shards:,} shards, {report.bytes / 1e6:,.1f} MB")
    if report.quarantined:
        print(
            f"{out}: {report.quarantined:,} faults were left out; they are listed in {out / 'quarantine.jsonl'}"
        )
    if report.extra:
        print(f"{out}: {report.extra:,} rows of dense captions belong to no image here")


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 where `verify` found faults, 2 for a user's mistake, 130 if interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.command}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
