"""Runs folders of small inputs, and prints what each command says beside what it should say.

    python tests/run_cases.py FOLDER [NAME ...]

Each folder holds input files, `cmd` (one line of shell) and `expected` (in words: a person compares). Every command
runs in a copy of its folder, with this checkout on the path.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240


def run(case: Path) -> tuple[int | str, str]:
    """Exit code (or "no end") and output of a case's command."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / case.name
        shutil.copytree(case, folder)
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        env |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        env |= {"HF_HUB_OFFLINE": "1", "D2S_TIMEOUT": "1", "OMP_NUM_THREADS": "1"}
        command = ["bash", "-c", (folder / "cmd").read_text()]
        try:
            done = subprocess.run(
                command, cwd=folder, env=env, timeout=LIMIT_S, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            return "no end", (late.stdout or b"").decode(errors="replace")
        return done.returncode, done.stdout


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for case in sorted(
        path.parent for path in folder.glob("*/cmd") if not names or path.parent.name in names
    ):
        code, output = run(case)
        print(f"=== {case.name}\ncommand:  {(case / 'cmd').read_text().strip()}")
        print(
            f"expected: {(case / 'expected').read_text().strip()}\nexit code {code}\n{output.strip()[-1500:]}\n",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
