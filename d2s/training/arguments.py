"""Parses the options of `d2s/train.py` that are not fields of the configuration."""

import argparse
import os

from d2s.common.command import user_path
from d2s.training.recipes import RECIPES

EPILOG = """\
Any field of the configuration can be overridden by its dotted name, as in --optim.lr 1e-4 --batch_size 256;
`RECIPE --help` lists all of them with their meaning. Examples:
  deepspeed d2s/train.py scenes_small_pretrain --data data/scenes --run runs/scenes-pretrain
  deepspeed d2s/train.py scenes_small_finetune --init runs/scenes-pretrain --run runs/scenes-finetune
"""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line. Returns its options, and the remaining arguments, which override configuration fields.

    Raises ValueError if the command line names no recipe.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train one stage of D2S-VSE.",
        epilog=EPILOG + "\nrecipes:\n" + "".join(f"  {name}\n" for name in RECIPES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a named configuration, listed below")
    home = os.path.expanduser
    add("--data", metavar="DIR", type=home, help="data set made by `python -m d2s.shard build`, or a URL pattern of"
        " tars; by default that of --init or of the resumed run")  # fmt: skip
    add(
        "--val-data",
        metavar="DIR",
        type=home,
        help="data set to validate on, where --data is a stream of tars",
    )
    add("--run", metavar="DIR", type=user_path, help="folder of the run; everything is written there")
    add("--init", metavar="DIR", type=user_path, help="stage-1 run or model folder to start from")
    add("--resume", action="store_true", help="go on from the run's newest complete checkpoint, or start if there"
        " is none")  # fmt: skip
    add("--dry-run", action="store_true", help="print configuration, parameters, steps and memory, and exit")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add("-h", "--help", action="store_true", help="show this help; after RECIPE, all its fields")
    options, overrides = parser.parse_known_args(arguments)
    if options.recipe is None:
        if options.help:
            parser.print_help()
            raise SystemExit(0)
        raise ValueError("no recipe given: name one of those that --help lists")
    if options.help:
        overrides.append("--help")
    return options, overrides
