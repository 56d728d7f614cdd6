"""Implements the console command `d2s COMMAND ...`. A command's module is imported when the command runs."""

import sys
from importlib import import_module

# Maps a command to its module and to its line in the help text.
COMMANDS = {
    "shard": ("d2s.shards.cli", "build, index, verify and inspect data sets"),
    "train": ("d2s.train", "train a stage of a recipe"),
    "evaluate": ("d2s.evaluate.command", "measure recall and capacity of a trained model"),
    "report": ("d2s.report.command", "write a page on a run"),
    "plan": ("d2s.plan.command", "estimate memory, traffic and time of a training"),
    "ablate": ("d2s.ablate", "run the paper's ablation with its controls"),
    "drill": ("d2s.drill.command", "kill a training repeatedly and compare it with an undisturbed one"),
    "compat": ("d2s.compat", "import a checkpoint of the authors' release"),
    "bench": ("d2s.bench", "compare the speed of loading and pooling with the usual way"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command with its arguments. Returns the command's exit code, or 2 if COMMAND is unknown."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: d2s COMMAND ...\n")
        print("\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()))
        return 0 if arguments else 2
    name = arguments[0]
    if name not in COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"d2s {name}"  # argparse shows this name in its usage line
    return import_module(COMMANDS[name][0]).main(arguments[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main())
