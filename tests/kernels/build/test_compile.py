"""Every Triton kernel builds for a device that is not here, fits it, and spills no more than it did."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from d2s.kernels import builds, compile
from d2s.kernels.fused import ALL_SPECS
from d2s.kernels.fused.tiles import Tile, tuned_tiles

TILE = Tile(rows=64, columns=64, depth=32, warps=4, stages=2)
JOB = builds.Job(kernel="hinge_max_sweep", tile=TILE, width=512, dtype="bf16", arch=90)
FIGURES = builds.Figures(registers=128, spill_stores=0, spill_loads=0, shared=1 << 16, tensor_core=8)
SPECS = {spec.name: spec for spec in ALL_SPECS}


def covering():
    """Each kernel once on sm_90 with its default tile: the type that uses tensor cores, at the paper's width."""
    found = {}
    for job in builds.all_jobs(ALL_SPECS, {}):
        if job.arch != 90:
            continue
        better = (job.half, -abs(job.width - 512))
        if job.kernel not in found or better > found[job.kernel][0]:
            found[job.kernel] = (better, job)
    return [job for _, job in found.values()]


@pytest.mark.slow
def test_every_kernel_builds_fits_and_does_not_spill_more_than_it_did():
    todo = covering()
    assert {job.kernel for job in todo} == set(SPECS)
    committed = compile.read_figures()
    results = list(builds.build_all(todo, 2))
    wrong = [fault for r in results for fault in compile.faults(r, committed, SPECS[r.job.kernel].dots)]
    assert not wrong
    assert all(r.figures.registers > 0 for r in results)


def test_a_compiler_that_crashes_is_one_error(monkeypatch):
    monkeypatch.setattr(builds, "build", crash)
    with pytest.raises(ValueError, match=f"crashed while it built one of {JOB.key}"):
        list(builds.build_all([JOB], 1))


def crash(job):
    os._exit(3)


def test_committed_figures_are_of_every_build_and_no_default_spills():
    committed = json.loads(compile.PATH.read_text(encoding="utf-8"))["figures"]
    todo = {job.key: job for job in builds.all_jobs(ALL_SPECS, tuned_tiles())}
    assert committed.keys() == todo.keys()
    spilling = [k for k, f in committed.items() if f["spill_stores"] + f["spill_loads"] and not todo[k].tuned]
    assert spilling == []


def test_jobs_cover_types_widths_architectures_and_tuned_tiles_once():
    spec = SPECS["hinge_max_sweep"]
    plain = builds.all_jobs([spec], {})
    assert len(plain) == len(spec.widths) * len(spec.dtypes) * len(builds.ARCHITECTURES)
    assert builds.all_jobs([spec, spec], {}) == plain
    tuned = {"hinge_max_sweep/sm_90/512/half": TILE}
    (more,) = set(builds.all_jobs([spec], tuned)) - set(plain)
    assert (more.tile, more.arch, more.width, more.dtype, more.tuned) == (TILE, 90, 512, "bf16", True)


@pytest.mark.parametrize(
    "changed, fault",
    [
        ({"shared": 228 << 10}, "shared memory"),
        ({"spill_stores": 9}, "spill_stores 9 bytes; the committed figure is 8"),
        ({"spill_loads": 4}, "spill_loads 4 bytes; the committed figure is 0"),
        ({"tensor_core": 0}, "without tensor cores"),
        ({"spill_stores": 8, "registers": 255}, None),
    ],
)
def test_faults_are_named(changed, fault):
    built = builds.Built(job=JOB, figures=replace(FIGURES, **changed))
    found = compile.faults(built, {JOB.key: {"spill_stores": 8, "spill_loads": 0}}, dots=True)
    assert len(found) == (fault is not None)
    assert all(JOB.key in text and fault in text for text in found)


def test_a_kernel_that_does_not_compile_is_a_fault_and_not_the_end():
    """Without a depth that a tile's rows could be multiplied by, the compiler refuses."""
    bad = replace(JOB, tile=replace(TILE, depth=24))
    broken, whole = builds.build_all([bad, JOB], 1)
    assert broken.figures is None
    assert compile.faults(broken, {}, dots=True)[0].startswith(f"{bad.key}: does not compile: ")
    assert whole.figures.tensor_core > 0


def test_a_spec_that_forgets_an_argument_is_told_which():
    spec = SPECS["hinge_max_sweep"]
    kernel = SimpleNamespace(arg_names=[*spec.kernel.arg_names, "offset"], do_not_specialize=["wrong"])
    with pytest.raises(ValueError, match=r"'offset'.*'wrong'"):
        builds.source(replace(spec, kernel=kernel), JOB)


def test_the_command_names_an_unknown_kernel(capsys):
    assert compile.main(["--kernel", "nonsense"]) == 2
    assert "no kernel nonsense" in capsys.readouterr().err
