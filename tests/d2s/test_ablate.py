"""The ablation: its commands, its table by hand, and two of its rows for real."""

from pathlib import Path

import pytest

from d2s import ablate
from d2s.report.ablation import ablation_table
from d2s.shards.cli import main as shard

SMALL = [
    *("--batch_size", "8", "--model.width", "16", "--data.loader_workers", "0"),
    *("--data.image_size", "32", "--model.image_size", "32"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablate") / "scenes"
    assert shard(f"build --source scenes --count train=24,val=8,test=8 --size 32 --out {out}".split()) == 0
    return out


def test_rows_are_the_papers_and_the_controls() -> None:
    assert [row.control for row in ablate.ROWS] == [False] * 5 + [True] * 2
    made = ablate.Ablation(
        family="scenes_small", data=Path("d"), out=Path("o"), seeds=3, steps=30, pretrain_steps=20, jobs=1,
        overrides=(),
    )  # fmt: skip
    commands = {row.name: " ".join(made.command(row, 1)) for row in ablate.ROWS}
    assert "--max_steps 20" in commands["pre-training alone"]
    assert "--max_steps 50" in commands["align alone, total steps"]
    for name, command in commands.items():
        assert ("--init" in command) == (name.startswith("pre-training") and name != "pre-training alone"), (
            name
        )
        assert "--seed 1" in command
    assert "--loss.align_weight 0" in commands["pre-training + distillation"]
    assert "scenes_small_align" in commands["align alone"]


def test_table_by_hand() -> None:
    def result(row: ablate.Row, *runs: tuple[float, float]) -> dict:
        found = [
            {"test_rsum": rsum, "val_rsum": rsum + 1, "steps": 10, "train_seconds": seconds}
            for rsum, seconds in runs
        ]
        return {"row": row.name, "control": row.control, "pretrained": row.pretrained, "runs": found}

    first, align, both = ablate.ROWS[0], ablate.ROWS[1], ablate.ROWS[2]
    lines = ablation_table(
        [result(first, (1, 5), (3, 7)), result(align, (4, 8), (6, 8)), result(both, (7, 1), (7, 3))]
    ).splitlines()
    assert lines[2] == "| pre-training alone | 10 | 2.0 +- 1.4 | 3.0 +- 1.4 | 6 s |"
    assert lines[3] == "| align alone | 10 | 5.0 +- 1.4 | 6.0 +- 1.4 | 8 s |"
    # Pre-training's steps and time are part of what the row costs.
    assert lines[4] == "| pre-training + align | 20 | 7.0 +- 0.0 | 8.0 +- 0.0 | 8 s |"


@pytest.mark.slow
def test_two_rows_for_real_and_not_twice(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ablate, "ROWS", (ablate.ROWS[0], ablate.ROWS[4]))
    arguments = ["--data", str(scenes), "--out", str(tmp_path / "out"), "--seeds", "1", "--steps", "2"]
    arguments += ["--pretrain-steps", "2", "--jobs", "1", *SMALL]
    assert ablate.main(arguments) == 0
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "pre-training + align + distillation | 4 |" in text
    capsys.readouterr()
    assert ablate.main(arguments) == 0
    assert "seed 0" not in capsys.readouterr().out, "a complete run was trained again"
    assert ablate.main([*arguments, "--optim.lr", "0.1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_failing_run_ends_the_ablation(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ablate, "TRAIN", tmp_path / "broken.py")
    (tmp_path / "broken.py").write_text("raise SystemExit('it broke')")
    arguments = ["--data", str(scenes), "--out", str(tmp_path / "out"), "--seeds", "3", "--jobs", "1", *SMALL]
    assert ablate.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "it broke" in error
    assert len(list((tmp_path / "out").glob("seed*/*.log"))) <= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "argument --seeds: '0'"),
        (["--pretrain-steps", "-5"], "argument --pretrain-steps: '-5'"),
        (["--seed", "5"], "--seed is set by the ablation itself"),
        (["--family", "scenes_smal"], "did you mean 'scenes_small_pretrain'"),
        (["--optim.rl", "1"], "no field 'optim.rl'"),
        (["--batch_size", "64"], "batch_size is 64"),
        (["--family", "f30k_vitb16_224"], "count epochs"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    try:
        code = ablate.main(["--data", str(scenes), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()
