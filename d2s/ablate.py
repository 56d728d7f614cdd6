"""Runs the paper's ablation with two controls: `python -m d2s.ablate [--data DIR] [--seeds 3]`.

Trains the five rows of the paper's table and two controls, each with several seeds. Prints a table of rSum on the
test split. All fine-tuning runs have the same number of training steps. Each run is represented by its best model on
the val split. The test split is evaluated once, at the end. If the command is started again after an interruption, it
does not repeat the runs that are complete.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from d2s.checkpoint.store import MARKER, newest
from d2s.common import command
from d2s.common.command import positive, user_path
from d2s.common.files import read_json, write_json
from d2s.evaluate.evaluation import evaluate_model
from d2s.model import D2SModel
from d2s.report.ablation import ablation_table
from d2s.shards.cli import build_scenes
from d2s.shards.order.permutation import steps_per_epoch
from d2s.shards.read.index import ShardIndex
from d2s.training.config import TrainConfig, override
from d2s.training.recipes import find_recipe
from d2s.training.run_log import read_rows

TRAIN = Path(__file__).with_name("train.py")
SCENES = Path("data/scenes")
_OWN_FIELDS = ("seed", "max_steps", "stage", "recipe", "epochs")


class TrainingError(Exception):
    """Raised if a training process fails."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the ablation table. Its fields say how the runs of this row are trained."""

    name: str
    recipe: str
    """Last part of the recipe's name: "pretrain", "align" or "finetune". The first part is `Ablation.family`."""
    pretrained: bool = False
    """Whether each run starts from the pre-trained model of the same seed."""
    total_steps: bool = False
    """Whether each run has as many training steps as pre-training and fine-tuning together."""
    overrides: tuple[str, ...] = ()
    control: bool = False
    """Whether this row is one of our controls, which are not in the paper."""


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
    """An ablation on one data set. Recipes: `<family>_pretrain`, `<family>_align`, `<family>_finetune`."""

    family: str
    data: Path
    out: Path
    seeds: int
    steps: int
    """Number of training steps of each fine-tuning run."""
    pretrain_steps: int
    jobs: int
    """Number of trainings that run at the same time."""
    overrides: tuple[str, ...]

    def settings(self) -> dict[str, object]:
        """Returns the settings that affect the results. Seeds are left out, as each run's path has its seed.

        A run in the output folder is used again only if it was made with equal settings.
        """
        same = {name: getattr(self, name) for name in ("family", "steps", "pretrain_steps")}
        return {**same, "data": str(self.data), "overrides": list(self.overrides)}

    def claim_folder(self) -> None:
        """Writes the settings to `out`. Raises ValueError if `out` has other files or other settings."""
        path, used = self.out / "settings.json", self.out.exists() and any(self.out.iterdir())
        if used and not (path.is_file() and read_json(path) == self.settings()):
            raise ValueError(
                f"--out {self.out} holds other files, or an ablation with other settings: choose another folder"
            )
        write_json(path, self.settings())

    def run_folder(self, row: Row, seed: int) -> Path:
        slug = row.name.replace(" + ", "-").replace(", ", "-").replace(" ", "-")
        return self.out / f"seed{seed}" / slug

    def command(self, row: Row, seed: int) -> list[str]:
        """Returns the command line that trains the run of `row` with `seed`."""
        steps = self.pretrain_steps if row.recipe == "pretrain" else self.steps
        if row.total_steps:
            steps += self.pretrain_steps
        words = [sys.executable, str(TRAIN), f"{self.family}_{row.recipe}", "--resume"]
        words += ["--data", str(self.data), "--run", str(self.run_folder(row, seed))]
        words += ["--seed", str(seed), "--max_steps", str(steps), *row.overrides, *self.overrides]
        return [*words, "--init", str(self.run_folder(ROWS[0], seed))] if row.pretrained else words

    def train(self, row: Row, seed: int) -> None:
        """Trains the run of `row` with `seed` unless it is complete. Raises TrainingError if training fails."""
        folder = self.run_folder(row, seed)
        if (folder / "last" / "model.safetensors").is_file():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        log, start = folder.with_name(f"{folder.name}.log"), time.monotonic()
        threads = os.environ.get("D2S_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs)))
        env = {**os.environ, "D2S_THREADS": threads, "OMP_NUM_THREADS": threads}
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(
                self.command(row, seed), stdout=file, stderr=subprocess.STDOUT, env=env, check=False
            )
        if done.returncode:
            last = ["nothing", *log.read_text(encoding="utf-8").strip().splitlines()][-1]
            raise TrainingError(
                f"{row.name}, seed {seed}: training ended with {done.returncode}; {log} ends with: {last}"
            )
        print(f"seed {seed}  {row.name:<36} {time.monotonic() - start:6.0f} s", flush=True)

    def train_all(self) -> None:
        """Trains all runs, `jobs` at a time. A run that needs a pre-trained model waits for that model."""
        seeds = range(self.seeds)
        with ThreadPoolExecutor(self.jobs) as pool:
            pretrainings = [pool.submit(self.train, ROWS[0], seed) for seed in seeds]

            def train(row: Row, seed: int) -> None:
                if row.pretrained:
                    pretrainings[seed].result()
                self.train(row, seed)

            # Rows that need no pre-trained model come first, so that no thread waits while other runs could start.
            rows = sorted(ROWS[1:], key=lambda row: row.pretrained)
            others = [pool.submit(train, row, seed) for row in rows for seed in seeds]
            try:
                for future in as_completed([*pretrainings, *others]):
                    future.result()
            except TrainingError:
                pool.shutdown(cancel_futures=True)  # returns only after the running trainings end
                raise


def evaluate_all(ablation: Ablation) -> list[dict]:
    """Evaluates the best model of every run on the test split. Returns a dictionary for each table row."""
    index, results = ShardIndex.open(ablation.data), []
    for row in ROWS:
        folders = [ablation.run_folder(row, seed) for seed in range(ablation.seeds)]
        runs = [{"seed": seed, **_evaluate(folder, index)} for seed, folder in enumerate(folders)]
        results.append({"row": row.name, "control": row.control, "pretrained": row.pretrained, "runs": runs})
    return results


def _evaluate(folder: Path, index: ShardIndex) -> dict[str, float]:
    config = TrainConfig.from_dict(read_json(folder / "config.json")["config"])
    model = D2SModel.from_pretrained(folder / "best")
    test = evaluate_model(model, index, "test", data_config=config.data, dense=False, full=False)
    rows = read_rows(folder)
    best = read_json(newest(folder) / MARKER)["best"]["step"]
    return {
        "test_rsum": test.rsum,
        "val_rsum": next(r["rsum"] for r in rows if r["kind"] == "val" and r["step"] == best),
        "best_step": best,
        "steps": rows[-1]["step"],
        "train_seconds": sum(r["seconds"] for r in rows if r["kind"] == "train"),
    }


def read_ablation(options: argparse.Namespace, overrides: list[str]) -> Ablation:
    """Builds the ablation from the options of the command line. Checks that its data set and recipes exist.

    Raises ValueError if an option is wrong, or if `overrides` sets a field that the ablation sets itself.
    """
    for name in (word.split("=")[0] for word in overrides):
        if name.removeprefix("--") in _OWN_FIELDS:
            raise ValueError(f"{name} is set by the ablation itself: use --seeds, --steps, --pretrain-steps")
    recipes = [find_recipe(f"{options.family}_{part}") for part in ("pretrain", "align", "finetune")]
    pretrain, _, finetune = (override(recipe, overrides) for recipe in recipes)
    steps = options.steps or finetune.max_steps
    pretrain_steps = options.pretrain_steps or pretrain.max_steps
    if not (steps and pretrain_steps):
        raise ValueError(f"the recipes of {options.family} count epochs: give --steps and --pretrain-steps")
    if options.data == SCENES and not SCENES.exists():
        build_scenes(SCENES, "train=4000,val=500,test=500", size=64)
    index = ShardIndex.open(options.data)
    for split in ("train", "val", "test"):
        index.rows(split)
    steps_per_epoch(len(index.rows("train")), pretrain.batch_size)  # raises for too large a batch
    fields = vars(options) | {"steps": steps, "pretrain_steps": pretrain_steps, "overrides": tuple(overrides)}
    return Ablation(**fields)


def parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m d2s.ablate",
        description="Trains the paper's five rows and two controls and prints their test rSum.",
        epilog="Further arguments override every run's configuration, as in --batch_size 64.",
        allow_abbrev=False,
    )
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("--family", default="scenes_small", help="first part of the recipes' names (default: scenes_small)")
    add(
        "--data", type=user_path, default=SCENES, help="shards (default: data/scenes, built if it is missing)"
    )
    add("--out", type=user_path, default=Path("runs/ablate"), help="folder of all runs and the table")
    add("--seeds", type=positive, default=3, help="seeds of each row (default: 3)")
    add("--steps", type=positive, help="steps of the fine-tuning stage (default: recipe's)")
    add("--pretrain-steps", type=positive, help="steps of pre-training (default: recipe's)")
    add(
        "--jobs",
        type=positive,
        default=cores,
        help="trainings at a time, which share the cores (default: cores)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns exit code 0 for success, 1 if a training failed, or 2 for a user's mistake."""
    options, overrides = parser().parse_known_args(arguments)
    return command.run(lambda: _ablate(options, overrides), failure=TrainingError)


def _ablate(options: argparse.Namespace, overrides: list[str]) -> None:
    ablation, start = read_ablation(options, overrides), time.monotonic()
    ablation.claim_folder()
    ablation.train_all()
    results = evaluate_all(ablation)
    text, minutes = ablation_table(results), (time.monotonic() - start) / 60
    write_json(ablation.out / "ablation.json", {"settings": ablation.settings(), "results": results})
    (ablation.out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{minutes:.1f} minutes; {ablation.out}/ablation.json, ablation.md")


if __name__ == "__main__":
    sys.exit(main())
