"""The commands that look, and what importing them costs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import d2s.__main__
from d2s.shards.cli import main
from d2s.shards.format.manifest import read_manifest, schema, write_manifest


def test_show_prints_the_captions_and_writes_the_image(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture, refused: Callable[..., str]
) -> None:
    row = read_manifest(dataset).to_pylist()[0]
    assert main(["show", str(dataset), row["key"], "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(caption in told for caption in row["sparse"] + row["dense"])
    image = tmp_path / f"{row['key']}.jpg"
    data = (dataset / row["shard"]).read_bytes()[row["image_offset"] :][: row["image_size"]]
    assert image.read_bytes() == data
    image.write_bytes(b"something dear to the user")
    assert "exists with other content" in refused(["show", str(dataset), row["key"], "--out", str(tmp_path)])
    assert "did you mean 'photo_12'" in refused(["show", str(dataset), "photo_112"])


def test_stats_counts(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["stats", str(dataset)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:3] == ["train", "10", "3"]
    assert lines[1][4:] == ["40/40/40", "32/32/32"]
    assert ["train", "sparse", "25", "2.50", "5.0", "5", "5", "5"] in lines
    assert ["test", "dense", "2", "1.00", "3.0", "3", "3", "3"] in lines


def test_every_command_explains_itself_with_an_example(capsys: pytest.CaptureFixture) -> None:
    for command in ("build", "index", "verify", "stats", "show"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: python -m d2s.shard {command}" in " ".join(capsys.readouterr().out.split())


def test_shards_need_no_torch() -> None:
    code = "import sys, d2s.shard; sys.exit(any(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_console_command_hands_on(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert d2s.__main__.main(["shard", "stats", str(dataset)]) == 0
    assert "train" in capsys.readouterr().out
    assert d2s.__main__.main(["shart"]) == 2
    assert "no command 'shart'" in capsys.readouterr().err
    assert d2s.__main__.main([]) == 2


def test_option_without_effect_warns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "build",
        "--source",
        "scenes",
        "--count",
        "train=2,val=1",
        "--size",
        "32",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--columns", "path=x", "--dense-key", "key"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        "warning: --columns has no effect with source scenes",
        "warning: --dense-key has no effect without --dense",
    ]


def test_folder_that_is_not_there_or_a_file_is_named(dataset: Path, refused: Callable[..., str]) -> None:
    for command, *more in (["verify"], ["stats"], ["show", "key"]):
        assert refused([command, "nosuch", *more]) == "error: nosuch: no such folder"
    line = refused(["verify", str(dataset / "manifest.parquet")])
    assert line.endswith(f"manifest.parquet: is a file; give its folder, {dataset}")


def test_digits_of_another_kind_are_no_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scenes = ["build", "--source", "scenes", "--out", str(tmp_path)]
    for more, expected in (
        (["--count", "train=\u00b2"], "is not a number"),
        (["--part", "\u00b9/2"], "such as 3/8"),
    ):
        with pytest.raises(SystemExit):
            main([*scenes, *more])
        assert expected in capsys.readouterr().err


def test_usage_error_is_one_line(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["build", "--source", "karpaty", "--out", "x"], ["verify"], ["shuffle"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")


def test_manifest_of_somebody_else_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"key": ["a"], "split": [1]}), path)
    for arguments in (["stats", str(tmp_path)], ["show", str(tmp_path), "a"], ["verify", str(tmp_path)]):
        line = refused(arguments)
        assert "manifest.parquet: no manifest of ours: no column 'image_id' of type int64" in line
    write_manifest(tmp_path, schema().empty_table())
    assert "manifest.parquet: has no sample" in refused(["stats", str(tmp_path)])
    path.write_bytes(b"")
    assert "manifest.parquet: damaged" in refused(["stats", str(tmp_path)])
