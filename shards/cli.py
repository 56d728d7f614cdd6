"""The command line of the shards: build, index, verify, stats, show."""

import argparse
import sys
from pathlib import Path

from d2s.common.command import Parser
from d2s.common.files import input_sha256
from d2s.shards import arguments, sources
from d2s.shards.build.data_set import (
    INPUT,
    BuildConfig,
    BuildReport,
    build,
    is_complete,
    open_in_place,
    open_output,
    settings_of,
)
from d2s.shards.build.dense import DenseOptions, files_of
from d2s.shards.build.layout import Layout
from d2s.shards.format.sample import Faults, SourceOptions
from d2s.shards.inspect.show import describe, find, save_image
from d2s.shards.inspect.stats import stats, table
from d2s.shards.inspect.verify import verify


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m d2s.shard", description="Data sets as tar shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=f"{text}.", epilog=f"example: python -m d2s.shard {name} {example}"
        )
        added.set_defaults(run=run)
        return added

    arguments.add_build(
        command(
            "build",
            _build,
            "make a data set of captions and images: checked, shuffled, reproducible to the byte",
            "--source karpathy --captions dataset_flickr30k.json --images flickr30k-images --dense dense.jsonl"
            " --resize 480 --workers 8 --out data/f30k",
        )
    )
    indexing = command(
        "index",
        _index,
        "describe tars of webdataset or img2dataset where they lie, without copying them",
        "laion --dense recap/ --dense-key key --dense-columns re_caption --sparse-columns org_caption",
    )
    indexing.add_argument("folder", type=Path, metavar="DIR", help="folder with *.tar or <split>/*.tar")
    indexing.add_argument("--split", default="train", help="split of tars in no subfolder (default: train)")
    indexing.add_argument("--no-decode", action="store_true", help="read only the headers of the images")
    indexing.add_argument("--force", action="store_true", help="do it anew where it was done")
    arguments.add_common(indexing)
    arguments.add_dense(indexing)

    checking = command(
        "verify", _verify, "look for damage in every byte of a data set", "data/f30k --workers 8"
    )
    checking.add_argument("folder", type=Path, metavar="DIR")
    checking.add_argument("--workers", type=arguments.positive, default=1, metavar="N", help="processes")
    checking.add_argument(
        "--no-decode", action="store_true", help="trust the checksums; do not decode images"
    )

    command(
        "stats", _stats, "print counts, caption lengths, image sizes and bytes", "data/f30k"
    ).add_argument("folder", type=Path, metavar="DIR")

    showing = command(
        "show", _show, "print the captions of a sample and write its image", "data/f30k 1000092795"
    )
    showing.add_argument("folder", type=Path, metavar="DIR")
    showing.add_argument("key", metavar="KEY")
    showing.add_argument("--out", type=Path, help="file or folder for the image (default: KEY.jpg here)")
    return parser


def _dense_options(args: argparse.Namespace) -> DenseOptions | None:
    if args.dense is None:
        if args.sparse_columns:
            raise ValueError("--sparse-columns names columns of the --dense file; give one")
        return None
    if args.dense_missing == "stop" and not args.dense_columns and not args.sparse_columns:
        raise ValueError("--dense-columns and --sparse-columns are both empty: nothing to join")
    return DenseOptions(
        path=args.dense,
        key=args.dense_key,
        key_column=args.dense_key_column,
        columns=args.dense_columns,
        sparse_columns=args.sparse_columns,
        missing=args.dense_missing,
        extra=args.dense_extra,
    )


def _build(args: argparse.Namespace) -> int:
    options = SourceOptions(
        captions=tuple(args.captions),
        images=args.images,
        split=args.split,
        split_lists=args.split_lists,
        columns=args.columns,
        dense_columns=args.dense_columns,
        counts=args.count,
        size=args.size,
        seed=args.seed,
        workers=args.workers,
    )
    sources.check_options(args.source, options)
    dense = _dense_options(args)
    config = BuildConfig(
        resize=args.resize,
        quality=args.quality,
        layout=Layout(shard_size=args.shard_size, seed=args.seed, holdout=args.holdout),
        quarantine=args.on_error == "quarantine",
    )
    facts = _facts(args.source, options, dense)
    if read := _caption_files(options, dense):
        facts[INPUT] = input_sha256(read)
    if (args.resume or args.part) and is_complete(args.out, settings_of(config, facts)):
        print(f"{args.out}: complete already")
        return 0
    open_output(args.out, args.resume or args.part is not None)
    _run(args, options, args.out, config, dense, facts)
    return 0


def _index(args: argparse.Namespace) -> int:
    dense = _dense_options(args)
    options = SourceOptions(images=args.folder, split=args.split, workers=args.workers)
    config = BuildConfig(
        layout=Layout(in_place=args.folder),
        quarantine=args.on_error == "quarantine",
        decode=not args.no_decode,
    )
    open_in_place(args.folder, args.force)
    args.source = "img2dataset"
    _run(args, options, args.folder, config, dense, _facts(args.source, options, dense))
    return 0


def _run(
    args: argparse.Namespace,
    options: SourceOptions,
    out: Path,
    config: BuildConfig,
    dense: DenseOptions | None,
    facts: dict,
) -> None:
    faults = Faults(config.quarantine)
    entries = sources.source(args.source).entries(options, faults)
    part = getattr(args, "part", None)
    report = build(
        entries, out, config, dense=dense, facts=facts, faults=faults, workers=args.workers, part=part
    )
    if report is None:
        print(f"{out}: part {part[0]}/{part[1]} is done; the last part to end joins them")
    else:
        _print_report(report, out)


def _facts(source: str, options: SourceOptions, dense: DenseOptions | None) -> dict:
    """What build.json says about the input: names and numbers, no path of this machine."""
    facts = {
        "source": source,
        "captions": [path.name for _, path in options.captions],
        "dense": None if dense is None else _dense_facts(dense),
    }
    if source == "scenes":
        facts.update(count=options.counts, size=options.size)
    return facts


def _caption_files(options: SourceOptions, dense: DenseOptions | None) -> list[Path]:
    """The files that the captions and splits come from."""
    given = [path for _, path in options.captions] + list(options.split_lists.values())
    return given + (files_of(dense.path) if dense is not None else [])


def _dense_facts(dense: DenseOptions) -> dict:
    return {
        "file": dense.path.name,
        "key": dense.key,
        "key_column": dense.key_column or dense.key,
        "columns": dense.columns,
        "sparse_columns": dense.sparse_columns,
        "missing": dense.missing,
        "extra": dense.extra,
    }


def _print_report(report: BuildReport, out: Path) -> None:
    splits = ", ".join(f"{name} {count:,}" for name, count in report.samples.items())
    total = sum(report.samples.values())
    print(f"{out}: {total:,} samples ({splits}) in {report.shards:,} shards, {report.bytes / 1e6:,.1f} MB")
    if report.extra:
        print(f"{out}: {report.extra:,} rows of dense captions belong to no image here")
    if report.quarantined:
        print(
            f"{out}: {report.quarantined:,} faults; what they concern was left out: {out / 'quarantine.jsonl'}"
        )
    for split in ("train", "val"):
        if split not in report.samples:
            use = "nothing to train on" if split == "train" else "training cannot choose its best checkpoint"
            print(f"{out}: note: no split {split!r}: {use}")


def _verify(args: argparse.Namespace) -> int:
    count = 0
    for fault in verify(args.folder, args.workers, decode=not args.no_decode):
        print(fault, flush=True)
        count += 1
    print(f"{args.folder}: {f'{count:,}' if count else 'no'} fault{'s' if count > 1 else ''}")
    return 1 if count else 0


def _stats(args: argparse.Namespace) -> int:
    print(table(stats(args.folder)))
    return 0


def _show(args: argparse.Namespace) -> int:
    row = find(args.folder, args.key)
    print(describe(row))
    print(f"image      {save_image(args.folder, row, args.out)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns 0; 1 where `verify` found faults; 2 for a user's mistake, told in one line; 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        if args.command in ("build", "index"):
            for line in arguments.idle(args):
                print(f"warning: {line}", file=sys.stderr)
        return args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.command}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command with --resume goes on" if args.command == "build" else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
