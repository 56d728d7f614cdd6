"""Every shell script passes shellcheck, which the `test` extra installs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = [*sorted((ROOT / "launchers").glob("*.slurm")), ROOT / "launchers/job.sh"]


@pytest.mark.parametrize(
    "path", [*LAUNCHERS, ROOT / "kernels/gpu.sh", ROOT / ".ci/run"], ids=lambda path: path.name
)
def test_shellcheck(path: Path) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), "-x", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
