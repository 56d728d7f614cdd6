"""A run folder as the report reads it: settings, rows of metrics, evaluations."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2s.common.files import read_json
from d2s.common.progress import clock
from d2s.evaluate.metrics import Recall, Retrieval
from d2s.report.checks import check_numbers
from d2s.training.run_log import read_rows


@dataclass(frozen=True, kw_only=True)
class RecallRow:
    """A row of the recall table."""

    run: str
    split: str
    captions: str
    """sparse, dense, or the mean of folds."""
    retrieval: Retrieval


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says about itself."""

    path: Path
    name: str
    config: dict[str, Any]
    """config.json as it is."""
    rows: list[dict[str, Any]]
    """Of metrics.jsonl."""
    evaluations: list[tuple[str, dict[str, Any]]]
    """(split, numbers) of the files that `d2s.evaluate --json` left in the run folder."""

    @property
    def train(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.rows if row["kind"] == "train" and "epoch" in row]

    @property
    def aligned(self) -> str:
        """The captions that the stage aligns, by which its best model was chosen: dense or sparse."""
        return "dense" if self._settings().get("stage") == "pretrain" else "sparse"

    @property
    def what(self) -> str:
        """Recipe, stage and data in one line."""
        settings = self._settings()
        parts = [settings.get("recipe"), settings.get("stage"), self.config.get("data")]
        return ", ".join(str(part) for part in parts if part)

    def _settings(self) -> dict[str, Any]:
        values = self.config.get("config", self.config)
        return values if isinstance(values, dict) else {}

    def facts(self) -> list[tuple[str, str, str]]:
        """(value, name, more) of the run's size."""
        found = []
        if self.train:
            last, seconds = self.train[-1], sum(row.get("seconds", 0) for row in self.train)
            found.append((f"{last['step']:,}", "steps", f"{last['epoch']:.4g} epochs"))
            form = "h:mm:ss" if seconds >= 3600 else "m:ss"
            found.append((clock(seconds), "training", f"{form}, without validation"))
            speeds = [row["samples_per_s"] for row in self.train if "samples_per_s" in row]
            if speeds:
                found.append((f"{statistics.median(speeds):,.0f}", "samples/s", "median"))
        return found

    def validations(self) -> list[tuple[float, float]]:
        """(epoch, rSum of the captions that the stage aligns) of each validation."""
        rows = [row for row in self.rows if row["kind"] == "val"]
        scored = [(row.get("epoch", row["step"]), self._score(row)) for row in rows]
        return [(float(epoch), score) for epoch, score in scored if score is not None]

    def _score(self, row: dict[str, Any]) -> float | None:
        part = row.get("dense") or {} if self.aligned == "dense" else row
        return part.get("rsum", row.get("rsum"))

    def recall_rows(self) -> list[RecallRow]:
        """The best validation, then every evaluation of another split, each kind of captions a row."""
        found = []
        validated = [row for row in self.rows if row["kind"] == "val" and self._score(row) is not None]
        if validated:
            best = max(validated, key=self._score)
            found += self.rows_of(f"val, best (epoch {best.get('epoch', 0):.3g})", best)
        tests = [(str(row.get("split", "test")), row) for row in self.rows if row["kind"] == "test"]
        # The newest evaluation of a split counts.
        for split, row in dict([*tests, *self.evaluations]).items():
            found += self.rows_of(split, row)
        return found

    def rows_of(self, split: str, numbers: dict[str, Any]) -> list[RecallRow]:
        """The rows of one `Evaluation.to_dict()`."""
        folds = numbers.get("folds")
        kinds = [("sparse", numbers), ("dense", numbers.get("dense"))]
        if folds:
            kinds.insert(1, (f"sparse, {folds['number']} folds", folds))
        return [
            RecallRow(run=self.name, split=split, captions=kind, retrieval=_retrieval(part))
            for kind, part in kinds
            if part and "i2t" in part
        ]

    def settings(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Groups of (name, value), for people."""
        groups: dict[str, list[tuple[str, str]]] = {"run": []}
        for name, value in self.config.items():
            if name != "config":
                groups["run"].append((name, _text(value)))
        for name, value in self._settings().items():
            if isinstance(value, dict):
                groups[name] = _flat(value)
            elif "config" in self.config:
                groups["run"].append((name, _text(value)))
        return [(name, values) for name, values in groups.items() if values]


def read_run(path: Path) -> Run:
    """Reads a run folder.

    Raises:
        ValueError: no such folder, no config.json and no metrics.jsonl in it, a file that cannot be read, or one
            whose values have a wrong type.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    if not (path / "config.json").is_file() and not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} is no run: it has neither config.json nor metrics.jsonl")
    config = _read_config(path / "config.json")
    rows = _read_metrics(path)
    evaluations = []
    for file in sorted(path.glob("*.json")):
        value = read_json(file)
        if isinstance(value, dict) and "split" in value and ("i2t" in value or "dense" in value):
            check_numbers(value, str(file))
            evaluations.append((str(value["split"]), value))
    return Run(path=path, name=path.resolve().name, config=config, rows=rows, evaluations=evaluations)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: is a JSON {type(config).__name__}, not a run's settings: mend or remove it"
        )
    if not isinstance(config.get("data") or "", str):
        raise ValueError(f"{path}: data is {config['data']!r}: it must be the path of a data set")
    return config


def _read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that have a kind and a step. Raises ValueError naming the file and the line."""
    path = run / "metrics.jsonl"
    try:
        rows = read_rows(run)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}): mend or remove it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text: mend or remove its line") from None
    for number, row in enumerate(rows, 1):
        where = f"{path} line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: is {row!r}, not a row of metrics: mend or remove it")
        check_numbers(row, where)
    return [row for row in rows if "kind" in row and "step" in row]


def _retrieval(part: dict[str, Any]) -> Retrieval:
    """The reverse of `Retrieval.to_dict`; what a file lacks is not a number."""
    nan = float("nan")

    def one(way: str) -> Recall:
        def value(name: str, missing: float = nan) -> float:
            return part.get(name, {}).get(way, missing)

        chance = tuple(part.get("chance", {}).get(way, (nan,) * 3))
        return Recall(
            hits=tuple(part[way]),
            chance=chance,
            median_rank=value("median_rank"),
            mean_rank=value("mean_rank"),
            queries=int(value("queries", 0)),
            candidates=0,
        )

    return Retrieval(i2t=one("i2t"), t2i=one("t2i"))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
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
