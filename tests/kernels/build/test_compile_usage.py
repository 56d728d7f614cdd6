"""What `d2s.kernels.compile` refuses: mistakes on the command line, and damaged tables, each in one line."""

import pytest

pytest.importorskip("triton")

from d2s.kernels import compile
from d2s.kernels.builds import ARCHITECTURES
from d2s.kernels.fused import tiles


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "line 1: not JSON"),
        ("[" * 10**5, "nested too deeply"),
        ("[]", "list indices"),
        ('{"figures": {}}', "'triton'"),
    ],
)
def test_damaged_figures_are_named_with_the_remedy(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(compile, "PATH", tmp_path / "compile.json")
    compile.PATH.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="restore it with git, or make it anew with") as caught:
        compile.read_figures()
    assert str(caught.value).startswith(f"{compile.PATH}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_builds(monkeypatch, tmp_path):
    """What would be built; nothing is."""
    asked = []
    monkeypatch.setattr(compile, "build_all", lambda todo, processes: asked.extend(todo) or [])
    monkeypatch.setattr(compile, "PATH", tmp_path / "compile.json")
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    tiles.tuned_tiles.cache_clear()
    yield asked
    tiles.tuned_tiles.cache_clear()


def refused(capsys, *options):
    """What is said by a command that refuses."""
    try:
        status = compile.main([*options])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    return said.err.splitlines()[-1]


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--jobs", "0"], "argument --jobs: '0' is not a whole number of at least 1"),
        (["--jobs", "-3"], "argument --jobs: '-3' is not a whole number of at least 1"),
        (["--kernel", "nonsense"], "no kernel nonsense; there are hinge_max_sweep, "),
        (["--write", "--kernel", "positives"], "--write needs all kernels"),
    ],
)
def test_mistakes_on_the_command_line_are_named_and_build_nothing(no_builds, capsys, options, expected):
    assert expected in refused(capsys, *options)
    assert not no_builds
    assert not compile.PATH.exists()


def test_a_restricted_run_builds_what_is_asked_for(no_builds, capsys):
    assert compile.main(["--kernel", "positives"]) == 0
    assert {(job.kernel, job.arch) for job in no_builds} == {("positives", arch) for arch in ARCHITECTURES}


@pytest.mark.parametrize("name", ["tiles.json", "compile.json"])
def test_a_damaged_table_is_named_before_anything_is_built(no_builds, capsys, tmp_path, name):
    (tmp_path / name).write_text("{", encoding="utf-8")
    said = refused(capsys)
    assert said.startswith(f"error: {tmp_path / name}: ")
    assert "restore it with git" in said
    assert not no_builds


def test_damaged_figures_can_be_replaced(no_builds, capsys):
    compile.PATH.write_text("{", encoding="utf-8")
    assert compile.main(["--write"]) == 0
    assert compile.read_figures() == {}


def test_figures_that_cannot_be_written_are_one_line(no_builds, capsys):
    compile.PATH.mkdir()
    assert compile.main(["--write"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {compile.PATH}: Is a directory"]


def test_figures_of_another_triton_are_not_compared_and_the_command_says_so(no_builds, capsys):
    compile.PATH.write_text('{"triton": "0.1", "figures": {}}', encoding="utf-8")
    assert compile.main([]) == 0
    assert "is of another triton" in capsys.readouterr().err
