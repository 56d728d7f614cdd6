"""Builds the steps of a pipeline or sweep. Finds a user's mistakes before anything is submitted."""

from itertools import product
from pathlib import Path

from d2s.launchers.executors import Step
from d2s.training.config import override
from d2s.training.recipes import RECIPES, find_recipe

SCENES = ["--source", "scenes", "--count", "train=4000,val=500,test=500", "--size", "64"]


def find_data(
    recipe: str, data: Path | None, build: list[str], out: Path, workers: int
) -> tuple[Path, list[Step]]:
    """Returns the folder of the data set, and a list with the step that builds it; [] if nothing is to be built.

    data: the data set. If a data set is to be built, the folder for it (default: `out`/data).
    build: arguments of `d2s.shard build`. If `build` is empty, `data` must name an existing data set. Only for a
        scenes recipe without `data`, the default scenes are built. workers: number of processes that build.

    Raises ValueError if `data` is no data set, if both are missing, or if `build` has an option that is set here.
    """
    if not build and data is not None:
        if not (data / "manifest.parquet").is_file():
            raise ValueError(
                f"--data {data}: has no manifest.parquet; name a data set, or say how to --build it"
            )
        return data, []
    if not build and not recipe.startswith("scenes_"):
        raise ValueError(
            f"--data: missing; {recipe} needs a data set, or --build with the arguments of d2s.shard build"
        )
    for option in ("--out", "--workers", "--resume"):
        if option in build:
            raise ValueError(
                f"--build: {option} is set by the pipeline; leave it out (--data names the folder)"
            )
    data = data or out / "data"
    command = ["shard", "build", *(build or SCENES), "--out", str(data), "--workers", str(workers)]
    return data, [Step("shards", [[*command, "--resume"]])]


def as_options(settings: list[str]) -> list[str]:
    """Returns settings `FIELD=VALUE` as options of the training command. Raises ValueError if a `=` is missing."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"{setting!r}: is not FIELD=VALUE, as in optim.lr=1e-4")
    return [f"--{setting}" for setting in settings]


def pipeline(recipe: str, data: Path, steps: list[Step], out: Path, options: list[str]) -> list[Step]:
    """Returns `steps` followed by the steps pretrain, finetune and evaluate.

    recipe: common prefix of the names of the pre-training and the fine-tuning recipe, as in scenes_small.
    steps: the steps that build the data set. options: options for both trainings, which override fields.

    Raises ValueError if one of the recipes does not exist, or if an option is invalid for one of them.
    """
    for suffix in ("pretrain", "finetune"):
        if f"{recipe}_{suffix}" not in RECIPES:
            prefixes = {name.rsplit("_", 1)[0] for name in RECIPES if name.endswith("_pretrain")}
            raise ValueError(
                f"recipe {recipe!r}: no {recipe}_{suffix}; a pipeline takes one of {', '.join(sorted(prefixes))}"
            )
        override(find_recipe(f"{recipe}_{suffix}"), options)
    pretrain, finetune = out / "pretrain", out / "finetune"
    first = _training(f"{recipe}_pretrain", pretrain, ["--data", str(data), *options])
    second = _training(f"{recipe}_finetune", finetune, ["--init", str(pretrain), *options])
    evaluate = ["evaluate", "--model", str(finetune / "best"), "--data", str(data), "--split", "test"]
    evaluate += ["--json", str(out / "test.json")]
    return [
        *steps,
        Step("pretrain", [first], after=[step.name for step in steps], wide=True),
        Step("finetune", [second], after=["pretrain"], wide=True),
        Step("evaluate", [evaluate], after=["finetune"], gpu=True),
    ]


def _training(recipe: str, run: Path, options: list[str]) -> list[str]:
    return ["train", recipe, *options, "--run", str(run), "--resume"]


def sweep(
    recipe: str, data: Path | None, steps: list[Step], init: Path | None, out: Path,
    points: list[dict[str, str]], options: list[str],
) -> list[Step]:  # fmt: skip
    """Returns `steps` followed by a step that trains `recipe` once for each grid point.

    data: the data set; None to use the data set of `init`. options: options of all trainings.
    init: the stage-1 run to start from. If it is None and the recipe needs one, a pre-training step is added.
    points: for each training, the values of the fields in the grid.

    Raises ValueError if the recipe does not exist, if a field or value is invalid, or if `init` is no run.
    """
    options_of = [[*options, *as_options([f"{k}={v}" for k, v in point.items()])] for point in points]
    configs = [override(find_recipe(recipe), point_options) for point_options in options_of]
    inputs = ["--data", str(data)] if data else []
    if configs[0].stage == "finetune" and not recipe.endswith("_align"):
        if init is None:
            sibling = recipe.replace("finetune", "pretrain")
            if sibling not in RECIPES:
                raise ValueError(f"--init: missing; {recipe} starts from a stage-1 run")
            override(find_recipe(sibling), options)
            init = out / "pretrain"
            pretrain = _training(sibling, init, [*inputs, *options])
            steps = [*steps, Step("pretrain", [pretrain], after=[step.name for step in steps], wide=True)]
        elif not (init / "config.json").is_file():
            raise ValueError(f"--init {init}: holds no run or model")
        inputs = ["--init", str(init), *inputs]
    elif init is not None:
        raise ValueError(f"--init {init}: {recipe} starts from no other run; leave it out")
    commands = [
        _training(recipe, out / f"run-{number}", [*inputs, *point_options])
        for number, point_options in enumerate(options_of)
    ]
    return [*steps, Step("train", commands, after=[step.name for step in steps[-1:]], wide=True)]


def grid_points(grid: list[str]) -> list[dict[str, str]]:
    """Returns all combinations of the values in `FIELD=V1,V2,...`. The last field changes fastest."""
    if not grid:
        raise ValueError("--grid: missing; name at least one field and its values, as in optim.lr=1e-4,2e-4")
    axes: dict[str, list[str]] = {}
    for axis in grid:
        name, equals, text = axis.partition("=")
        values = [value for value in text.split(",") if value]
        if not equals or not values:
            raise ValueError(f"--grid {axis!r}: is not FIELD=VALUE,VALUE,...")
        if name in axes:
            raise ValueError(f"--grid: {name} is given twice; put all its values into one")
        axes[name] = values
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
