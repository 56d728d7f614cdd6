"""The claim, tested: `python -m d2s.ablate [--family scenes_small] [--data DIR] [--seeds 3]`.

Trains the paper's five rows and two controls, several seeds each, and prints a table of test rSum. Every row's
fine-tuning takes the same number of optimization steps, its model is the best on val, and the test split is
opened once, after the last run has ended. A run that is already complete in the output folder is not repeated,
so an interrupted ablation goes on where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from d2s.checkpoint.store import MARKER, newest
from d2s.common.files import write_json
from d2s.shards.order.permutation import steps_per_epoch

TRAIN = Path(__file__).with_name("train.py")
OWN = ("seed", "max_steps", "stage", "recipe", "epochs")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: which recipe of the family it trains, and from what."""

    name: str
    recipe: str
    pretrained: bool = False
    total_steps: bool = False
    """Train for the steps of both stages together."""
    overrides: tuple[str, ...] = ()
    control: bool = False
    """Not among the paper's rows."""

    @property
    def slug(self) -> str:
        return self.name.replace(" + ", "-").replace(", ", "-").replace(" ", "-")


ROWS = (
    Row(name="pre-training alone", recipe="pretrain"),
    Row(name="align alone", recipe="align"),
    Row(name="pre-training + align", recipe="align", pretrained=True),
    Row(name="pre-training + distillation", recipe="finetune", pretrained=True,
        overrides=("--loss.align_weight", "0")),
    Row(name="pre-training + align + distillation", recipe="finetune", pretrained=True),
    Row(name="align alone, total steps", recipe="align", total_steps=True, control=True),
    Row(name="pre-training + align + decoder", recipe="finetune", pretrained=True,
        overrides=("--loss.distill_weight", "0"), control=True),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is run: the recipes `<family>_pretrain`, `_align` and `_finetune` on one data set."""

    family: str
    data: Path
    out: Path
    seeds: int
    steps: int
    pretrain_steps: int
    jobs: int
    rows: tuple[Row, ...]
    overrides: tuple[str, ...]

    def settings(self) -> dict[str, object]:
        """What decides the numbers, seeds apart: complete runs are reused only under the same settings."""
        return {
            "family": self.family,
            "data": str(self.data),
            "steps": self.steps,
            "pretrain_steps": self.pretrain_steps,
            "overrides": list(self.overrides),
        }

    def check(self, images: int) -> None:
        """Raises ValueError where the first step of the first run would fail for want of images."""
        from d2s.training.config import override
        from d2s.training.recipes import find_recipe

        config = override(find_recipe(f"{self.family}_pretrain"), list(self.overrides))
        steps_per_epoch(images, config.batch_size)

    def claim_folder(self) -> None:
        """Writes the settings to the output folder. Raises ValueError where it holds another ablation."""
        path = self.out / "settings.json"
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != self.settings():
                raise ValueError(
                    f"--out {self.out} holds an ablation with other settings: choose another folder"
                )
        elif self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"--out {self.out} is not empty and holds no ablation: choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, self.settings())

    def run_folder(self, row: Row, seed: int) -> Path:
        return self.out / f"seed{seed}" / row.slug

    def command(self, row: Row, seed: int) -> list[str]:
        """The training command of one run."""
        steps = self.pretrain_steps if row.recipe == "pretrain" else self.steps
        if row.total_steps:
            steps += self.pretrain_steps
        command = [sys.executable, str(TRAIN), f"{self.family}_{row.recipe}", "--resume"]
        command += ["--data", str(self.data), "--run", str(self.run_folder(row, seed))]
        command += ["--seed", str(seed), "--max_steps", str(steps), *row.overrides, *self.overrides]
        if row.pretrained:
            command += ["--init", str(self.run_folder(ROWS[0], seed))]
        return command

    def train(self, row: Row, seed: int) -> None:
        """Trains one run unless it is complete. Raises RuntimeError with the end of its log where it fails."""
        folder = self.run_folder(row, seed)
        if (folder / "last" / "model.safetensors").is_file():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        start = time.monotonic()
        share = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        threads = os.environ.get("D2S_THREADS", share)
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run(
                self.command(row, seed),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "D2S_THREADS": threads, "OMP_NUM_THREADS": threads},
                check=False,
            ).returncode
        if code:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            last = lines[-1] if lines else "nothing"
            raise RuntimeError(
                f"{row.name}, seed {seed}: training ended with {code}; {log} ends with: {last}"
            )
        print(f"seed {seed}  {row.name:<36} {time.monotonic() - start:6.0f} s", flush=True)


def train_all(ablation: Ablation) -> None:
    """All runs, `jobs` at a time; the pre-training of a seed before the rows that start from it."""
    seeds = range(ablation.seeds)
    with ThreadPoolExecutor(ablation.jobs) as pool:
        first = {seed: pool.submit(ablation.train, ROWS[0], seed) for seed in seeds}

        def rest(row: Row, seed: int) -> None:
            if row.pretrained:
                first[seed].result()
            ablation.train(row, seed)

        # Rows that need no pre-training come first, so that no job waits for one.
        order = sorted((row for row in ablation.rows if row != ROWS[0]), key=lambda row: row.pretrained)
        jobs = [*first.values(), *(pool.submit(rest, row, seed) for row in order for seed in seeds)]
        try:
            for job in as_completed(jobs):
                job.result()
        except RuntimeError:
            pool.shutdown(cancel_futures=True)  # what runs already ends first
            raise


def evaluate_all(ablation: Ablation) -> list[dict]:
    """Opens the test split once: every run's best model, one result a row."""
    from d2s.evaluate.evaluation import evaluate_model
    from d2s.model import D2SModel
    from d2s.shards.read.index import ShardIndex
    from d2s.training.config import TrainConfig
    from d2s.training.run_log import read_rows

    index = ShardIndex.open(ablation.data)
    results = []
    for row in ablation.rows:
        runs = []
        for seed in range(ablation.seeds):
            folder = ablation.run_folder(row, seed)
            config = TrainConfig.from_dict(
                json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
            )
            model = D2SModel.from_pretrained(folder / "best")
            test = evaluate_model(model, index, "test", data_config=config.data, dense=False, full=False)
            rows = read_rows(folder)
            best = json.loads((newest(folder) / MARKER).read_text(encoding="utf-8"))["best"]["step"]
            runs.append(
                {
                    "seed": seed,
                    "test_rsum": test.rsum,
                    "val_rsum": next(r["rsum"] for r in rows if r["kind"] == "val" and r["step"] == best),
                    "best_step": best,
                    "steps": rows[-1]["step"],
                    "train_seconds": sum(r["seconds"] for r in rows if r["kind"] == "train"),
                }
            )
        results.append({"row": row.name, "control": row.control, "pretrained": row.pretrained, "runs": runs})
    return results


def table(results: list[dict]) -> str:
    """The results as a Markdown table; time is the seeds' median, pre-training included."""
    before = next((r for r in results if r["row"] == ROWS[0].name), None)
    pretraining = median(run["train_seconds"] for run in before["runs"]) if before else 0.0
    lines = [
        "| row | steps | test rSum | val rSum | training time |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        runs = result["runs"]
        steps = runs[0]["steps"] + (before["runs"][0]["steps"] if before and result["pretrained"] else 0)
        seconds = median(run["train_seconds"] for run in runs) + pretraining * result["pretrained"]
        name = result["row"] + (" (control)" if result["control"] else "")
        lines.append(
            f"| {name} | {steps} | {_spread([run['test_rsum'] for run in runs])} "
            f"| {_spread([run['val_rsum'] for run in runs])} | {seconds:.0f} s |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} +- {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def parse(arguments: list[str] | None) -> Ablation:
    """Reads the command line. Raises ValueError for a family without its three recipes."""
    parser = argparse.ArgumentParser(
        prog="python -m d2s.ablate",
        description="Trains the paper's five rows and two controls and prints their test rSum.",
        epilog="Further arguments override every run's configuration, as in --batch_size 64.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--family", default="scenes_small", help="recipes' common name (default: scenes_small)"
    )
    parser.add_argument("--data", type=Path, default=Path("data/scenes"),
                        help="shards (default: data/scenes, built if it is missing)")  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablate"), help="folder of all runs and the table"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each row (default: 3)")
    parser.add_argument(
        "--steps", type=int, default=0, help="steps of the fine-tuning stage (default: recipe's)"
    )
    parser.add_argument(
        "--pretrain-steps", type=int, default=0, help="steps of pre-training (default: recipe's)"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)),
                        help="runs at a time, the cores divided among them (default: one a core)")  # fmt: skip
    options, overrides = parser.parse_known_args(arguments)
    for name, least in (("seeds", 1), ("jobs", 1), ("steps", 0), ("pretrain_steps", 0)):
        if getattr(options, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(options, name)}: it must be {least} or more")
    for name in overrides:
        if name.split("=")[0].removeprefix("--") in OWN:
            raise ValueError(
                f"{name.split('=')[0]} is set by the ablation itself: use --seeds, --steps, --pretrain-steps"
            )
    from d2s.training.config import override
    from d2s.training.recipes import find_recipe

    configs = {part: find_recipe(f"{options.family}_{part}") for part in ("pretrain", "align", "finetune")}
    for config in configs.values():
        override(config, overrides)
    steps = options.steps or configs["finetune"].max_steps
    pretrain_steps = options.pretrain_steps or configs["pretrain"].max_steps
    if not (steps and pretrain_steps):
        raise ValueError(f"the recipes of {options.family} count epochs: give --steps and --pretrain-steps")
    return Ablation(
        family=options.family, data=options.data, out=options.out, seeds=options.seeds, steps=steps,
        pretrain_steps=pretrain_steps, jobs=options.jobs, rows=ROWS, overrides=tuple(overrides),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        ablation = parse(arguments)
        _scenes_if_missing(ablation.data)
        from d2s.shards.read.index import ShardIndex

        index = ShardIndex.open(ablation.data)
        for split in ("train", "val", "test"):
            index.rows(split)
        ablation.check(len(index.rows("train")))
        ablation.claim_folder()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    try:
        train_all(ablation)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = evaluate_all(ablation)
    text = table(results)
    write_json(ablation.out / "ablation.json", {"settings": ablation.settings(), "results": results})
    (ablation.out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    print(
        f"\n{text}\n\n{(time.monotonic() - start) / 60:.1f} minutes; {ablation.out}/ablation.json, ablation.md"
    )
    return 0


def _scenes_if_missing(data: Path) -> None:
    if data != Path("data/scenes") or data.exists():
        return
    from d2s.shards.cli import main as shard

    counts = "train=4000,val=500,test=500"
    code = shard(["build", "--source", "scenes", "--count", counts, "--size", "64", "--out", str(data)])
    if code:
        raise ValueError(f"{data}: the scenes could not be built")


if __name__ == "__main__":
    sys.exit(main())
