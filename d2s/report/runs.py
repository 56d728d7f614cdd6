"""Reads the settings, metrics and evaluations in a run folder for the report."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2s.common.files import read_json
from d2s.common.progress import clock
from d2s.evaluate.metrics import Recall, Retrieval
from d2s.training.run_log import read_rows


@dataclass(frozen=True, kw_only=True)
class RecallRow:
    """A row of the recall table."""

    run: str
    split: str
    captions: str
    """Captions that were used: "sparse", "dense", or "sparse, 5 folds" for the mean over five folds."""
    retrieval: Retrieval


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parsed files of a run folder."""

    path: Path
    name: str
    config: dict[str, Any]
    """The content of config.json. It is empty if the file does not exist."""
    rows: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    evaluations: list[tuple[str, dict[str, Any]]]
    """(split, results) from each file in the run folder that `d2s.evaluate --json` wrote."""

    @property
    def fields(self) -> dict[str, Any]:
        """The configuration of the training. Maps each field to its value."""
        return self.config.get("config", {})

    @property
    def aligned(self) -> str:
        """The captions, "dense" or "sparse", that the stage aligns and that choose the best model."""
        return "dense" if self.fields.get("stage") == "pretrain" else "sparse"

    @property
    def description(self) -> str:
        """A line of text that names recipe, stage and data set."""
        parts = [self.fields.get("recipe"), self.fields.get("stage"), self.config.get("data")]
        return ", ".join(str(part) for part in parts if part)

    def facts(self) -> list[tuple[str, str, str]]:
        """Returns (value, name, note) for the number of training steps, the training time and the speed."""
        rows = self._rows("train")
        if not rows:
            return []
        seconds = sum(row.get("seconds", 0) for row in rows)
        form = "h:mm:ss" if seconds >= 3600 else "m:ss"
        found = [
            (f"{rows[-1]['step']:,}", "steps", f"{rows[-1]['epoch']:.4g} epochs"),
            (clock(seconds), "training", f"{form}, without validation"),
        ]
        speeds = [row["samples_per_s"] for row in rows if "samples_per_s" in row]
        if speeds:
            found.append((f"{statistics.median(speeds):,.0f}", "samples/s", "median"))
        return found

    def points(self, field: str) -> list[tuple[float, float]]:
        """Returns (epoch, value of `field`) for each logged training step, or an empty list if all are 0."""
        found = [(row["epoch"], row[field]) for row in self._rows("train") if field in row]
        return found if any(value for _, value in found) else []

    def validations(self) -> list[tuple[float, float]]:
        """Returns (epoch, rSum) of each validation. The rSum is on the captions that the stage aligns."""
        return [(row["epoch"], self._score(row)) for row in self._rows("val")]

    def recall_rows(self) -> list[RecallRow]:
        """Returns the table's rows for this run: its best validation, and the last evaluation of each split."""
        found = []
        validated = self._rows("val")
        if validated:
            best = max(validated, key=self._score)
            found += self.rows_of(f"val, best (epoch {best['epoch']:.3g})", best)
        for split, numbers in dict(self.evaluations).items():
            found += self.rows_of(split, numbers)
        return found

    def rows_of(self, split: str, numbers: dict[str, Any]) -> list[RecallRow]:
        """Returns the table rows for `numbers`, which has the form that `Evaluation.to_dict()` returns."""
        kinds = [("sparse", numbers), ("dense", numbers.get("dense"))]
        if folds := numbers.get("folds"):
            kinds.insert(1, (f"sparse, {folds['number']} folds", folds))
        return [
            RecallRow(run=self.name, split=split, captions=kind, retrieval=_retrieval(part))
            for kind, part in kinds
            if part and "i2t" in part
        ]

    def settings(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Returns (group, [(name, value), ...]) for each group of settings. Values are text."""
        groups = {"run": _flat({name: value for name, value in self.config.items() if name != "config"})}
        for name, value in self.fields.items():
            if isinstance(value, dict):
                groups[name] = _flat(value)
            else:
                groups["run"] += _flat({name: value})
        return [(name, values) for name, values in groups.items() if values]

    def _rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]

    def _score(self, row: dict[str, Any]) -> float:
        return row["dense"]["rsum"] if self.aligned == "dense" else row["rsum"]


def read_run(path: Path) -> Run:
    """Reads a run folder.

    Raises:
        ValueError: the folder is missing, has neither config.json nor metrics.jsonl, or has a file with broken JSON.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    if not (path / "config.json").is_file() and not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} is no run: it has neither config.json nor metrics.jsonl")
    try:
        rows = read_rows(path)
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(
            f"{path / 'metrics.jsonl'} has a line that is not JSON ({error}): mend or remove it"
        ) from None
    files = {file.name: read_json(file) for file in sorted(path.glob("*.json"))}
    evaluations = [
        (values["split"], values)
        for values in files.values()
        if isinstance(values, dict) and "split" in values and ("i2t" in values or "dense" in values)
    ]
    config = files.get("config.json", {})
    return Run(path=path, name=path.resolve().name, config=config, rows=rows, evaluations=evaluations)


def _retrieval(numbers: dict[str, Any]) -> Retrieval:
    """Builds a `Retrieval` from the result of `Retrieval.to_dict`. Sets the number of candidates to 0."""

    def direction(name: str) -> Recall:
        return Recall(
            hits=tuple(numbers[name]),
            chance=tuple(numbers["chance"][name]),
            median_rank=numbers["median_rank"][name],
            mean_rank=numbers["mean_rank"][name],
            queries=numbers["queries"][name],
            candidates=0,
        )

    return Retrieval(i2t=direction("i2t"), t2i=direction("t2i"))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns (name, text) of every value. Nested values have names joined by dots, such as "optim.lr"."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", _text(value)))
    return found


def _text(value: object) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
