"""Files are replaced whole or not at all."""

import os

import pytest

from d2s.kernels import files
from d2s.kernels.build import builds

resource = pytest.importorskip("resource")
BIG = "x" * 20_000


@pytest.fixture
def small_files():
    """No file can grow beyond 4 KiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_every_file_as_it_was(tmp_path, small_files):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("old a")
    second.write_text("old b")
    with pytest.raises(OSError, match="File too large") as caught:
        files.write_all({first: "new a", second: BIG})
    assert caught.value.filename == str(second)
    assert (first.read_text(), second.read_text()) == ("old a", "old b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_file_is_made_and_replaced_with_its_mode_and_behind_a_link(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    files.write_whole(path, "ä\n")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_whole(link, "b\n")
    assert link.is_symlink()
    assert path.read_bytes() == b"b\n"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("what", ["directory", "no folder", "protected"])
def test_what_cannot_be_written_is_named_and_nothing_else_is_changed(tmp_path, what, monkeypatch):
    good, bad = tmp_path / "good", tmp_path / "bad"
    if what == "directory":
        bad.mkdir()
    elif what == "no folder":
        bad = tmp_path / "none" / "bad"
    else:
        bad.write_text("old")
        # Whoever may do anything is not stopped by the file's mode.
        monkeypatch.setattr(files.os, "access", lambda path, mode: path != bad)
    with pytest.raises(OSError) as caught:
        files.write_all({good: "new", bad: "new"})
    assert caught.value.filename == str(bad)
    assert not good.exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_committed_figures_survive_a_full_disk(tmp_path, monkeypatch, small_files):
    from d2s.kernels.fused.tiles import Tile

    pytest.importorskip("triton")
    monkeypatch.setattr(builds, "FIGURES", tmp_path / "compile.json")
    builds.FIGURES.write_text("old")
    tile = Tile(rows=64, columns=64, depth=32, warps=4, stages=2)
    figures = builds.Figures(
        registers=1, spill_stores=0, spill_loads=0, shared=1, tensor_core=0, instructions=1
    )
    many = [builds.Job(kernel="k", tile=tile, width=i, dtype="bf16", arch=90) for i in range(100)]
    with pytest.raises(OSError, match="File too large"):
        builds.write_figures(builds.Built(job=job, figures=figures) for job in many)
    assert builds.FIGURES.read_text() == "old"
