"""Implements the command `python -m d2s.evaluate --model DIR --data DIR --split test [--json FILE]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from d2s.common import command
from d2s.common.command import user_path
from d2s.common.files import write_json
from d2s.evaluate.evaluation import choose_folds, evaluate_model
from d2s.evaluate.inputs import choose_device, data_config_of, load_model
from d2s.shards.read.index import ShardIndex


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, or 2 after an error. An error is printed in one line."""
    parser = command.Parser(prog="python -m d2s.evaluate", description="Evaluate a model on a split.")
    parser.add_argument("--model", type=user_path, required=True, help="model folder, such as runs/NAME/best")
    parser.add_argument("--data", type=user_path, required=True, help="data set made by python -m d2s.shard")
    parser.add_argument("--split", default="test", help="split of the data set (default: test)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument(
        "--batch-size", type=command.positive, default=128, help="images or captions at a time (128)"
    )
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (default: cuda if there)")
    parser.add_argument(
        "--folds",
        type=int,
        help="folds to average over, 0 for none (default: of 1,000 images); they are cut along ascending image"
        " ids, not in the order of the Karpathy file, so COCO 1K differs a little from that order's",
    )
    parser.add_argument("--no-dense", action="store_true", help="leave dense captions out")
    arguments = parser.parse_args(argv)
    return command.run(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> None:
    """Checks all arguments before any long work. Then evaluates, prints tables, and writes the JSON file."""
    if arguments.json is not None:
        _check_output(arguments.json)
    device = choose_device(arguments.device)
    index = ShardIndex.open(arguments.data)
    choose_folds(len(index.rows(arguments.split)), arguments.folds)
    model = load_model(arguments.model).to(device)
    result = evaluate_model(
        model,
        index,
        arguments.split,
        data_config=data_config_of(arguments.model, model),
        batch_size=arguments.batch_size,
        dense=not arguments.no_dense,
        folds=arguments.folds,
    )
    # The table needs 120 columns; rich assumes 80 if the output goes to a file.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(result.renderable())
    if arguments.json is not None:
        names = {"model": str(arguments.model), "data": str(arguments.data)}
        write_json(arguments.json, names | result.to_dict())


def _check_output(path: Path) -> None:
    """Raises ValueError if no file can be written at `path`."""
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json {path}: the folder {path.parent} is not writable: choose another")
