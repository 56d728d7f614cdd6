"""Which jobs a pipeline and a sweep are made of. Everything that can be wrong is said before any is submitted."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from d2s.common.files import read_json
from d2s.launchers.executors import Step
from d2s.training.config import TrainConfig, override
from d2s.training.recipes import RECIPES, find_recipe

SCENES = ["--source", "scenes", "--count", "train=4000,val=500,test=500", "--size", "64"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data is, or how it is built: the arguments of `d2s.shard build` other than --out and --workers."""

    data: Path
    build: tuple[str, ...] = ()
    workers: int = 1

    def steps(self) -> list[Step]:
        """The job that builds the data, where there is something to build."""
        if not self.build:
            return []
        command = ["shard", "build", *self.build, "--out", str(self.data), "--workers", str(self.workers)]
        return [Step("shards", [[*command, "--resume"]])]


def source(recipe: str, data: Path | None, build: list[str], out: Path, workers: int) -> Source:
    """The data for a recipe: that of --data, or built by --build, or scenes where the recipe is made for them."""
    if build:
        for option in ("--out", "--workers", "--resume"):
            if option in build:
                raise ValueError(
                    f"--build: {option} is set by the pipeline; leave it out (--data names the folder)"
                )
        return Source(data=data or out / "data", build=tuple(build), workers=workers)
    if data is not None:
        if not (data / "manifest.parquet").is_file():
            raise ValueError(
                f"--data {data}: has no manifest.parquet; name a data set, or say how to --build it"
            )
        return Source(data=data)
    if recipe.startswith("scenes_"):
        return Source(data=out / "data", build=tuple(SCENES), workers=workers)
    raise ValueError(
        f"--data: missing; {recipe} needs a data set, or --build with the arguments of d2s.shard build"
    )


def stage(recipe: str, settings: list[str]) -> TrainConfig:
    """The configuration of a recipe under settings `FIELD=VALUE`; ValueError for what does not exist or fit."""
    return override(find_recipe(recipe), as_options(settings))


def as_options(settings: list[str]) -> list[str]:
    """`FIELD=VALUE` as the training command takes it."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"{setting!r}: is not FIELD=VALUE, as in optim.lr=1e-4")
    return [f"--{setting}" for setting in settings]


def pipeline(recipe: str, found: Source, out: Path, settings: list[str]) -> list[Step]:
    """Shards, pre-training, fine-tuning, evaluation. `recipe` is the common beginning: scenes_small.

    Raises ValueError where there are no two such recipes, or a setting does not fit one of them.
    """
    for suffix in ("pretrain", "finetune"):
        if f"{recipe}_{suffix}" not in RECIPES:
            stem = {name.rsplit("_", 1)[0] for name in RECIPES if name.endswith("_pretrain")}
            raise ValueError(
                f"recipe {recipe!r}: no {recipe}_{suffix}; a pipeline takes one of {', '.join(sorted(stem))}"
            )
        stage(f"{recipe}_{suffix}", settings)
    steps = found.steps()
    options = as_options(settings)
    pretrain, finetune = out / "pretrain", out / "finetune"
    steps.append(
        _train("pretrain", f"{recipe}_pretrain", pretrain, ["--data", str(found.data), *options], steps)
    )
    steps.append(
        _train("finetune", f"{recipe}_finetune", finetune, ["--init", str(pretrain), *options], steps)
    )
    table = ["evaluate", "--model", str(finetune / "best"), "--data", str(found.data), "--split", "test"]
    steps.append(Step("evaluate", [[*table, "--json", str(out / "test.json")]], after=["finetune"], gpu=True))
    return steps


def _train(name: str, recipe: str, run: Path, arguments: list[str], before: list[Step]) -> Step:
    command = ["train", recipe, *arguments, "--run", str(run), "--resume"]
    return Step(name, [command], after=[step.name for step in before[-1:]], wide=True)


def sweep(
    recipe: str, found: Source | None, init: Path | None, out: Path, grid: list[str], settings: list[str]
) -> tuple[list[Step], list[dict[str, str]]]:
    """An array of trainings over the grid, and what each point sets.

    grid: `FIELD=V1,V2,...` each. A fine-tuning recipe without `init` is preceded by its pre-training, once.
    found: None for the data of `init`.
    Raises ValueError for a recipe, a field or a value that does not fit, before anything runs.
    """
    points = grid_points(grid)
    for point in points:
        config = stage(recipe, [*settings, *(f"{name}={value}" for name, value in point.items())])
    steps = found.steps() if found else []
    arguments = ["--data", str(found.data)] if found else []
    if config.stage == "finetune" and not recipe.endswith("_align"):
        if init is None:
            sibling = recipe.replace("finetune", "pretrain")
            if sibling not in RECIPES:
                raise ValueError(f"--init: missing; {recipe} starts from a stage-1 run")
            init = out / "pretrain"
            stage(sibling, settings)
            steps.append(_train("pretrain", sibling, init, [*arguments, *as_options(settings)], steps))
        elif not (init / "config.json").is_file():
            raise ValueError(f"--init {init}: holds no run or model")
        arguments = ["--init", str(init), *arguments]
    elif init is not None:
        raise ValueError(f"--init {init}: {recipe} starts from no other run; leave it out")
    commands = []
    for number, point in enumerate(points):
        options = as_options([*settings, *(f"{name}={value}" for name, value in point.items())])
        commands.append(
            ["train", recipe, *arguments, *options, "--run", str(out / f"run-{number}"), "--resume"]
        )
    steps.append(Step("train", commands, after=[step.name for step in steps[-1:]], wide=True))
    return steps, points


def grid_points(grid: list[str]) -> list[dict[str, str]]:
    """Every combination of the values of `FIELD=V1,V2,...`, the last field changing fastest."""
    if not grid:
        raise ValueError("--grid: missing; name at least one field and its values, as in optim.lr=1e-4,2e-4")
    axes = []
    for axis in grid:
        name, equals, values = axis.partition("=")
        choices = [value for value in values.split(",") if value]
        if not equals or not choices:
            raise ValueError(f"--grid {axis!r}: is not FIELD=VALUE,VALUE,...")
        if name in [known for known, _ in axes]:
            raise ValueError(f"--grid: {name} is given twice; put all its values into one")
        axes.append((name, choices))
    names = [name for name, _ in axes]
    return [dict(zip(names, values, strict=True)) for values in product(*(choices for _, choices in axes))]


def sweep_table(points: list[dict[str, str]], out: Path) -> str:
    """What each point reached on the validation split (never the test split: it is what one chooses by)."""
    names = list(points[0])
    rows = [[*names, "val rSum", "at step", "steps", "run"]]
    best: list[float | None] = []
    for number, point in enumerate(points):
        run = out / f"run-{number}"
        score, step, last = _scores(run)
        best.append(score)
        shown = ["-" if value is None else f"{value:g}" for value in (score, step, last)]
        if score is not None:
            shown[0] = f"{score:.1f}"
        rows.append([*(point[name] for name in names), *shown, str(run)])
    known = [score for score in best if score is not None]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row, score in zip(rows, [None, *best], strict=True):
        mark = "  best" if known and score == max(known) and score is not None else ""
        lines.append("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) + mark)
    return "\n".join(lines)


def _scores(run: Path) -> tuple[float | None, int | None, int | None]:
    """Best rSum on val and its step, by the run's newest checkpoint, and the step it came to."""
    markers = sorted(run.glob("checkpoints/step-*/complete.json"))
    if not markers:
        return None, None, None
    state = read_json(markers[-1])
    best = state.get("best") or {}
    return best.get("rsum"), best.get("step"), state.get("step")
