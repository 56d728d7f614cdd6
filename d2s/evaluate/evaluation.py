"""Measures a model on a split: retrieval with sparse and with dense captions, folds, information capacity.

Each image and each caption is embedded once. The embeddings come from the functions that `encode_image` and
`encode_text` use, so the measures hold for the embeddings that users get.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.console import Group
from rich.text import Text

from d2s.data.config import DataConfig
from d2s.evaluate.capacity import measure_capacity
from d2s.evaluate.embed import Embeddings, embed_split
from d2s.evaluate.metrics import Retrieval, fold_report, recall_report
from d2s.evaluate.tables import capacity_table, recall_table
from d2s.model import D2SModel
from d2s.shards.read.index import ShardIndex

FOLD = 1000  # number of images in a fold, as in COCO 1K


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Holds the measures that `evaluate_model` computes on one split."""

    split: str
    images: int
    captions: int
    """Number of sparse captions."""
    dense_captions: int
    """Number of dense captions. It is 0 if the split has none, or if they were not requested."""
    without_captions: int
    """Number of images without a sparse caption. They are candidates for captions, but not queries."""
    truncated: int
    """Number of sparse and dense captions that were cut, because they had too many word pieces."""
    sparse: Retrieval | None
    """Retrieval with sparse captions. None if the split has no sparse caption."""
    dense: Retrieval | None
    """Retrieval with dense captions. None if `dense_captions` is 0."""
    folds: int
    """Number of folds in `folded`, or 0 if there are none."""
    folded: Retrieval | None
    """Mean over the folds, with sparse captions. On COCO's 5,000 test images, 5 folds give "COCO 1K"."""
    capacity: dict[str, float]
    """Measures of information capacity by name (`d2s.evaluate.capacity`). Empty if not requested."""
    seconds: float
    """Wall-clock time in seconds, including embedding."""

    @property
    def rsum(self) -> float:
        """Returns rSum with sparse captions, at most 600. It is NaN if the split has no sparse caption."""
        return self.sparse.rsum if self.sparse else math.nan

    def to_dict(self) -> dict:
        """Returns a dictionary that can be written as JSON. Measures that are None are left out."""
        counts = ("split", "images", "captions", "dense_captions", "without_captions", "truncated")
        result = {name: getattr(self, name) for name in counts} | {"seconds": round(self.seconds, 3)}
        if self.sparse:
            result |= self.sparse.to_dict()
        if self.dense:
            result["dense"] = self.dense.to_dict()
        if self.folded:
            result["folds"] = {"number": self.folds, **self.folded.to_dict()}
        if self.capacity:
            # JSON cannot store NaN, so None replaces it.
            finite = {name: value if math.isfinite(value) else None for name, value in self.capacity.items()}
            result["capacity"] = finite
        return result

    def renderable(self) -> Group:
        """Returns the tables to print on a rich console."""
        rows = [
            ("sparse captions", self.sparse),
            (f"sparse, mean of {self.folds} folds", self.folded),
            ("dense captions", self.dense),
        ]
        captions = f"{self.captions:,} sparse, {self.dense_captions:,} dense captions"
        title = f"{self.split}: {self.images:,} images, {captions}"
        parts = [recall_table([row for row in rows if row[1]], title)]
        if self.capacity:
            parts.append(capacity_table(self.capacity))
        if self.without_captions:
            parts.append(
                Text(
                    f"{self.without_captions} images have no sparse caption: no queries of image->text, but"
                    " candidates of text->image"
                )
            )
        if self.truncated:
            parts.append(Text(f"{self.truncated} captions were longer than the limit of word pieces and cut"))
        return Group(*parts)


def evaluate_model(
    model: D2SModel,
    index: ShardIndex,
    split: str,
    *,
    data_config: DataConfig,
    batch_size: int = 128,
    dense: bool = True,
    full: bool = True,
    folds: int | None = None,
    poll: Callable[[], None] | None = None,
) -> Evaluation:
    """Embeds a split and measures retrieval. The result does not depend on the number of workers.

    All workers must call this together. Afterwards the model is in its previous mode (training or eval).

    Args:
        data_config: the `config` of `embed_split`. See there also for `batch_size`, `dense` and `poll`.
        full: if True, the folds and the information capacity are measured too.
        folds: number of folds. 0 means none. None means folds of 1,000 images if the split has 2,000, 3,000,
            ... images, else none. The images are sorted by id and then cut into folds. The Karpathy file of
            COCO has another order, so its folds for COCO 1K are different.

    Raises ValueError if the split does not exist or has no caption, if `folds` does not divide the number of
    images, or if an embedding is not finite.
    """
    start = time.monotonic()
    if full:
        choose_folds(len(index.rows(split)), folds)
    embedded = embed_split(
        model,
        index,
        split,
        config=data_config,
        batch_size=batch_size,
        dense=dense,
        poll=poll,
    )
    result = evaluate_embeddings(embedded, index, split, full=full, folds=folds)
    return replace(result, seconds=time.monotonic() - start)


def evaluate_embeddings(
    embedded: Embeddings, index: ShardIndex, split: str, *, full: bool = True, folds: int | None = None
) -> Evaluation:
    """Measures a split that is already embedded. For arguments and errors, see `evaluate_model`."""
    start = time.monotonic()
    sets = {"sparse": embedded.sparse, "dense": embedded.dense}
    sets = {kind: texts for kind, texts in sets.items() if texts is not None}
    if not sets:
        raise ValueError(f"split {split!r} of {index.root} has no caption: choose another split")
    images = len(embedded.images)
    folds = choose_folds(images, folds) if full and "sparse" in sets else 0
    found = {
        kind: recall_report(embedded.images, texts.embeddings, texts.owner) for kind, texts in sets.items()
    }
    return Evaluation(
        split=split,
        images=images,
        captions=len(sets["sparse"].owner) if "sparse" in sets else 0,
        dense_captions=len(sets["dense"].owner) if "dense" in sets else 0,
        without_captions=images - found["sparse"].i2t.queries if "sparse" in found else images,
        truncated=sum(texts.truncated for texts in sets.values()),
        sparse=found.get("sparse"),
        dense=found.get("dense"),
        folds=folds,
        folded=_by_folds(embedded, index, split, folds) if folds else None,
        capacity=measure_capacity(embedded) if full else {},
        seconds=time.monotonic() - start,
    )


def _by_folds(embedded: Embeddings, index: ShardIndex, split: str, folds: int) -> Retrieval:
    """Orders the images by their ids, and returns `fold_report` for the sparse captions."""
    rows, texts, device = index.rows(split), embedded.sparse, embedded.images.device
    order = torch.argsort(torch.tensor(index.column("image_id")[rows.start : rows.stop]))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    images = embedded.images[order.to(device)]
    return fold_report(images, texts.embeddings, place.to(device)[texts.owner], folds=folds)


def choose_folds(images: int, folds: int | None) -> int:
    """Returns the number of folds for a split of `images` images. `evaluate_model` explains `folds`.

    Raises ValueError if `folds` does not divide `images`.
    """
    if folds is None:
        return images // FOLD if images > FOLD and images % FOLD == 0 else 0
    if folds < 0 or (folds and images % folds):
        raise ValueError(
            f"--folds {folds} does not divide the split's {images} images: choose a divisor or 0"
        )
    return 0 if folds == 1 else folds
