"""The tuner's steps and choices; what needs a device is not here."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from d2s.kernels import tune
from d2s.kernels.build import builds, descent

pytest.importorskip("triton")

from d2s.kernels.build import parts, trials, workers
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile, default_tile, entry, tuned_tiles

START = Tile(rows=64, columns=64, depth=32, warps=4, stages=2)
H100 = (9, 0)


def spec(name="a_x", columns=True):
    def constants(tile, width, half):
        return {"ROWS": tile.rows, "DEPTH": tile.depth} | ({"COLUMNS": tile.columns} if columns else {})

    return KernelSpec(name=name, kernel=None, pointers={}, scalars={}, constants=constants)


def part(op, width=512, half=True, capability=H100):
    (group,) = (g for g in parts.groups() if op in g.ops)
    return parts.Part(group=group, width=width, half=half, capability=capability)


def test_steps_change_one_thing_that_matters():
    found = descent.steps(spec(), START, 512, False)
    differences = [{k for k, v in asdict(t).items() if v != asdict(START)[k]} for t in found]
    assert all(len(d) == 1 for d in differences)
    assert set().union(*differences) == {"rows", "columns", "depth", "warps", "stages"}
    assert len(found) == 10
    assert len(descent.steps(spec(columns=False), START, 512, False)) == 8
    assert all(t.depth == 32 for t in descent.steps(spec(), START, 512, False, depth=False))


def test_steps_stay_within_bounds():
    lowest, highest = (Tile(**bounds) for bounds in (descent.LOWEST, descent.HIGHEST))
    for tile in (lowest, highest):
        for other in descent.steps(spec(), tile, 512, False):
            assert all(asdict(lowest)[k] <= v <= asdict(highest)[k] for k, v in asdict(other).items())


def test_depth_moves_at_once_for_kernels_that_compare_their_sums():
    specs = {name: spec(name) for name in ("a_x", "a_y", "b")}
    state = dict.fromkeys(specs, START)
    found = list(descent.moves(specs, state, 512, False, ordered=("a_x", "a_y")))
    assert all(after["a_x"].depth == after["a_y"].depth for after in found)
    assert {after["a_x"].depth for after in found} == {after["b"].depth for after in found} == {16, 32, 64}


def test_descent_takes_what_gains_and_leaves_noise():
    specs = {"a_x": spec()}
    asked = []

    def measure(state, ops):
        tile = state["a_x"]
        asked.append(tile)
        return {
            "a": (10 if tile.rows == 128 else 20) * (0.99 if tile.warps == 8 else 1) + abs(tile.stages - 3)
        }

    def usable(states, state):
        return [s for s in states if s["a_x"].columns == state["a_x"].columns]

    best, times, first = descent.descend(
        {"a_x": START}, lambda s: descent.moves(specs, s, 512, False), usable, measure, {"a_x": ["a"]}
    )
    assert best["a_x"] == replace(START, rows=128, stages=3)
    assert (times, first) == ({"a": 10}, {"a": 21})
    assert all(tile.columns == 64 for tile in asked)


def test_a_shared_kernel_is_judged_by_all_its_ops_and_another_by_its_own():
    """A step that is good for one op and fails another is none; one's own small gain drowns in no other's time."""
    specs = {name: spec(name) for name in ("a_x", "shared")}
    uses = {"a_x": ("a",), "shared": ("a", "b")}
    asked = []

    def measure(state, ops):
        asked.append(tuple(ops))
        wide = state["shared"].rows > 64
        times = {"a": (5 if wide else 10) - (state["a_x"].warps == 8), "b": float("inf") if wide else 1000}
        return {op: times[op] for op in ops}

    best, times, first = descent.descend(
        dict.fromkeys(specs, START),
        lambda s: descent.moves(specs, s, 512, False),
        lambda states, state: states,
        measure,
        uses,
    )
    assert best == {"a_x": replace(START, warps=8), "shared": START}
    assert (times, first) == ({"a": 9, "b": 1000}, {"a": 10, "b": 1000})
    assert asked[0] == ("a", "b")
    assert ("a",) in asked


@pytest.mark.parametrize("over, usable", [(lambda: False, []), (lambda: True, [{"a_x": START}])])
def test_descent_stays_where_nothing_is_usable_or_the_time_is_over(over, usable):
    best, times, first = descent.descend(
        {"a_x": START}, lambda s: iter([s]), lambda *_: usable, lambda *_: {"a": 7.0}, {"a_x": ["a"]}, over
    )
    assert best == {"a_x": START}
    assert times == first == {"a": 7}


def test_a_tile_with_which_an_op_fails_is_left_out_and_those_that_go_together_with_it():
    wide = replace(START, depth=64)
    best = {"x": wide, "y": wide, "z": wide}

    def wrong(state):
        return ["fails"] if state["y"] == wide else []

    defaults = dict.fromkeys(best, START)
    assert descent.settle(defaults, best, wrong) == ({**best, "y": START}, {"y": ["fails"]})
    kept, left = descent.settle(defaults, best, wrong, ordered=("x", "y"))
    assert kept == {"x": START, "y": START, "z": wide}
    assert left == {"x, y": ["fails"]}
    assert descent.settle(defaults, best, lambda state: []) == (best, {})


def test_kernels_belong_to_the_op_whose_name_begins_theirs():
    ops = ("hinge", "hinge_max", "gpo")
    assert parts.users("hinge_max_sweep", ops) == ("hinge_max",)
    assert parts.users("hinge_sum", ops) == ("hinge",)
    assert parts.users("ranks", ops) == ()


def test_every_tunable_kernel_is_in_one_group_with_all_who_use_it():
    found = parts.groups()
    names = [name for group in found for name in group.specs]
    assert len(names) == len({*names}) > 8
    assert len({op for group in found for op in group.ops}) == sum(len(group.ops) for group in found)
    assert part("info_nce").group.ops == ["hinge_sum", "info_nce", "sigmoid"]
    (only,) = parts.groups(["positives"])
    assert {*only.specs} == {*parts.TOGETHER}
    with pytest.raises(ValueError, match="no tile of nonsense"):
        parts.groups(["nonsense"])


def test_the_search_starts_from_the_device_and_reaches_the_defaults_of_the_others():
    hopper, ampere = part("hinge_max"), part("hinge_max", capability=(8, 0))
    assert hopper.start({})["hinge_max_sweep"].depth == 512
    assert hopper.start({}) != ampere.start({})
    key = entry("hinge_max_sweep", H100, 512, True)
    assert hopper.start({key: asdict(START)})["hinge_max_sweep"] == START
    for here in (hopper, ampere):
        reached = {after["hinge_max_sweep"] for after in here.around(here.start({}))}
        others = {default_tile("hinge_max_sweep", 512, True, c) for c in ((8, 0), (9, 0), (10, 0))}
        assert others - {here.start({})["hinge_max_sweep"]} <= reached


def test_a_winner_equal_to_another_devices_default_is_written_and_ones_own_is_not():
    hopper = part("hinge_max")
    table = {entry("hinge_gather", H100, 512, True): asdict(START)}
    winner = part("hinge_max", capability=(8, 0)).start({})
    parts_of = {**hopper.start({}), "hinge_max_sweep": winner["hinge_max_sweep"]}
    tune.enter(table, parts_of, hopper)
    assert table == {entry("hinge_max_sweep", H100, 512, True): asdict(winner["hinge_max_sweep"])}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("half", [True, False])
def test_candidates_keep_what_the_hinge_promises_of_positives(capability, half):
    here = part("hinge_sum", half=half, capability=capability)
    assert parts.alike(here.start({}), capability)
    steps = list(here.around(here.start({})))
    assert steps
    assert all(len({state[name].depth for name in parts.TOGETHER}) == 1 for state in steps)
    # Two warps cannot issue what a warp group does.
    few = {**here.start({}), "positives": replace(here.start({})["positives"], warps=2)}
    assert parts.alike(few, capability) == (capability[0] not in (9, 10))


class Fake(workers.Workers):
    """Builds nothing: bad(job) says what spills."""

    def __init__(self, bad=lambda job: False):
        self.bad, self.seen = bad, []

    def build(self, todo):
        for job in todo:
            self.seen.append(job)
            spilled = 8 * self.bad(job)
            figures = builds.Figures(
                registers=64, spill_stores=spilled, spill_loads=0, shared=0, tensor_core=8, instructions=9
            )
            yield builds.Built(job=job, figures=figures)

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(
    "op, name, other",
    [
        ("hinge_sum", "products", "products_listed"),
        ("relational", "relational_statistics", "relational_difference"),
        ("ranks", "ranks_count", "ranks_best_listed"),
    ],
)
def test_a_candidate_must_build_for_all_kernels_that_take_its_tile(op, name, other):
    here = part(op)
    start = here.start({})
    wide = {**start, name: replace(start[name], stages=4)}
    fine = {**start, name: replace(start[name], warps=4)}
    fake = Fake(lambda job: job.kernel == other and job.tile.stages == 4)
    assert parts.usable([wide, fine], start, here, fake) == [fine]
    assert {job.arch for job in fake.seen} == {90}


def test_float32_never_takes_tensor_cores():
    here = part("ranks", half=False)
    start = here.start({})
    assert parts.usable([{"ranks_count": replace(start["ranks_count"], stages=2)}], start, here, Fake()) == []


def test_gpo_is_measured_at_the_lengths_it_is_compiled_for():
    arguments = Namespace(width=[1152], kernel=["gpo_forward"])
    assert {here.width for here in tune.parts(arguments, H100)} == {577}


def test_a_compiler_that_dies_takes_no_other_build_with_it(monkeypatch):
    monkeypatch.setattr(workers, "build", eval)
    with workers.Workers(2) as some:
        done = list(some.build(["1 + 1", "__import__('os')._exit(3)", "2 + 2"]))
        assert [done[0], done[2]] == [2, 4]
        assert done[1].error == "the compiler ended its process"
        assert list(some.build(["3 + 3"])) == [6]


def test_spills_are_compared_with_nothing_where_there_are_no_figures():
    job = builds.Job(kernel="positives", tile=START, width=64, dtype="bf16", arch=90)
    (built,) = Fake(lambda job: True).build([job])
    assert len(builds.faults(built, {}, dots=False)) == 1
    assert builds.faults(built, None, dots=False) == []


@pytest.mark.parametrize("op", ["hinge_max", "info_nce", "relational", "gpo", "ranks"])
def test_a_judge_finds_ops_that_fail_or_compute_something_else(monkeypatch, op):
    state = {}
    ours = trials.run_of(op)
    monkeypatch.setattr(trials, "run_of", lambda name: lambda inputs: state["run"](inputs))
    monkeypatch.setattr(trials, "CHECKED", 70)
    state["run"] = ours
    wrong = trials.judge([op], 24, False, H100, {}, device="cpu")
    assert wrong({}) == []
    state["run"] = lambda inputs: 2 * ours(inputs)
    assert wrong({}) == [f"{op} float32: gives something else than with the default tiles"]
    state["run"] = lambda inputs: 1 / 0
    assert wrong({}) == [f"{op} float32: ZeroDivisionError: division by zero"]


def test_the_hinges_promise_holds_with_the_tiles_of_the_interpreter():
    code = "import torch; from d2s.kernels import trials; trials.CHECKED = 130;"
    code += "print(trials.broken_promise(80, torch.float32, 'cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "D2S_KERNELS": "triton"},
    )
    assert done.stdout == "[]\n"


@pytest.fixture
def device(monkeypatch):
    """Stands in for a device on which 128 rows take half the time; says what was measured."""
    asked = []

    def stopwatch(ops, width, half, capability):
        def measure(state, wanted):
            asked.append(dict(state))
            return dict.fromkeys(wanted, 10.0 - 5 * (state["ranks_count"].rows == 128))

        return measure

    monkeypatch.setattr(trials, "stopwatch", stopwatch)
    monkeypatch.setattr(trials, "judge", lambda *_: lambda state: [])
    monkeypatch.setattr(workers, "Workers", lambda processes: Fake(lambda job: job.tile.stages == 4))
    saved = dict(tuned_tiles())
    yield SimpleNamespace(asked=asked)
    tuned_tiles().clear()
    tuned_tiles().update(saved)


def arguments_of(path, **changed):
    given = {"width": [512, 64], "kernel": ["ranks_count"], "minutes": 5.0, "jobs": 2, "out": path}
    return Namespace(**{**given, **changed})


def test_a_whole_run_writes_what_it_found_and_says_how_long_it_takes(device, tmp_path, capsys):
    arguments = arguments_of(tmp_path / "tiles.json")
    assert tune.tune(tune.parts(arguments, H100), arguments) == 0
    table = json.loads(arguments.out.read_text(encoding="utf-8"))
    assert {*table} == {entry("ranks_count", H100, d, half) for d in (512, 64) for half in (True,)}
    assert all(tile["rows"] == 128 for tile in table.values())
    said = capsys.readouterr()
    assert said.err.startswith("tune: 4 searches, ")
    assert "4 of 4 searches written" in said.err
    assert "ranks 10.000 -> 5.000 ms: ranks_count 128x" in said.out
    assert not any(state["ranks_count"].stages == 4 for state in device.asked)


@pytest.mark.parametrize(
    "error, code, text",
    [(KeyboardInterrupt(), 130, "interrupted"), (trials.Lost("the device answers no more"), 1, "answers no")],
)
def test_an_interrupted_run_keeps_what_it_had_found(device, tmp_path, capsys, monkeypatch, error, code, text):
    arguments = arguments_of(tmp_path / "tiles.json")
    before = trials.stopwatch

    def stopwatch(ops, width, half, capability):
        if width == 64:
            raise error
        return before(ops, width, half, capability)

    monkeypatch.setattr(trials, "stopwatch", stopwatch)
    assert tune.tune(tune.parts(arguments, H100), arguments) == code
    assert [*json.loads(arguments.out.read_text(encoding="utf-8"))] == [entry("ranks_count", H100, 512, True)]
    said = capsys.readouterr()
    assert text in said.err
    assert "the last 2 searches keep what they had" in said.err
    assert f"written: 2 of 4 searches, {arguments.out}" in said.out


def test_a_run_whose_minutes_are_over_says_so(device, tmp_path, capsys):
    arguments = arguments_of(tmp_path / "tiles.json", minutes=-1.0)
    assert tune.tune(tune.parts(arguments, H100), arguments) == 0
    assert "minutes are over; the last 4 searches keep" in capsys.readouterr().err
    assert not arguments.out.exists()


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
    assert any(line.startswith("hinge_max D=512 half: from hinge_max_sweep 128x64x64/") for line in lines)
    assert int(lines[-1].split()[0]) == sum(line.startswith("  ") for line in lines) > 10


def test_dry_run_of_another_device_starts_from_its_defaults():
    done = run("--dry-run", "--width", "512", "--kernel", "hinge_max_sweep", "--arch", "90")
    assert done.stdout.startswith("hinge_max D=512 half: from hinge_max_sweep 128x32x512/")
    wrong = run("--dry-run", "--kernel", "nonsense")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("tune: no tile of nonsense")
