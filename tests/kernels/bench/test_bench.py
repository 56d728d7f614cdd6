"""The benchmark runs, counts and records; the README's tables and plots follow from what it recorded."""

import os
import subprocess
import sys
import weakref
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rows import ROW

from d2s.kernels import results
from d2s.kernels.bench import measure, plan, record, timing
from d2s.kernels.bench.__main__ import main
from d2s.kernels.bench.cases import CASES, work
from d2s.kernels.bench.providers import Unavailable, provider
from d2s.kernels.problems import Shape

README = Path(timing.__file__).parents[1] / "README.md"
SMALL = {"gpo": Shape(n=3, tokens=5, width=8)}


@pytest.mark.parametrize("case", CASES)
def test_ours_and_eager_compute_the_same(case):
    """A benchmark of two things that differ would say nothing."""
    inputs = CASES[case].make(SMALL.get(case, Shape(n=33, width=16)), torch.float32, "cpu", 3)
    values = [run(inputs) for run in (CASES[case].ours, CASES[case].plain)]
    torch.testing.assert_close(values[0], values[1], rtol=2e-4, atol=2e-4)
    if inputs.leaves:
        ours, plain = (torch.autograd.grad(v, inputs.leaves, inputs.upstream) for v in values)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_command_prints_and_appends_a_row_a_variant(tmp_path):
    command = [sys.executable, "-m", "d2s.kernels.bench", "--device", "cpu", "--size", "tiny", "--quick"]
    command += ["--only", "hinge_max", "--only", "gpo", "--repeat", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # After its rows each case says in words how they compare.
    lines = [line.split() for line in done.stdout.splitlines()[3:]]
    assert [line[:4:3] for line in lines if "wall" in line] == [
        ["hinge_max", "ours"],
        ["hinge_max", "eager"],
        ["gpo", "ours"],
        ["gpo", "eager"],
        ["gpo", "released"],
    ]
    assert sum(line[1:4] == ["full:", "ours", "is"] for line in lines) == 2
    (path,) = tmp_path.iterdir()
    rows = record.read(path)
    assert len(rows) == 5
    assert all(0 < r.p20_ms <= r.median_ms <= r.p80_ms and r.extra_mib is not None for r in rows)
    assert {(r.n, r.tokens, r.width) for r in rows} == {(64, 0, 16), (4, 9, 16)}
    one = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--only",
        "ranks",
        "--provider",
        "ours",
        "--out",
        str(tmp_path),
    ]
    assert main([*one, "--repeat", "1"]) == 0
    assert [row.case for row in record.read(path)] == [*(row.case for row in rows), "ranks"]


def test_modes_time_what_they_say():
    done = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            done.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            done.append("backward")
            return 2 * grad

    inputs = CASES["hinge_max"].make(Shape(n=2, width=4), torch.float32, "cpu", 0)

    def run(some):
        return sum(Double.apply(leaf).sum() for leaf in some.leaves[:1]) + 0 * some.leaves[1].sum()

    timed, prepare = timing.step(run, inputs, "backward")
    prepare()
    assert done == ["forward"]
    timed()
    assert done == ["forward", "backward"]
    timing.step(run, inputs, "forward")[0]()
    assert done[2:] == ["forward"]
    timing.step(run, inputs, "full")[0]()
    assert done[3:] == ["forward", "backward"]


def test_variants_take_turns_with_inputs_that_change():
    seen = []
    sets = [CASES["ranks"].make(Shape(n=2, width=4), torch.float32, "cpu", seed) for seed in range(2)]

    def named(name):
        return lambda inputs: seen.append((name, sets.index(inputs)))

    runs = {"a": named("a"), "b": named("b")}
    spent, failed = timing.in_turn(runs, sets, "full", repeats=2, warm=1, device="cpu")
    assert failed == {}
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    assert {name: len(times) for name, times in spent.items()} == {"a": 2, "b": 2}


def test_a_variant_that_fails_leaves_and_one_that_is_slow_is_repeated_less(monkeypatch):
    spent = {"quick": 100.0, "slow": 4000.0}
    monkeypatch.setattr(timing, "_once", lambda run, inputs, mode, device: run(inputs))

    def broken(inputs):
        raise RuntimeError("out of memory\nand more")

    runs = {name: lambda inputs, ms=ms: ms for name, ms in spent.items()} | {"broken": broken}
    times, failed = timing.in_turn(runs, [None], "full", 50, 5, "cpu", longest=10.0)
    assert failed == {"broken": "RuntimeError: out of memory and more"}
    assert {name: len(found) for name, found in times.items()} == {"quick": 50, "slow": timing.FEWEST}


def test_a_failed_step_is_freed_before_its_memory_is_given_back(monkeypatch):
    alive, dead = [], []

    def run(inputs):
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(timing, "release", lambda device: dead.append(alive[-1]() is None))
    inputs = CASES["ranks"].make(Shape(n=4, width=4), torch.float32, "cpu", 0)
    assert timing.in_turn({"ours": run, "eager": run}, [inputs], "full", 3, 1, "cpu")[0] == {}
    assert dead == [True, True]


def test_a_variant_that_fails_is_left_out_of_the_other_modes(monkeypatch, capsys):
    def broken(inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(CASES, "hinge_max", replace(CASES["hinge_max"], plain=broken))
    monkeypatch.setattr(measure, "extra_mib", lambda *_: 1.0)
    arguments = arguments_of(device="cpu", provider=["ours", "eager"], repeat=2, warm=1)
    item = plan.Item(case="hinge_max", dtype="float32", shape=Shape(n=4, width=4))
    rows = measure.measure(item, (1.0, 1.0), arguments)
    assert [(row.provider, row.mode, row.extra_mib) for row in rows] == [
        ("ours", "full", 1.0),
        ("ours", "forward", None),
        ("ours", "backward", None),
    ]
    assert capsys.readouterr().out == "  eager: full: RuntimeError: out of memory\n"


@pytest.mark.slow
def test_compiled_is_compiled_for_every_size(monkeypatch):
    """Past its limit of recompilations dynamo runs the plain function, which would then be timed in its name."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for number, case in enumerate(("hinge_max", "hinge_sum") * 6, 2):
        inputs = CASES[case].make(Shape(n=number, width=4), torch.float32, "cpu", 0)
        provider("compiled", case, "cpu", 4)(inputs)
    assert len(compiled) == 12


def test_what_dynamo_cannot_compile_whole_is_an_error():
    inputs = CASES["gpo"].make(SMALL["gpo"], torch.float32, "cpu", 0)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        provider("compiled", "gpo", "cpu", 8)(inputs)


def test_chunked_is_chunked_forward_and_backward(monkeypatch):
    monkeypatch.setenv("D2S_KERNELS", "reference")
    seen = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(os.environ["D2S_KERNELS"])
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append(os.environ["D2S_KERNELS"])
            return grad.expand(2, 4)

    monkeypatch.setitem(
        CASES, "hinge_max", replace(CASES["hinge_max"], ours=lambda some: Noted.apply(some.leaves[0]))
    )
    inputs = CASES["hinge_max"].make(Shape(n=2, width=4), torch.float32, "cpu", 0)
    inputs.leaves.pop()
    run = provider("chunked", "hinge_max", "cuda", 4)
    timing.step(run, inputs, "full")[0]()
    timed, prepare = timing.step(run, inputs, "backward")
    prepare()
    timed()
    assert seen == ["chunked"] * 4
    assert os.environ["D2S_KERNELS"] == "reference"


def arguments_of(**changed):
    """What the command line gives, on a GPU."""
    given = {"size": "full", "device": "cuda", "quick": False, "n": None, "dtype": None, "only": None}
    rest = {"provider": None, "mode": None, "repeat": 50, "warm": 5, "longest": 10.0}
    return Namespace(**{**given, **rest, **changed})


def test_float32_on_a_gpu_stops_at_32768_unless_asked():
    def sizes(**changed):
        return {(item.dtype, item.shape.n) for item in plan.items(arguments_of(only=["info_nce"], **changed))}

    assert max(n for dtype, n in sizes() if dtype == "float32") == 32768
    assert ("bfloat16", 131072) in sizes()
    assert ("float32", 131072) in sizes(n=[131072])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_peak_memory_is_that_of_the_step_without_its_gradients():
    shape = Shape(n=1024, width=64)
    inputs, small = (
        CASES["hinge_sum"].make(s, torch.float32, "cpu", 0) for s in (shape, Shape(n=8, width=64))
    )

    def run(some):
        held = torch.ones((16 << 20) if some is inputs else 1)
        return held.sum() + sum(leaf.sum() for leaf in some.leaves)

    extra = timing.extra_bytes(run, inputs, small, "cpu")
    assert 60 << 20 < extra < 72 << 20


# TFLOP/s in bf16 and GB/s of an H200, as reported elsewhere.
H200 = (790.0, 4300.0)


@pytest.mark.parametrize("case, mode, floor", [("info_nce", "forward", 1.39), ("hinge_sum", "full", 4.18)])
def test_floors_at_the_rates_of_an_h200(case, mode, floor):
    shape = Shape(n=32768, width=512)
    assert f"{work(case, shape, torch.bfloat16, mode).floor_ms(*H200):.3g}" == str(floor)


@pytest.mark.parametrize("case", CASES)
def test_the_readme_has_the_floors_of_an_h200(case):
    shape = Shape(n=128, tokens=577, width=512) if case == "gpo" else Shape(n=32768, width=512)
    floor = work(case, shape, torch.bfloat16, "full").floor_ms(*H200)
    assert f"| {case} | {shape} | {floor:.3g} |" in README.read_text(encoding="utf-8")


def test_floors_of_what_moves_bytes():
    shape = Shape(n=128, tokens=577, width=512)
    least = work("gpo", shape, torch.float32, "full")
    assert least.flops == 0
    assert least.traffic == 2 * 128 * 577 * 512 * 4
    assert least.floor_ms(1.0, 100.0) == pytest.approx(least.traffic / 100e9 * 1e3)


def test_peers_that_are_not_there_say_so():
    with pytest.raises(Unavailable, match="CUDA only"):
        provider("memeff", "info_nce", "cpu", 512)
    with pytest.raises(Unavailable, match="InfoNCE only"):
        provider("liger", "hinge_max", "cuda", 512)
    with pytest.raises(Unavailable, match="multiples of 256"):
        provider("inf_cl", "info_nce", "cuda", 384)


def test_rows_are_read_as_they_were_written_and_never_mixed_with_others(tmp_path):
    rows = [ROW, replace(ROW, extra_mib=None, provider="eager")]
    record.append(tmp_path, rows)
    record.append(tmp_path, [ROW])
    path = record.file_of(tmp_path, ROW.device)
    assert path.name == "cpu-some-2-threads.csv"
    assert record.read(path) == [*rows, ROW]
    path.write_text("date,device\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has other columns"):
        record.check_writable(tmp_path, ROW.device)


def test_table_compares_with_eager(capsys):
    record.show([ROW, replace(ROW, provider="eager", median_ms=3000.0, extra_mib=800.0)])
    ours = capsys.readouterr().out.splitlines()[0].split()
    assert ours[-2:] == ["3.0x", "40.0x"]


def test_plots_hold_every_point_and_equal_data_give_equal_bytes():
    pytest.importorskip("matplotlib")
    panels = {str(i): {"a < b": [(128, 0.5), (8192, 700.0)]} for i in range(4)}
    text = results.figure("t & u", panels)
    uses = [e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("use")]
    # A marker has one colour and two places in each panel, and one place in the legend.
    colour = [e for e in uses if "1f77b4" in e.get("style", "")]
    assert len(colour) == 9
    assert results.figure("t & u", panels) == text
