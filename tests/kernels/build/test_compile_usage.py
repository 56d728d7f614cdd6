"""What `d2s.kernels.compile` refuses: mistakes on the command line, and damaged tables, each in one line."""

import json

import pytest

pytest.importorskip("triton")

from d2s.kernels import compile
from d2s.kernels.build import builds
from d2s.kernels.fused import tiles

ENTRY = '{"triton": "3", "figures": {"a": %s}}'


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[" * 10**5, "recursion"),
        ("[]", "holds no figures"),
        ("null", "holds no figures"),
        ('{"triton": "3"}', "holds no figures"),
        ('{"figures": {}}', "names no version of triton"),
        (ENTRY % "3", "a: must hold the whole numbers registers, "),
        (ENTRY % '{"registers": 3}', "a: must hold the whole numbers registers, "),
        (ENTRY % json.dumps(dict.fromkeys(vars(builds.Figures)["__annotations__"], "3")), "a: must hold"),
    ],
)
def test_damaged_figures_are_named_with_the_remedy(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(builds, "FIGURES", tmp_path / "compile.json")
    builds.FIGURES.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="restore it with git, or make it anew with") as caught:
        builds.read_figures()
    assert str(caught.value).startswith(f"{builds.FIGURES}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_builds(monkeypatch, tmp_path):
    """What would be built; nothing is."""
    asked = []
    monkeypatch.setattr(compile, "build_all", lambda todo, processes: asked.extend(todo) or [])
    monkeypatch.setattr(builds, "FIGURES", tmp_path / "compile.json")
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
        (["--width", "7"], "argument --width: no kernel of these is built for D = 7; there are [50, 64, "),
        (["--kernel", "gpo_forward", "--width", "512"], "there are [50, 577]"),
        (["--width", "512", "--width", "7"], "D = 7;"),
        (["--arch", "abc"], "argument --arch: 'abc' unknown; known are 80, 86, "),
        (["--arch", "80,999"], "argument --arch: '999' unknown; known are 80, 86, "),
        (["--arch", "80,"], "argument --arch: '' unknown"),
        (["--kernel", "nonsense"], "no kernel nonsense; there are hinge_max_sweep, "),
        (["--write", "--kernel", "positives"], "--write needs all kernels, widths and architectures"),
        (["--write", "--width", "512"], "--write needs all kernels, widths and architectures"),
        (["--write", "--arch", "80"], "--write needs all kernels, widths and architectures"),
    ],
)
def test_mistakes_on_the_command_line_are_named_and_build_nothing(no_builds, capsys, options, expected):
    assert expected in refused(capsys, *options)
    assert not no_builds
    assert not builds.FIGURES.exists()


def test_a_restricted_run_builds_what_is_asked_for(no_builds, capsys):
    assert compile.main(["--kernel", "positives", "--width", "512", "--arch", "103,80"]) == 0
    assert {(job.kernel, job.width, job.arch) for job in no_builds} == {
        ("positives", 512, 80),
        ("positives", 512, 103),
    }


@pytest.mark.parametrize("name", ["tiles.json", "compile.json"])
def test_a_damaged_table_is_named_before_anything_is_built(no_builds, capsys, tmp_path, name):
    (tmp_path / name).write_text("{", encoding="utf-8")
    said = refused(capsys)
    assert said.startswith(f"compile: {tmp_path / name}: ")
    assert "restore it with git" in said
    assert not no_builds


def test_damaged_figures_can_be_replaced(no_builds, capsys):
    builds.FIGURES.write_text("{", encoding="utf-8")
    assert compile.main(["--write"]) == 0
    assert builds.read_figures() == {}


def test_figures_that_cannot_be_written_are_one_line(no_builds, capsys):
    builds.FIGURES.mkdir()
    assert compile.main(["--write"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"compile: [Errno 21] Is a directory: '{builds.FIGURES}'"]


def test_figures_of_another_triton_are_not_compared_and_the_command_says_so(no_builds, capsys):
    builds.FIGURES.write_text('{"triton": "0.1", "figures": {}}', encoding="utf-8")
    assert compile.main([]) == 0
    assert "is of another triton" in capsys.readouterr().err
