"""`python -m d2s.kernels.tune`: measures tiles on the device at hand and writes the table to commit.

Kernels whose ops share one are tuned together, for each bucket of D and size of type. It starts from what is in use
and takes one step at a time: half or double of one kernel's rows, columns, depth or warps, one stage more or less,
or another device's default. A step is measured if what it builds neither spills nor exceeds the shared memory, and
taken if the ops that use it are faster by more than NOISE. Then every op is run with what was found, and a tile with
which any fails is left out. Training never times anything: it reads the table.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2s.common.command import positive
from d2s.kernels.build.descent import ROUNDS, State, descend, settle
from d2s.kernels.build.parts import TOGETHER, TOKENS, Part, groups, guess, text, usable
from d2s.kernels.files import write_whole

if TYPE_CHECKING:
    from d2s.kernels.build.workers import Workers

TABLE = Path(__file__).parent / "fused" / "tiles.json"
# The widths that matter most first: a run that ends early has them.
WIDTHS = (512, 256, 1152, 128, 64)


def parts(arguments: argparse.Namespace, capability: tuple[int, int]) -> list[Part]:
    """What is searched, in this order."""
    return [
        Part(
            group=group,
            width=TOKENS.get(width, width) if "gpo" in group.ops else width,
            half=half,
            capability=capability,
        )
        for width in arguments.width or WIDTHS
        for half in (True, False)
        for group in groups(arguments.kernel)
    ]


def write(table: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """The table, one entry a line, replaced at once."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(dict(table[key]))}" for key in sorted(table))
    write_whole(path, f"{{\n{lines}\n}}\n" if lines else "{}\n")


def enter(table: dict[str, dict[str, int]], best: State, part: Part) -> None:
    """Replaces a part's entries; what the device takes by default needs none."""
    from d2s.kernels.fused.tiles import entry

    defaults = part.start({})
    for name, tile in best.items():
        key = entry(name, part.capability, part.width, part.half)
        table.pop(key, None)
        if tile != defaults[name]:
            table[key] = dataclasses.asdict(tile)


def search(
    part: Part, table: dict[str, dict[str, int]], workers: "Workers", over: Callable[[], bool]
) -> None:
    """Searches a part and enters what it found; says how much faster that is and what was left out."""
    from d2s.kernels.build import trials

    at = (part.width, part.half, part.capability)
    defaults = part.start({})
    best, times, first = descend(
        part.start(table),
        part.around,
        lambda states, state: usable(states, state, part, workers),
        trials.stopwatch(part.group.ops, *at),
        part.group.uses,
        over,
    )
    kept, left = settle(defaults, best, trials.judge(part.group.ops, *at, defaults), TOGETHER)
    gained = ", ".join(f"{op} {first[op]:.3f} -> {times[op]:.3f} ms" for op in times)
    print(f"{part}: {gained}: {text(kept)}", flush=True)
    for names, wrong in left.items():
        print(f"tune: {part}: {names}: left out: {'; '.join(wrong)}", file=sys.stderr, flush=True)
    enter(table, kept, part)
    # What follows is measured with what is written, not with the last trial.
    trials.use(kept, part.capability, part.width, part.half)


def tune(todo: Sequence[Part], arguments: argparse.Namespace) -> int:
    """Searches part by part and writes after each, so that an interrupted run leaves what it found."""
    from d2s.kernels.build.trials import Lost

    finished: list[Part] = []
    try:
        _every(todo, finished, arguments)
        code, why = 0, "" if len(finished) == len(todo) else f"{arguments.minutes:g} minutes are over"
    except KeyboardInterrupt:
        code, why = 130, "interrupted"
    except Lost as error:
        code, why = 1, f"{error}; start again, with --kernel or --width to pass this by"
    if why:
        print(
            f"tune: {why}; the last {len(todo) - len(finished)} searches keep what they had", file=sys.stderr
        )
    print(f"written: {len(finished)} of {len(todo)} searches, {arguments.out}")
    return code


def _every(todo: Sequence[Part], finished: list[Part], arguments: argparse.Namespace) -> None:
    """Searches until the minutes are over; finished grows with what is written."""
    from d2s.kernels.build.workers import Workers
    from d2s.kernels.fused.tiles import tuned_tiles

    table = {key: dict(tile) for key, tile in tuned_tiles().items()}
    guesses = [guess(part, arguments.jobs) for part in todo]
    announce(todo, guesses, arguments.minutes)
    begun = time.monotonic()

    def passed() -> float:
        return (time.monotonic() - begun) / 60

    with Workers(arguments.jobs) as workers:
        for number, part in enumerate(todo, 1):
            if passed() > arguments.minutes:
                return
            search(part, table, workers, lambda: passed() > arguments.minutes)
            write(table, arguments.out)
            finished.append(part)
            before, after = (
                sum(seconds for _, seconds in some) for some in (guesses[:number], guesses[number:])
            )
            left = passed() * after / before if before else 0
            said = f"{number} of {len(todo)} searches written after {passed():.1f} min, about {left:.0f} more to go"
            print(f"tune: {said}", file=sys.stderr, flush=True)


def announce(todo: Sequence[Part], guesses: Sequence[tuple[int, float]], minutes: float) -> None:
    """Says before anything is measured how much there is."""
    count, least = sum(n for n, _ in guesses), sum(seconds for _, seconds in guesses) / 60
    print(
        f"tune: {len(todo)} searches, {count} candidates, about {least:.0f} min, and up to {ROUNDS} times that where"
        f" they gain; the limit is {minutes:g} min, the rest keeps what it has",
        file=sys.stderr,
        flush=True,
    )


def _dry_run(todo: Sequence[Part], processes: int) -> int:
    count, seconds = 0, 0.0
    for part in todo:
        start = part.start({})
        print(f"{part}: from {text(start)}")
        for state in part.around(start):
            print(f"  {text({name: tile for name, tile in state.items() if tile != start[name]})}")
        number, spent = guess(part, processes)
        count, seconds = count + number, seconds + spent
    print(f"{count} first steps, about {seconds / 60:.0f} min with {processes} processes")
    return 0


def _capability(arch: int | None) -> tuple[int, int]:
    """That of the option, else of the device, else what the defaults take."""
    import torch

    if arch is not None:
        return divmod(arch, 10)
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m d2s.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", help="these kernels alone, and those bound to them")
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append", help="these D alone")
    parser.add_argument("--minutes", type=_minutes, default=20, help="try nothing more after that")
    parser.add_argument("--jobs", type=positive, default=_processors(), help="processes that build")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--dry-run", action="store_true", help="list the first steps from the defaults")
    parser.add_argument("--arch", type=int, help="with --dry-run: of this device, e.g. 90")
    return parser


def _processors() -> int:
    """Those that this process may use, but each building process takes some hundred MiB."""
    return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def main(argv: list[str] | None = None) -> int:
    """0; 1 where the device broke down, 2 where there is none or the command is wrong, 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        import torch
        import triton  # noqa: F401

        todo = parts(arguments, _capability(arguments.arch if arguments.dry_run else None))
    except (ImportError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        return _dry_run(todo, arguments.jobs)
    if not torch.cuda.is_available():
        print("tune: no CUDA device here; --dry-run lists what would be measured", file=sys.stderr)
        return 2
    from d2s.kernels.operators.dispatch import implementation

    if implementation("cuda") != "triton":
        print(
            f"tune: D2S_KERNELS={implementation('cuda')} launches no kernel that has tiles", file=sys.stderr
        )
        return 2
    # Who ends the process politely gets what an interruption gets.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return tune(todo, arguments)


if __name__ == "__main__":
    sys.exit(main())
