"""Builds the table that `python -m d2s.ablate` prints."""

from statistics import mean, median, stdev


def ablation_table(results: list[dict]) -> str:
    """Returns a Markdown table. Training steps and time include pre-training. Time is the median over the seeds.

    results: the return value of `d2s.ablate.evaluate_all`. Its first entry is the row "pre-training alone".
    """
    pretraining = results[0]["runs"]
    lines = ["| row | steps | test rSum | val rSum | training time |", "|---|---|---|---|---|"]
    for result in results:
        runs = result["runs"]
        steps, seconds = runs[0]["steps"], median(run["train_seconds"] for run in runs)
        if result["pretrained"]:
            steps += pretraining[0]["steps"]
            seconds += median(run["train_seconds"] for run in pretraining)
        name = result["row"] + (" (control)" if result["control"] else "")
        test, val = (_spread([run[key] for run in runs]) for key in ("test_rsum", "val_rsum"))
        lines.append(f"| {name} | {steps} | {test} | {val} | {seconds:.0f} s |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} +- {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"
