"""Reads and checks the options of the plan: recipe, workers, memory and data set."""

import argparse
import math
from dataclasses import dataclass

from d2s.model import build_word_tokenizer
from d2s.plan.sizes import by_shape
from d2s.shards.format.manifest import read_manifest
from d2s.shards.order.permutation import steps_per_epoch
from d2s.shards.read.index import ShardIndex
from d2s.training.config import TrainConfig, override
from d2s.training.engine import bucket_size, engine_settings
from d2s.training.recipes import find_recipe
from d2s.workers.group import local_batch

GIB = 2**30
# (training images, sparse captions) without --data: in Karpathy's splits, or in the scenes of `make demo`.
_USUAL_SIZES = {
    "f30k": (29_000, 145_000),
    "coco": (113_287, 566_747),
    "flickr8k": (6_000, 30_000),
    "scenes": (4_000, 4_000),
}
_BERT_VOCABULARY, _SCENES_VOCABULARY = 30_522, 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """The training to plan."""

    config: TrainConfig
    workers: int
    memory: int
    """Bytes of memory that each worker's device has."""
    items: int
    """Number of images or of image-caption pairs in an epoch."""
    items_text: str
    """`items` in words, such as "29,000 images, the usual size of f30k"."""
    vocabulary: int
    """Number of tokens in the vocabulary. It is used only if the vocabulary is built from captions."""
    bucket: int
    """Size of DeepSpeed's communication bucket, in numbers of 4 bytes."""

    @property
    def local_batch(self) -> int:
        return self.config.batch_size // self.workers


def read_request(options: argparse.Namespace, overrides: list[str]) -> Request:
    """Builds the request from the command line. Raises ValueError for wrong or contradictory options."""
    config = by_shape(override(find_recipe(options.recipe), overrides))
    local = local_batch(config.batch_size, options.gpus)
    if not 0 < options.memory * GIB < math.inf:
        raise ValueError(f"--memory {options.memory:g}: give the memory of a GPU in GiB, a number above 0")
    if options.throughput is not None and not 0 < options.throughput < math.inf:
        raise ValueError(f"--throughput {options.throughput:g}: give pairs a second over all GPUs, above 0")
    items, items_text, vocabulary = _measure_data(config, options)
    try:
        steps_per_epoch(items, config.batch_size)
    except ValueError as error:  # the training would raise this error, too
        raise ValueError(f"{error} ({items_text})") from error
    settings = engine_settings(config.engine, local, config.optim.grad_clip)
    return Request(
        config=config, workers=options.gpus, memory=int(options.memory * GIB), items=items,
        items_text=items_text, vocabulary=vocabulary, bucket=bucket_size(settings),
    )  # fmt: skip


def _measure_data(config: TrainConfig, options: argparse.Namespace) -> tuple[int, str, int]:
    """Returns `items`, `items_text` and `vocabulary` for --data or, without it, for the usual data set."""
    pairs = config.stage == "finetune" and config.data.sparse == "all"
    kind = "image-caption pairs" if pairs else "images"
    if options.data is None:
        family = options.recipe.split("_")[0]
        items = _USUAL_SIZES[family][pairs]
        vocabulary = _SCENES_VOCABULARY if family == "scenes" else _BERT_VOCABULARY
        return items, f"{items:,} {kind}, the usual size of {family}", vocabulary
    index = ShardIndex.open(options.data)
    table = read_manifest(index.root, columns=["sparse", "dense"], split="train").to_pylist()
    vocabulary = len(build_word_tokenizer(text for row in table for text in [*row["sparse"], *row["dense"]]))
    items = index.n_sparse_total("train") if pairs else len(index.rows("train"))
    return items, f"{items:,} {kind} of {options.data}", vocabulary
