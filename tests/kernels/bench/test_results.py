"""The results' command writes everything or nothing, and names what is wrong with a file in one line."""

import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rows import ROW

from d2s.kernels import results
from d2s.kernels.bench import measured, record

BEFORE = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"


@pytest.fixture
def place(tmp_path):
    """A README and a folder with one measurement, in the file that is returned."""
    (tmp_path / "README.md").write_text(BEFORE, encoding="utf-8")
    record.append(tmp_path / "csv", [ROW])
    return record.file_of(tmp_path / "csv", ROW.device)


def refused(place, capsys, *options):
    """What is said by a command that refuses, in one line, and changes nothing."""
    root = place.parents[1]
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    status = results.main(["--folder", str(place.parent), "--readme", str(root / "README.md"), *options])
    said = capsys.readouterr()
    assert (status, said.out, said.err.count("\n")) == (2, "", 1)
    assert kept == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return said.err


def change(place, column, text):
    """The file's one row, with that value in that column."""
    head = place.read_text(encoding="utf-8").splitlines()[0]
    cells = [text if name == column else str(value) for name, value in vars(ROW).items()]
    assert head.split(",") == record.COLUMNS
    place.write_text("\n".join([head, ",".join(f'"{cell}"' for cell in cells), ""]), encoding="utf-8")


@pytest.mark.parametrize(
    "column, text",
    [
        ("median_ms", "0"),
        ("median_ms", "-1"),
        ("median_ms", "1e-320"),
        ("median_ms", "1e300"),
        ("p20_ms", "fast"),
        ("floor_ms", "0"),
        ("floor_ms", "nan"),
        ("floor_ms", "inf"),
        ("matmul_tflops", ""),
        ("n", "0"),
        ("n", "-5"),
        ("n", "2.5"),
        ("width", "9" * 400),
        ("extra_mib", "nan"),
        ("extra_mib", "-1"),
        ("case", "nonsense"),
        ("provider", "nobody"),
        ("mode", "half"),
        ("dtype", "float33"),
        ("device", "!!!"),
        ("device", "CPU\nSome"),
        ("date", "yesterday"),
    ],
)
def test_an_implausible_value_is_named_by_file_line_column_and_value(place, capsys, column, text):
    change(place, column, text)
    said = refused(place, capsys)
    line = 3 if "\n" in text else 2
    assert said.startswith(f"results: {place}, line {line}, column {column}: {text!r}: ")


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda b: b.replace(b"CPU Some", b"CPU S\xf6me"), "line 2: byte 0xf6 is not UTF-8"),
        (lambda b: b[:-1] + b",1\n", "line 2: 23 values in 22 columns"),
        (lambda b: b.rpartition(b",")[0] + b"\n", "line 2: 21 values in 22 columns"),
        (lambda b: b.replace(b",floor_ms", b""), "line 1: the columns are not those"),
        (lambda b: b.replace(b"n,tokens", b"tokens,n"), "another order"),
        (lambda b: b[:-1] + b'"', "line 2"),
        (lambda b: b.replace(b"2.13.0", b'"2.13.0'), "line 2: unexpected end of data"),
        (lambda b: b"\n" + b, ""),
        (lambda b: b.partition(b"\n")[0] + b"\n", "no measurement in it"),
        (lambda b: b"", "no measurement in it"),
    ],
)
def test_a_damaged_file_is_named(place, capsys, spoil, expected):
    place.write_bytes(spoil(place.read_bytes()))
    if expected:
        said = refused(place, capsys)
        assert said.startswith(f"results: {place}")
        assert expected in said
    else:
        assert measured.read(place) == [ROW]


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_a_folder_without_measurements_does_not_replace_any(place, capsys, what):
    folder = place.parent / "other"
    if what == "file":
        folder = place
    elif what == "empty":
        folder.mkdir()
    assert refused(place, capsys, "--folder", str(folder)).startswith(f"results: {folder}: ")


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"{results.END}\n{results.BEGIN}\n", f"line 2: {results.BEGIN} must come before {results.END}"),
        (f"{results.BEGIN}\n", f"lacks the line {results.END}"),
        (f"{results.END}\n", f"lacks the line {results.BEGIN}"),
        (BEFORE + BEFORE, f"has the line {results.BEGIN} more than once"),
        (BEFORE + "\udcff", "can't decode byte 0xff"),
    ],
)
def test_a_readme_that_cannot_be_used_is_named(place, capsys, text, expected):
    readme = place.parents[1] / "README.md"
    readme.write_text(text, encoding="utf-8", errors="surrogateescape")
    said = refused(place, capsys)
    assert said.startswith(f"results: {readme}")
    assert expected in said


def test_a_directory_where_a_plot_goes_stops_everything(place, capsys):
    plot = place.with_name(f"{place.stem}-memory.svg")
    plot.mkdir()
    assert str(plot) in refused(place, capsys)


def test_devices_whose_plots_would_have_one_name_are_refused(place, capsys):
    record.append(place.parent, [replace(ROW, device="CPU (Some) 2 threads")])
    assert "would share their plots' names" in refused(place, capsys)


def test_a_full_disk_leaves_readme_and_plots_as_they_were(place):
    readme = place.parents[1] / "README.md"
    readme.write_text(BEFORE + "x" * 6000, encoding="utf-8")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from d2s.kernels import results; sys.exit(results.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-B", "-c", code, "--readme", str(readme), "--folder", str(place.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"results: [Errno 27] File too large: '{readme}'"]
    assert readme.read_text(encoding="utf-8") == BEFORE + "x" * 6000
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_plot_that_is_no_text_is_replaced(place):
    options = ["--folder", str(place.parent), "--readme", str(place.parents[1] / "README.md")]
    plot = place.with_name(f"{place.stem}-time.svg")
    plot.write_bytes(b"\xff")
    assert results.main(options) == 0
    assert plot.read_text(encoding="utf-8").startswith("<svg")


def test_the_extremes_that_are_believed_can_be_drawn(tmp_path):
    """Without ours there is no floor either, and no path without points."""
    ends = (measured.LEAST, measured.MOST)
    rows = [
        replace(ROW, provider="eager", n=n, median_ms=ms, extra_mib=0.0)
        for n, ms in zip((1, 10**12), ends, strict=True)
    ]
    record.append(tmp_path, rows)
    devices = measured.by_device(tmp_path)
    for text in results.plots(devices).values():
        paths = [e.get("d") for e in ElementTree.fromstring(text).iter() if e.tag.endswith("path")]
        assert all(len(path) > 1 for path in paths)
    assert results.table(devices[ROW.device])


def test_the_last_of_equal_measurements_counts(place):
    record.append(place.parent, [replace(ROW, median_ms=5.0)])
    ((row,),) = measured.by_device(place.parent).values()
    assert row.median_ms == 5
