"""Stand-ins for SLURM's programs, for what needs no cluster: each writes down how it was called."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Programs:
    """A folder of programs that comes first on the PATH, and what was called there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    def add(self, name: str, script: str = "") -> None:
        """A program that runs these lines of bash."""
        path = self.folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.folder}/calls\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a program so far."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def clone(folder: Path) -> Path:
    """A folder to call sbatch in, with launchers of its own, to which a site.env may be added."""
    (folder / "launchers").mkdir(parents=True)
    for path in (ROOT / "launchers").iterdir():
        if path.suffix in (".slurm", ".sh", ".py"):
            (folder / "launchers" / path.name).symlink_to(path)
    return folder
