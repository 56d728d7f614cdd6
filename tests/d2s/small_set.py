"""A small data set and a small random model, for the tests of evaluation and report."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from d2s.model import D2SModel, ModelConfig, build_word_tokenizer, presets
from d2s.shards.cli import main

WORDS = [
    "red",
    "green",
    "blue",
    "dog",
    "cat",
    "bird",
    "tree",
    "house",
    "car",
    "river",
    "<b>bold</b>",
    "runs",
    "stands",
    "near",
    "under",
    "small",
    "large",
]


def captions(number: int, count: int, length: int) -> tuple[str, ...]:
    """Captions that differ from image to image and hold what has to be escaped in HTML."""
    draw = np.random.Generator(np.random.PCG64(number))
    return tuple(f"{number} " + " ".join(draw.choice(WORDS, length)) + ' & "more"' for _ in range(count))


def make_set(folder: Path, splits: dict[str, list[int]]) -> Path:
    """Builds `folder`/data: for each split one image per number, which is its count of sparse captions."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    images, long = [], []
    for split, counts in splits.items():
        for count in counts:
            number = len(images)
            pixels = np.random.Generator(np.random.PCG64(number)).integers(0, 255, (4, 5, 3), dtype=np.uint8)
            name = f"{number:03d}.png"
            Image.fromarray(pixels).resize((40, 32)).save(pictures / name)
            sentences = [{"raw": text} for text in captions(number, count, 4)]
            images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences})
            long.append({"filename": name, "text": captions(number, 1, 20)[0]})
    (folder / "captions.json").write_text(json.dumps({"images": images}))
    (folder / "dense.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    out = folder / "data"
    code = main(
        f"build --source karpathy --captions {folder}/captions.json --images {pictures}"
        f" --dense {folder}/dense.jsonl --out {out}".split()
    )
    assert code == 0
    return out


def make_model(width: int = 16) -> D2SModel:
    """Random weights; the same at each call."""
    import torch

    torch.manual_seed(0)
    tokenizer = build_word_tokenizer([text for number in range(40) for text in captions(number, 1, 20)])
    config = ModelConfig(
        width=width,
        image_size=32,
        image_encoder=presets.small_resnet((8, 8, 8, 8)),
        text_encoder=presets.small_bert(16, 1),
    )
    return D2SModel(config, tokenizer).eval()
