"""Runs the commands of `python -m d2s.shard`: build, index, verify, stats, show."""

import argparse
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from d2s.common.command import run
from d2s.common.files import input_sha256
from d2s.shards import arguments, sources
from d2s.shards.build.caption_join import JoinOptions
from d2s.shards.build.data_set import BuildReport, build
from d2s.shards.build.layout import Layout
from d2s.shards.build.output_folder import check_output, link_tars, remove_description
from d2s.shards.build.settings import INPUT, BuildConfig, is_complete, settings_of
from d2s.shards.format.file_names import QUARANTINE, SCRATCH
from d2s.shards.inspect.show import describe, find, save_image
from d2s.shards.inspect.stats import stats, table
from d2s.shards.inspect.verify import verify
from d2s.shards.sources.caption_files import list_files
from d2s.shards.sources.entry import SourceOptions
from d2s.shards.sources.faults import Faults
from d2s.shards.sources.img2dataset import find_tars

# How others call these splits.
_ALIKE = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev")}


def _build(args: argparse.Namespace) -> None:
    given = {field.name: getattr(args, field.name) for field in fields(SourceOptions) if field.name in args}
    split = {"split": args.split or "train", "forced_split": args.split or ""}
    options = SourceOptions(**given | split, scratch=args.out / SCRATCH / "unpacked")
    _warn(args, options)
    sources.check_options(args.source, options)
    join = arguments.join_options(args)
    config = BuildConfig(
        resize=args.resize,
        quality=args.quality,
        layout=Layout(shard_size=args.shard_size, seed=args.seed, holdout=args.holdout),
        quarantine=args.on_error == "quarantine",
    )
    facts = _facts(args.source, options, join)
    files = [path for _, path in options.captions] + list(options.split_lists.values())
    if join is not None:
        files += list_files(join.path)
    if files:
        facts[INPUT] = input_sha256(files)
    resume = args.resume or args.part is not None
    if resume and is_complete(args.out, settings_of(config, facts)):
        print(f"{args.out}: complete already")
        return
    check_output(args.out, resume)
    _run(args.source, options, args.out, config, join, facts, args.part)


def _index(args: argparse.Namespace) -> None:
    folder = args.out or args.folder
    if args.out is not None:
        link_tars(args.folder, folder, [path for _, path in find_tars(args.folder, args.split)])
    elif args.folder.is_dir() and not os.access(args.folder, os.W_OK):
        raise ValueError(f"{args.folder}: cannot be written to; --out FOLDER puts the description elsewhere")
    options = SourceOptions(
        images=folder, split=args.split, workers=args.workers, columns=args.columns, suffixes=args.suffixes
    )
    _warn(args, options)
    join = arguments.join_options(args)
    config = BuildConfig(
        layout=Layout(in_place=folder),
        quarantine=args.on_error == "quarantine",
        decode=not args.no_decode,
    )
    remove_description(folder, args.force)
    facts = _facts("img2dataset", options, join)
    _run("img2dataset", options, folder, config, join, facts, None)


def _warn(args: argparse.Namespace, options: SourceOptions) -> None:
    for line in arguments.warnings(args, options):
        print(f"warning: {line}", file=sys.stderr)


def _run(
    source: str,
    options: SourceOptions,
    out: Path,
    config: BuildConfig,
    join: JoinOptions | None,
    facts: dict,
    part: tuple[int, int] | None,
) -> None:
    faults = Faults(config.quarantine)
    report = build(
        sources.source(source).entries(options, faults),
        out,
        config,
        join=join,
        facts=facts,
        faults=faults,
        workers=options.workers,
        part=part,
    )
    if report is None:
        print(f"{out}: part {part[0]}/{part[1]} is done; the last part to end joins them")
    else:
        _print_report(report, out)


def _facts(source: str, options: SourceOptions, join: JoinOptions | None) -> dict:
    """Returns a description of the input for build.json: names and numbers, but no paths of this machine."""
    facts = {"source": source, "captions": [path.name for _, path in options.captions], "dense": None}
    if join is not None:
        facts["dense"] = asdict(replace(join, key_column=join.key_column or join.key)) | {
            "file": join.path.name
        }
        del facts["dense"]["path"]
        if join.repeated == "stop":
            # The default is left out, because build.json of earlier versions does not have this field.
            del facts["dense"]["repeated"]
    if source == "img2dataset":
        facts |= {name: given for name in ("columns", "suffixes") if (given := getattr(options, name))}
    if source == "scenes":
        facts.update(count=options.counts, size=options.size)
    return facts


def _print_report(report: BuildReport, out: Path) -> None:
    splits = ", ".join(f"{name} {count:,}" for name, count in report.samples.items())
    total = sum(report.samples.values())
    print(f"{out}: {total:,} samples ({splits}) in {report.shards:,} shards, {report.bytes / 1e6:,.1f} MB")
    if report.extra:
        print(f"{out}: {report.extra:,} rows of dense captions belong to no image here")
    if report.quarantined:
        lost = f"{report.quarantined:,} fault{'s' if report.quarantined > 1 else ''}"
        print(f"{out}: {lost}; the samples concerned were left out: {out / QUARANTINE}")
    for split in ("train", "val"):
        if split not in report.samples:
            use = "nothing to train on" if split == "train" else "training cannot choose its best checkpoint"
            meant = next((name for name in report.samples if name.lower() in _ALIKE[split]), "")
            rename = f"; {meant!r} is another: write {split!r} in the source" if meant else ""
            print(f"{out}: note: no split {split!r}: {use}{rename}")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = f"is a file; give its folder, {folder.parent}" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}")


def _verify(args: argparse.Namespace) -> int:
    _check_folder(args.folder)
    count = 0
    for fault in verify(args.folder, args.workers, decode=not args.no_decode):
        print(fault, flush=True)
        count += 1
    print(f"{args.folder}: {f'{count:,}' if count else 'no'} fault{'s' if count > 1 else ''}")
    return 1 if count else 0


def _stats(args: argparse.Namespace) -> None:
    _check_folder(args.folder)
    print(table(stats(args.folder)))


def _show(args: argparse.Namespace) -> None:
    _check_folder(args.folder)
    row = find(args.folder, args.key)
    print(describe(row))
    print(f"image      {save_image(args.folder, row, args.out)}")


_COMMANDS = {"build": _build, "index": _index, "verify": _verify, "stats": _stats, "show": _show}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 if `verify` found faults; 2 for an error, printed in one line; 130 after Ctrl-C.
    """
    args = arguments.parser().parse_args(argv)
    remedy = "; the same command with --resume goes on" if args.command == "build" else ""
    return run(lambda: _COMMANDS[args.command](args), interrupted=f"interrupted{remedy}")


def build_scenes(folder: Path, count: str, size: int) -> Path:
    """Builds a data set of drawn scenes in `folder`, for use by other commands. Returns `folder`.

    count: images in each split, such as "train=4000,val=500". size: width and height of an image in pixels.
    Raises ValueError if the build fails.
    """
    if main([*f"build --source scenes --count {count} --size {size} --out".split(), str(folder)]):
        raise ValueError(f"the scenes could not be built in {folder}: give --data")
    return folder
