"""The tuner's steps and choices; what needs a device is not here."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from d2s.kernels import descent, tune

pytest.importorskip("triton")

from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile, entry

START = Tile(rows=64, columns=64, depth=32, warps=4, stages=2)


def spec(name="a_x", columns=True):
    def constants(tile, width, half):
        return {"ROWS": tile.rows, "DEPTH": tile.depth} | ({"COLUMNS": tile.columns} if columns else {})

    return KernelSpec(name=name, kernel=None, pointers={}, scalars={}, constants=constants)


def test_steps_change_one_thing_that_matters():
    found = descent.steps(spec(), START, 512, False)
    differences = [{k for k, v in asdict(t).items() if v != asdict(START)[k]} for t in found]
    assert all(len(d) == 1 for d in differences)
    assert set().union(*differences) == {"rows", "columns", "warps", "stages"}
    assert len(found) == 8
    assert len(descent.steps(spec(columns=False), START, 512, False)) == 6


def test_steps_stay_within_bounds():
    lowest, highest = (Tile(**bounds) for bounds in (descent.LOWEST, descent.HIGHEST))
    for tile in (lowest, highest):
        for other in descent.steps(spec(), tile, 512, False):
            assert all(asdict(lowest)[k] <= v <= asdict(highest)[k] for k, v in asdict(other).items())


def test_depth_moves_for_all_kernels_of_an_op_at_once():
    specs = {name: spec(name) for name in ("a_x", "a_y")}
    state = dict.fromkeys(specs, START)
    for after in descent.moves(specs, state, 512, False):
        assert len({tile.depth for tile in after.values()}) == 1
    assert {t.depth for after in descent.moves(specs, state, 512, False) for t in after.values()} == {
        16,
        32,
        64,
    }


def test_descent_takes_what_gains_and_leaves_noise():
    specs = {"a_x": spec()}
    asked = []

    def measure(state):
        tile = state["a_x"]
        asked.append(tile)
        return (10 if tile.rows == 128 else 20) * (0.99 if tile.warps == 8 else 1) + abs(tile.stages - 3)

    def usable(states, state):
        return [s for s in states if s["a_x"].columns == state["a_x"].columns]

    best, fastest, first = descent.descend(
        {"a_x": START}, lambda s: descent.moves(specs, s, 512, False), usable, measure
    )
    assert best["a_x"] == replace(START, rows=128, stages=3)
    assert (fastest, first) == (10, 21)
    assert all(tile.columns == 64 for tile in asked)


def test_descent_stays_where_nothing_is_usable():
    best, fastest, first = descent.descend(
        {"a_x": START}, lambda s: iter([s]), lambda states, state: [], lambda s: 7.0
    )
    assert best == {"a_x": START}
    assert fastest == first == 7


def test_kernels_belong_to_the_op_whose_name_begins_theirs():
    ops = ("hinge", "hinge_max", "gpo")
    assert tune.op_of("hinge_max_sweep", ops) == "hinge_max"
    assert tune.op_of("hinge_sum", ops) == "hinge"
    assert tune.op_of("ranks", ops) is None


def test_every_tunable_kernel_has_a_benchmark():
    groups = tune.groups()
    assert groups
    assert all(
        tune.op_of(kernel, tuple(groups)) == op for op, kernels in groups.items() for kernel in kernels
    )


def test_table_is_written_sorted_and_read_as_it_is_committed(tmp_path):
    table = {entry("b", (9, 0), 512, True): asdict(START), entry("a", (9, 0), 100, False): asdict(START)}
    path = tmp_path / "tiles.json"
    tune.write(table, path)
    assert json.loads(path.read_text(encoding="utf-8")) == table
    assert path.read_text(encoding="utf-8").splitlines()[1].startswith('  "a/sm_90/128/float"')
    tune.write({}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {}


def run(*options):
    command = [sys.executable, "-m", "d2s.kernels.tune", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is here")
def test_without_a_device_it_says_so_in_one_line():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


def test_dry_run_lists_the_first_steps():
    done = run("--dry-run", "--width", "512")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("hinge_max D=512 half: from hinge_max_sweep") for line in lines)
    assert int(lines[-1].split()[0]) == sum(line.startswith("  ") for line in lines) > 10
