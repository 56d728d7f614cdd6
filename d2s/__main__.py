"""The console command `d2s COMMAND ...`: each command is the module of that name, imported when it is asked for."""

import sys
from importlib import import_module

_COMMANDS = {
    "shard": "build, index, verify and look at data sets",
    "train": "train a stage of a recipe",
    "evaluate": "recall and other measures of a trained model",
    "ablate": "the paper's ablation with its controls",
    "report": "one self-contained page on a run",
    "plan": "memory, traffic and time that a training will take",
    "drill": "kill a training again and again, and compare it with one left in peace",
}
_MODULES = {
    "evaluate": "d2s.evaluate.evaluation",
    "report": "d2s.report.command",
    "plan": "d2s.plan.command",
    "drill": "d2s.drill.command",
}


def main(argv: list[str] | None = None) -> int:
    """Hands the arguments after the command to that command. Returns its exit code, 2 for an unknown one."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: d2s COMMAND ...\n")
        print("\n".join(f"  {name:<10}{text}" for name, text in _COMMANDS.items()))
        return 0 if arguments else 2
    name = arguments[0]
    if name not in _COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    # What a command calls itself in its help texts.
    sys.argv[0] = f"d2s {name}"
    return import_module(_MODULES.get(name, f"d2s.{name}")).main(arguments[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main())
