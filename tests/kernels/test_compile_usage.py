"""What `d2s.kernels.compile` refuses: mistakes on the command line, and damaged tables, each in one line."""

import json

import pytest

pytest.importorskip("triton")

from d2s.kernels import builds

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
