"""A batch that no memory here would hold at once trains in pieces, with the small recipe at its own size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2s.shards.cli import main as shard
from d2s.training.run_log import read_rows

TRAIN = Path(__file__).resolve().parents[3] / "d2s" / "train.py"
PAIRS, GIB = 8192, 1 << 30


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="peak memory of a process is asked of the system")
def test_a_batch_of_8192_within_4_gib(tmp_path: Path) -> None:
    # Five captions an image make the pairs of one step.
    count = f"train={-(-PAIRS // 5)},val=8,test=8"
    assert shard(f"build --source scenes --count {count} --size 64 --out {tmp_path / 'data'}".split()) == 0
    command = [
        sys.executable,
        TRAIN,
        "scenes_small_align",
        "--data",
        tmp_path / "data",
        "--run",
        tmp_path / "run",
    ]
    command += (
        f"--batch_size {PAIRS} --engine.micro_batch 128 --max_steps 1 --log.every 1 --data.sparse all".split()
    )
    # The recipe's tower has BatchNorm, which wants all pairs at once.
    command += "--model.image_encoder.config.model_type convnext --model.text_mlp_norm layer".split()
    tower = "--model.image_encoder.config."
    command += f"{tower}hidden_sizes 32 64 128 192 {tower}depths 1 1 1 1".split()
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "D2S_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "output").read_text()
    peak = usage.ru_maxrss * 1024
    print(f"{PAIRS:,} pairs, 128 at a time: {peak / GIB:.2f} GiB at the peak")
    (row,) = (row for row in read_rows(tmp_path / "run") if row["kind"] == "train")
    assert row["step"] == 1
    assert row["loss"] > 0
    assert peak < 4 * GIB
