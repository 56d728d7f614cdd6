"""`make gpu` without a device: a stand-in for Python writes down what it is called with, and fails where told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "kernels/gpu.sh"
STAND_IN = """#!/bin/sh
echo "$D2S_TEST_DEVICE $*" >> "$CALLS"
echo "said by $2"
for word in $FAILING; do case "$*" in *"$word"*) exit 3 ;; esac; done
"""
# What a make that runs these tests, perhaps `make gpu GPU_PYTHON=...`, hands down to the one under test; and nproc
# counts no more processors than OpenMP may use.
FOREIGN = ("D2S_TEST_DEVICE", "GPU_", "MAKE", "MFLAGS", "OMP_")
STEPS = ["tests", "tune", "compile", "retest", "bench"]
# What each step calls, but for the check, which comes first, and the question for pytest.
CALLED = {
    "tests": ["cuda -m pytest tests/kernels -q"],
    "tune": [" -m d2s.kernels.tune --minutes 20"],
    "compile": [f" -m d2s.kernels.compile --jobs {len(os.sched_getaffinity(0))} --write"],
    "retest": ["cuda -m pytest tests/kernels -q"],
    "bench": [" -m d2s.kernels.bench --device cuda", " -m d2s.kernels.results"],
}


@pytest.fixture
def run(tmp_path):
    """Runs a command with the stand-in; gives (exit status, its last line, what was called)."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN, encoding="utf-8")
    python.chmod(0o755)

    def run(*command, failing=""):
        own = {"GPU_PYTHON": str(python), "GPU_RESULTS": str(tmp_path / "results")}
        own |= {"CALLS": str(calls), "FAILING": failing}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment | own, capture_output=True, text=True, check=False
        )
        called = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1], called

    return run


def expected(*steps):
    return [" -", " -c import pytest", *(call for step in steps for call in CALLED[step])]


def test_make_gpu_does_every_step_in_order_and_writes_down_what_each_said(run, tmp_path):
    status, last, called = run("make", "-s", "gpu")
    assert status == 0
    assert called == expected(*STEPS)
    assert last.endswith("left out: nothing; failed: nothing")
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert written == {f"gpu-{step}.txt" for step in STEPS} | {"gpu-tiles.json"}
    assert (tmp_path / "results/gpu-bench.txt").read_text(encoding="utf-8").splitlines() == [
        "said by d2s.kernels.bench",
        "said by d2s.kernels.results",
    ]


@pytest.mark.parametrize(
    "failing, named",
    [
        ("tests/kernels", "tests retest"),
        ("tune", "tune"),
        ("compile bench", "compile bench"),
        ("kernels.results", "bench"),
        ("-m", "tests tune compile retest bench"),
    ],
)
def test_a_step_that_fails_is_named_and_keeps_no_other_back(run, failing, named):
    status, last, called = run(SCRIPT, *STEPS, failing=failing)
    assert status == 1
    assert called == expected(*STEPS)
    assert last.endswith(f"; failed: {named}")


@pytest.mark.parametrize("step", STEPS)
def test_each_step_alone(run, step):
    status, last, called = run("make", "-s", f"gpu-{step}")
    assert (status, called) == (0, expected(step))
    assert last.startswith(f"gpu: {step} ")


def test_some_steps(run):
    assert run("make", "-s", "gpu", "GPU_STEPS=tune compile")[2] == expected("tune", "compile")


def test_without_pytest_the_rest_is_done_and_the_last_line_says_so(run):
    status, last, called = run(SCRIPT, *STEPS, failing="import")
    assert status == 0
    assert called == expected("tune", "compile", "bench")
    assert "left out: tests retest; failed: nothing" in last


def test_nothing_is_begun_where_a_step_is_unknown_or_the_machine_will_not_do(run):
    assert run(SCRIPT, "tests", "tuning")[::2] == (2, [])
    # The check is read from standard input.
    status, _, called = run(SCRIPT, *STEPS, failing="-")
    assert (status, called) == (2, [" -"])


def test_the_check_says_in_one_line_that_there_is_no_device(tmp_path):
    own = {"GPU_PYTHON": sys.executable, "GPU_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [SCRIPT, "tests"], cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "gpu: no CUDA device\n")
    assert not [*tmp_path.iterdir()]
