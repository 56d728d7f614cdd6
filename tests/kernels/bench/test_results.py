"""The results' command: README and plots follow from the CSV files, and what cannot be used is named in one line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rows import ROW

from d2s.kernels import results
from d2s.kernels.bench import record

ROOT = Path(__file__).resolve().parents[3]
BEFORE = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"


@pytest.fixture
def place(tmp_path):
    """A README and a folder with one measurement, in the file that is returned."""
    (tmp_path / "README.md").write_text(BEFORE, encoding="utf-8")
    (tmp_path / "csv").mkdir()
    record.append(tmp_path / "csv", [ROW])
    return record.file_of(tmp_path / "csv", ROW.device)


def options_of(place):
    return ["--folder", str(place.parent), "--readme", str(place.parents[1] / "README.md")]


def refused(place, capsys, *options):
    """The one line of a command that refuses and changes nothing."""
    root = place.parents[1]
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    status = results.main([*options_of(place), *options])
    said = capsys.readouterr()
    assert (status, said.out, said.err.count("\n")) == (2, "", 1)
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return said.err


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda text: text.replace(",8192,", ",many,"), "line 2: ValueError: invalid literal"),
        (lambda text: text.replace(",900\n", ",fast\n"), "line 2: ValueError: could not convert"),
        (lambda text: text.rpartition(",")[0] + "\n", "line 2: TypeError: float() argument"),
        (lambda text: text.replace(",floor_ms", ""), "line 2: KeyError: 'floor_ms'"),
    ],
)
def test_a_damaged_file_is_named(place, capsys, spoil, expected):
    before = place.read_text(encoding="utf-8")
    place.write_text(spoil(before), encoding="utf-8")
    assert place.read_text(encoding="utf-8") != before
    assert refused(place, capsys).startswith(f"error: {place}, {expected}")


def test_a_folder_without_measurements_does_not_replace_any(place, capsys):
    folder = place.parent / "other"
    assert refused(place, capsys, "--folder", str(folder)).startswith(
        f"error: {folder}: holds no measurement"
    )


@pytest.mark.parametrize(
    "text",
    [f"{results.END}\n{results.BEGIN}\n", f"{results.BEGIN}\n", f"{results.END}\n", BEFORE + BEFORE, ""],
)
def test_a_readme_without_its_markers_is_named(place, capsys, text):
    readme = place.parents[1] / "README.md"
    readme.write_text(text, encoding="utf-8")
    said = refused(place, capsys)
    assert said.startswith(f"error: {readme}: must have the line {results.BEGIN} once")
    assert results.END in said


@pytest.mark.slow
def test_a_full_disk_leaves_a_readme_as_it_was(place):
    readme = place.parents[1] / "README.md"
    readme.write_text(BEFORE + "x" * 6000, encoding="utf-8")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from d2s.kernels import results; results.find_spec = lambda name: None;"
        "sys.exit(results.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-B", "-c", code, *options_of(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {readme}: File too large"
    assert readme.read_text(encoding="utf-8") == BEFORE + "x" * 6000
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_without_matplotlib_the_tables_are_written_and_the_plots_left(place, capsys, monkeypatch):
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    assert results.main(options_of(place)) == 0
    assert "matplotlib is not installed (extra `bench`)" in capsys.readouterr().err
    assert "| info_nce |" in (place.parents[1] / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_the_last_of_equal_measurements_counts(place):
    record.append(place.parent, [replace(ROW, median_ms=5.0)])
    ((row,),) = record.by_device(place.parent).values()
    assert row.median_ms == 5


@pytest.mark.slow
def test_readme_and_plots_follow_from_the_files_and_check_notices(place, capsys):
    pytest.importorskip("matplotlib")
    readme = place.parents[1] / "README.md"
    old = replace(ROW, median_ms=5555.0)
    eager = replace(ROW, provider="eager", median_ms=3000.0, extra_mib=800.0)
    record.append(place.parent, [old, ROW, eager])
    assert results.main([*options_of(place), "--check"]) == 1
    assert readme.read_text(encoding="utf-8") == BEFORE
    assert results.main(options_of(place)) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| info_nce | 8192x512 | float32 | 900 | 1,000 | 1.1 | 3,000 | 3.0 | 20 | 800 |" in text
    assert "5,555" not in text
    plot = place.parent / "cpu-some-2-threads-time.svg"
    assert "<svg" in plot.read_text(encoding="utf-8")
    assert results.main([*options_of(place), "--check"]) == 0
    plot.write_bytes(b"\xff")
    assert results.main([*options_of(place), "--check"]) == 1
    assert results.main(options_of(place)) == 0
    assert "<svg" in plot.read_text(encoding="utf-8")


def test_the_committed_readme_and_plots_are_those_of_the_committed_files(monkeypatch):
    """Plots of another matplotlib differ in their bytes."""
    installed = pytest.importorskip("matplotlib").__version__
    if f"matplotlib=={installed}\n" not in (ROOT / "constraints.txt").read_text(encoding="utf-8"):
        monkeypatch.setattr(results, "find_spec", lambda name: None)
    assert results.main(["--check"]) == 0


def test_rows_without_ours_have_no_floor_and_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        replace(ROW, provider="eager", n=n, median_ms=ms, extra_mib=0.0) for n, ms in ((1, 1e-9), (9999, 1e9))
    ]
    record.append(tmp_path, rows)
    devices = record.by_device(tmp_path)
    assert len(results.plots(devices)) == 2
    assert len(results.table(devices[ROW.device])) == 2
