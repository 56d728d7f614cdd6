"""The tuner's candidates and choices; what needs a device is replaced."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")

from d2s.kernels import tune
from d2s.kernels.fused import ALL_SPECS
from d2s.kernels.fused.tiles import LARGE, Tile, default_tile, entry, tuned_tiles

H100 = (9, 0)
SPECS = {spec.name: spec for spec in ALL_SPECS}


def task(kernel="ranks_count", width=512, half=True, capability=H100):
    return tune.Task(spec=SPECS[kernel], width=width, half=half, capability=capability)


@pytest.fixture(autouse=True)
def empty_table():
    saved = dict(tuned_tiles())
    tuned_tiles().clear()
    yield
    tuned_tiles().clear()
    tuned_tiles().update(saved)


def test_candidates_are_the_default_its_neighbours_and_the_defaults_of_other_devices():
    first, *others = task("hinge_max_sweep").candidates()
    defaults = {default_tile("hinge_max_sweep", 512, True, other) for other in LARGE}
    assert first == default_tile("hinge_max_sweep", 512, True, H100)
    assert defaults <= {first, *others}
    neighbours = [tile for tile in others if tile not in defaults]
    changed = [[k for k, v in asdict(tile).items() if v != asdict(first)[k]] for tile in neighbours]
    assert all(len(names) == 1 for names in changed)
    assert {name for (name,) in changed} == {"rows", "columns", "depth", "warps", "stages"}
    for name, (least, most) in tune.BOUNDS.items():
        assert all(least <= getattr(tile, name) <= most for tile in neighbours)


def test_of_tiles_that_build_the_same_there_is_one():
    """GPO sorts in the registers of a warp and has neither columns nor a depth."""
    found = task("gpo_forward", 577).candidates()
    assert {(tile.columns, tile.depth) for tile in found} == {(1, 1)}


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize("half", [True, False])
def test_kernels_that_compare_their_sums_keep_the_order_and_the_unit(capability, half):
    for name in tune.SAME_SUMS:
        found = task(name, half=half, capability=capability).candidates()
        assert len(found) > 1
        assert len({(tile.depth, tile.rows, tile.warps) for tile in found}) == 1


def test_every_kernel_whose_build_follows_from_its_own_tile_is_tuned():
    one = Tile(rows=16, columns=16, depth=16, warps=4, stages=1)
    other = Tile(rows=32, columns=64, depth=128, warps=4, stages=1)
    own = {
        spec.name
        for spec in ALL_SPECS
        if spec.tile_name == spec.name and spec.constants(one, 256, True) != spec.constants(other, 256, True)
    }
    assert own - {"hinge_few"} == {*tune.OPS}


def test_important_widths_come_first_and_gpo_is_tuned_at_the_lengths_in_use():
    todo = tune.tasks([*tune.OPS], tune.WIDTHS, H100)
    assert {some.width for some in todo[: 2 * len(tune.OPS)]} == {512}
    lengths = {some.width for some in todo if some.spec.name == "gpo_forward"}
    assert {50, 577} <= lengths
    assert len(tune.tasks(["positives"], [64], H100)) == 2


@pytest.mark.parametrize("op", ["hinge_max", "info_nce", "relational", "gpo", "ranks"])
def test_a_trial_refuses_results_that_differ(monkeypatch, op):
    kernel = next(kernel for kernel, ops in tune.OPS.items() if ops == (op,))
    make_step, factor = tune.make_step, [1.0]

    def scaled(*arguments):
        step = make_step(*arguments)
        return lambda: [factor[0] * x for x in step()]

    monkeypatch.setattr(tune, "make_step", scaled)
    monkeypatch.setattr(tune, "CHECKED_ROWS", 70)
    monkeypatch.setattr(tune, "ROWS", {False: 70})
    # Expected are the results with the default tiles, whatever is in use; that stays in use.
    tuned_tiles()["some"] = Tile(rows=16, columns=16, depth=16, warps=4, stages=1)
    trial = tune.Trial(task(kernel, 24, half=False), device="cpu")
    assert [*tuned_tiles()] == ["some"]
    trial.check_results()
    for factor[0] in (2.0, float("nan")):
        with pytest.raises(ValueError, match="differ from those with the default tiles"):
            trial.check_results()


class Device:
    """Stands in for a GPU: times follow from the tile in use, some tiles fail or compute something else."""

    def __init__(self, task, times=lambda tile: 10.0, wrong=lambda tile: False):
        self.task, self.times, self.wrong = task, times, wrong

    @property
    def tile(self):
        return tuned_tiles()[self.task.entry]

    def milliseconds(self):
        return self.times(self.tile)

    def check_results(self):
        if self.wrong(self.tile):
            raise ValueError("differs")


@pytest.fixture
def device(monkeypatch):
    def use(**behaviour):
        monkeypatch.setattr(tune, "Trial", lambda task: Device(task, **behaviour))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return use


def test_the_fastest_candidate_is_entered(device, capsys):
    some = task()
    device(times=lambda tile: 5.0 if tile.rows == 128 else 10.0)
    tune.tune(some)
    assert tuned_tiles() == {some.entry: replace(some.default, rows=128)}
    assert (
        f"{some.default} 10.000 ms -> {replace(some.default, rows=128)} 5.000 ms" in capsys.readouterr().out
    )


def test_noise_is_no_gain_and_a_default_tile_needs_no_entry(device):
    device(times=lambda tile: 9.9 if tile.rows == 128 else 10.0)
    tune.tune(task())
    assert tuned_tiles() == {}


@pytest.mark.parametrize("how", ["differs", "fails"])
def test_a_candidate_that_differs_or_fails_is_left_out(device, capsys, how):
    some = task()

    def times(tile):
        if how == "fails" and tile.rows == 128:
            raise RuntimeError("out of resources\nand more")
        return {128: 5.0, 32: 8.0}.get(tile.rows, 10.0)

    device(times=times, wrong=lambda tile: how == "differs" and tile.rows == 128)
    tune.tune(some)
    assert tuned_tiles()[some.entry].rows == 32
    reason = "ValueError: differs" if how == "differs" else "RuntimeError: out of resources and more"
    assert f"{replace(some.default, rows=128)} is left out: {reason}" in capsys.readouterr().out


def test_a_committed_tile_stays_where_nothing_is_faster_or_nothing_works(device):
    some = task()
    start = replace(some.default, stages=5)
    for times in (lambda tile: 5.0 if tile == start else 10.0, lambda tile: 1 / 0):
        tuned_tiles()[some.entry] = start
        device(times=times)
        tune.tune(some)
        assert tuned_tiles() == {some.entry: start}


def faster_with_128_rows(tile):
    return 5.0 if tile.rows == 128 else 10.0


def test_a_run_writes_the_table_with_what_it_found(device, tmp_path, capsys):
    device(times=faster_with_128_rows)
    todo = tune.tasks(["ranks_count"], [512, 64], H100)
    tune.tune_all(todo, 5.0, tmp_path / "tiles.json")
    table = json.loads((tmp_path / "tiles.json").read_text(encoding="utf-8"))
    assert {*table} == {entry("ranks_count", H100, d, half) for d in (512, 64) for half in (True, False)}
    assert all(Tile(**tile).rows == 128 for tile in table.values())
    assert "written: 4 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.AcceleratorError("illegal access")])
def test_an_interrupted_run_keeps_what_it_had_found(device, tmp_path, capsys, monkeypatch, error):
    """A device that does not answer any more ends the run, too."""

    def times(tile):
        if any(key.endswith("64/half") for key in tuned_tiles()):
            raise KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RuntimeError("launch failed")
        return faster_with_128_rows(tile)

    def synchronize():
        raise error

    device(times=times)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    todo = tune.tasks(["ranks_count"], [512, 64], H100)
    with pytest.raises(type(error)):
        tune.tune_all(todo, 5.0, tmp_path / "tiles.json")
    table = json.loads((tmp_path / "tiles.json").read_text(encoding="utf-8"))
    assert {*table} == {entry("ranks_count", H100, 512, half) for half in (True, False)}
    assert "written: 2 of 4" in capsys.readouterr().out


def test_a_run_whose_minutes_are_over_says_so(device, tmp_path, capsys):
    device()
    tune.tune_all([task()], -1.0, tmp_path / "tiles.json")
    assert "written: 0 of 1" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


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


def test_dry_run_lists_the_candidates(capsys):
    assert tune.main(["--dry-run", "--width", "512", "--kernel", "hinge_max_sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("hinge_max_sweep D=512 half: 128x")
    assert lines[-1] == f"{sum(len(line.split(', ')) for line in lines[:-1])} candidates"
