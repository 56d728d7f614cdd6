"""The drill: what it draws, what it sees of a run, what it compares, and a small one with real workers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2s.drill import command as drill
from d2s.drill.compare import compare
from d2s.drill.kills import Kill, draw_kills, target_step
from d2s.drill.options import check
from d2s.drill.progress import incomplete_checkpoints
from d2s.drill.victims import kill, workers_of

ROOT = Path(__file__).resolve().parents[3]


def make_run(folder: Path, losses: dict[int, float], weight: float = 1.0) -> Path:
    (folder / "last").mkdir(parents=True)
    rows = [
        {"kind": "train", "step": s, "loss": v, "grad_norm": 1.0, "seconds": 0.5} for s, v in losses.items()
    ]
    rows.append({"kind": "val", "step": 2, "rsum": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file({"a": torch.tensor([weight, 2.0]), "b": torch.zeros(3)}, folder / "last" / "model.safetensors")
    return folder


def test_equal_runs_are_bit_equal(tmp_path: Path) -> None:
    a, b = (make_run(tmp_path / name, {1: 0.5, 2: float("nan")}) for name in "ab")
    found = compare(a, b)
    assert found.bit_equal
    assert found.within(0)
    assert (found.steps, found.loss, found.weights) == (2, 0, 0)


def test_a_difference_in_the_last_bit_is_seen(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {1: 0.5, 2: 0.25})
    loss = compare(a, make_run(tmp_path / "b", {1: 0.5, 2: 0.25 * (1 + 2**-50)}))
    assert loss.unlike == ("step 2 loss",)
    assert loss.within(1e-6)
    assert loss.loss_step == 2
    weight = compare(a, make_run(tmp_path / "c", {1: 0.5, 2: 0.25}, weight=1 + 2**-20))
    assert weight.unlike == ("a",)
    assert weight.weights == pytest.approx(2**-20 / 5**0.5)
    # Zeros of either sign are equal numbers, and not the same bits.
    save_file(
        {"a": torch.tensor([1.0, 2.0]), "b": -torch.zeros(3)}, tmp_path / "c" / "last" / "model.safetensors"
    )
    assert compare(a, tmp_path / "c").unlike == ("b",)


def test_a_missing_step_and_other_weights_are_no_equality(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {1: 0.5, 2: 0.25})
    short = compare(a, make_run(tmp_path / "b", {1: 0.5}))
    assert short.missing == (2,)
    assert not short.bit_equal
    assert not short.within(1.0)
    assert not compare(a, make_run(tmp_path / "c", {1: 0.5, 2: float("inf")})).within(1e9)
    assert not compare(a, make_run(tmp_path / "d", {1: 0.5, 2: 0.25}, weight=float("nan"))).within(1e9)


def test_of_a_steps_rows_the_last_one_counts(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", {1: 0.5, 2: 0.25}), make_run(tmp_path / "b", {1: 0.5, 2: 0.25})
    text = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text('{"kind": "train", "step": 2, "loss": 9}\n' + text)
    assert compare(a, b).bit_equal


def test_compare_by_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = make_run(tmp_path / "a", {1: 0.5}), make_run(tmp_path / "b", {1: 0.6})
    assert drill.main(["--compare", str(a), str(a)]) == 0
    assert capsys.readouterr().out.endswith("bit-equal: yes\n")
    assert drill.main(["--compare", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "largest difference 1.7e-01 of a loss (step 1)" in out
    assert "within tolerance 1e-04: no\nbit-equal: no\n" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--compare {empty} {empty}", "holds no row of training"),
        ("--out {full}", "is not empty: choose another folder"),
        ("--kill 3", "no field 'kill'"),
        ("--recipe scenes_smal", "did you mean"),
        ("--workers 2,x", "'2,x' is not a number of workers"),
        ("--kills 5 --steps 9", "--steps 9 is too short for 5 kills"),
        ("--workers 0", "'0' is not a number of workers"),
        ("--kills -1", "--kills -1: give 0 or more"),
        ("--steps 0", "--steps 0: give 1 or more"),
        ("--save-steps 0", "--save-steps 0: give 1 or more"),
        ("--patience inf", "--patience inf: give a finite number"),
        ("--max_steps 99", "give --steps 99 instead"),
        ("--workers 2,3 --batch_size 8", "batch_size 8 does not divide among 3 workers: set it to 6 or 9"),
        ("--launcher 'torchrun", "No closing quotation; quote it as for a shell"),
        ("--data nowhere", "--data nowhere is no folder"),
        ("--out {full}/metrics.jsonl", "is no folder: choose another name"),
        ("--kills 1 --against nowhere", "--against: nowhere holds no row of training"),
        ("--kills 1 --against {part}", "is not finished (no last/model.safetensors): end it with --resume"),
        ("--kills 1 --against {full}", "up to step 1, where this drill has 30 up to step 30: give --steps 1"),
        ("--kills 1 --against {thin}", "has rows of 29 steps up to step 30, where this drill has 30"),
        ("--attach --run {empty} --against {part}", "is not finished (no last/model.safetensors)"),
        ("--attach", "--attach and --run go together"),
        ("--attach --run {full}", "is finished"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    make_run(tmp_path / "full", {1: 0.5})
    make_run(tmp_path / "thin", dict.fromkeys(range(2, 31), 0.5))
    (make_run(tmp_path / "part", {1: 0.5}) / "last" / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    words = arguments.format(**{name: tmp_path / name for name in ("full", "thin", "part", "empty")}).split()
    try:
        code = drill.main(words)
    except SystemExit as left:
        code = left.code
    assert code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_what_to_compare_with_is_looked_at_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dict.fromkeys(range(1, 31), 0.5))
    check(*drill.parser().parse_known_args(["--kills", "1", "--against", str(run)]))
    every = make_run(tmp_path / "every", dict.fromkeys((7, 14, 21, 28, 30), 0.5))
    check(*drill.parser().parse_known_args(["--kills", "1", "--against", str(every), "--log.every", "7"]))


def test_a_seed_names_a_drill() -> None:
    assert draw_kills(20, 0) == draw_kills(20, 0)
    assert draw_kills(20, 0) != draw_kills(20, 1)
    kills = draw_kills(200, 3)
    assert Counter(kill.moment for kill in kills[:20]) == {"step": 8, "save": 8, "start": 4}
    assert 60 < sum(kill.everyone for kill in kills) < 140


def test_targets_leave_room_for_the_kills_to_come() -> None:
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(1, 30)
        last = 3 * count + rng.randint(0, 100)
        seen = 0
        for left in range(count, 0, -1):
            one = Kill(moment="step", everyone=True, where=rng.random(), delay=0, who=0)
            target = target_step(one, seen, last, left)
            assert seen < target <= last
            seen = target + rng.randint(0, 1)  # a step more before the signal comes


def test_workers_are_found_among_the_processes(tmp_path: Path) -> None:
    """A worker has a rank; its child, and the worker of another run, are none of ours."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, time\n"
        "if '--child' not in sys.argv:\n"
        "    import subprocess; subprocess.Popen([sys.executable, *sys.argv, '--child'])\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    run, other = tmp_path / "run", tmp_path / "other"
    started = []
    try:
        for folder, rank in ((run, "1"), (run, "0"), (other, "0")):
            started.append(
                subprocess.Popen(
                    [sys.executable, str(script), "--run", os.path.relpath(folder, tmp_path)],
                    cwd=tmp_path, env={**os.environ, "RANK": rank}, stdout=subprocess.PIPE, start_new_session=True,
                )
            )  # fmt: skip
        for process in started:  # the child speaks, too
            assert process.stdout.readline() == process.stdout.readline() == b"up\n"
        assert workers_of(run) == [started[1].pid, started[0].pid]
        assert kill([started[0].pid]) == 1
        assert started[0].wait(20) == -signal.SIGKILL
        assert workers_of(other) == [started[2].pid]
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def test_a_write_under_a_hidden_name_is_seen(tmp_path: Path) -> None:
    assert incomplete_checkpoints(tmp_path) == {}
    left = tmp_path / "checkpoints" / ".step-00000005"
    left.mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    before = incomplete_checkpoints(tmp_path)
    assert list(before) == [".step-00000005"]
    time.sleep(0.02)
    (left / "engine").mkdir()
    assert incomplete_checkpoints(tmp_path).items() - before.items()


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_a_small_drill_survives(tmp_path: Path) -> None:
    out = tmp_path / "drill"
    command = "-m d2s.drill --workers 2 --kills 2 --seed 1 --steps 12".split()
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)],
        capture_output=True, text=True, timeout=500, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "bit-equal: yes"
    assert "kills               2 of 2" in done.stdout
    # What the drill says is what a comparison of what it left says.
    assert compare(out / "drilled", out / "reference").bit_equal


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_training_that_fails_by_itself_is_told(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    arguments = ["--workers", "1", "--kills", "1", "--data", str(data), "--out", str(tmp_path / "out")]
    assert drill.main(arguments) == 1
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "failed without a kill" in error[0]
    assert "manifest.parquet" in error[0]
