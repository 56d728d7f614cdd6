"""Small sources made on the spot: pictures that differ, captions that say which picture they belong to."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from d2s.shards.cli import main


def picture(number: int, size: tuple[int, int] = (40, 32), form: str = "JPEG") -> bytes:
    """An encoded picture of `size` pixels, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(file, form)
    return file.getvalue()


class Karpathy:
    """A folder with images, Karpathy's JSON and dense JSON lines, to be spoilt before it is built."""

    def __init__(self, root: Path, counts: dict[str, int]) -> None:
        self.root, self.images, self.captions = root, root / "images", root / "captions.json"
        self.dense = root / "dense.jsonl"
        self.images.mkdir(parents=True)
        splits = [split for split, count in counts.items() for _ in range(count)]
        self.rows = [
            {
                "filename": f"photo.{number}.jpg",
                "split": split,
                "imgid": 100 + number,
                "sentences": [
                    {"raw": f"caption {caption} of photo {number}"} for caption in range(2 + number % 2)
                ],
            }
            for number, split in enumerate(splits)
        ]
        self.long = [
            {"filename": row["filename"], "text": f"All about {row['filename']}."} for row in self.rows
        ]
        for number, row in enumerate(self.rows):
            (self.images / row["filename"]).write_bytes(picture(number))

    def write(self) -> None:
        """Writes the caption files as they stand now."""
        self.captions.write_text(json.dumps({"images": self.rows}), encoding="utf-8")
        self.dense.write_text("".join(json.dumps(row) + "\n" for row in self.long), encoding="utf-8")

    def arguments(self, out: Path, *more: str) -> list[str]:
        """The command line that builds it."""
        paths = ["--captions", str(self.captions), "--images", str(self.images), "--dense", str(self.dense)]
        return ["build", "--source", "karpathy", *paths, "--shard-size", "4", "--out", str(out), *more]

    def build(self, out: Path, *more: str) -> int:
        """Writes the caption files and builds; returns the exit code."""
        self.write()
        return main(self.arguments(out, *more))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
