"""Imports a checkpoint of the authors' release: `python -m d2s.compat CKPT --out DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from d2s.checkpoint.export import write_model
from d2s.common import command
from d2s.common.command import user_path
from d2s.model.release_importer import TOKENIZER, convert


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, or 2 after an error. An error is printed in one line."""
    parser = command.Parser(prog="python -m d2s.compat", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", type=user_path, help="the release's model_best.pth")
    parser.add_argument(
        "--out", metavar="DIR", type=user_path, required=True, help="new folder for the model"
    )
    parser.add_argument("--tokenizer", default=TOKENIZER, metavar="NAME_OR_DIR")
    parser.add_argument(
        "--image-size", type=command.positive, metavar="PIXELS", help="default: img_res in CKPT"
    )
    parser.add_argument("--ours", action="store_true", help="leave the compat switches off")
    options = parser.parse_args(argv)
    return command.run(lambda: _import(options))


def _import(options: argparse.Namespace) -> None:
    """Converts the checkpoint and writes the model atomically.

    Raises ValueError if an option or the checkpoint is invalid, and OSError if the model cannot be written.
    """
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {str(out)!r}: exists and is not an empty folder, name a new one")
    model = convert(
        options.checkpoint, tokenizer=options.tokenizer, size=options.image_size, ours=options.ours
    )
    write_model(out, model)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} weights, {options.checkpoint}")


if __name__ == "__main__":
    raise SystemExit(main())
