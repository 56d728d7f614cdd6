"""Measures information capacity: how much of the embedding space a set of embeddings uses.

Sizes: N images, M captions, D width. `owner` is explained in `d2s.evaluate.metrics`. Rows must have length 1,
except in `effective_rank` and `measure_capacity`. Use the measures to compare models on the same split. No
measure alone shows quality: random embeddings have the best rank and uniformity.
"""

import math

import torch
from torch import Tensor

from d2s.evaluate.embed import Embeddings
from d2s.evaluate.metrics import normalize

_CHUNK = 1024


def measure_capacity(embedded: Embeddings) -> dict[str, float]:
    """Returns a dictionary of all measures below, with names such as `alignment_sparse`.

    If there are no sparse or no dense captions, the measures that need them are left out.
    Raises ValueError if an embedding is not finite.
    """
    images = normalize(embedded.images)
    result = {"effective_rank_images": effective_rank(images)}
    unit: dict[str, Tensor] = {}
    for kind, texts in (("sparse", embedded.sparse), ("dense", embedded.dense)):
        if texts is None:
            continue
        unit[kind] = normalize(texts.embeddings)
        result[f"effective_rank_{kind}"] = effective_rank(unit[kind])
        result[f"alignment_{kind}"] = alignment(images, unit[kind], texts.owner)
        result[f"uniformity_{kind}"] = uniformity(unit[kind])
        result[f"modality_gap_{kind}"] = modality_gap(images, unit[kind])
    result["uniformity_images"] = uniformity(images)
    if len(unit) == 2:
        owners = embedded.sparse.owner, embedded.dense.owner
        result["cosine_sparse_dense"] = sparse_to_dense(
            unit["sparse"], owners[0], unit["dense"], owners[1], len(images)
        )
    return result


def effective_rank(embeddings: Tensor) -> float:
    """Returns exp(-sum p_k log p_k). Here p = s / sum(s), and s are the singular values of `embeddings`.

    The embeddings have shape (N, D) and are not centred. The result lies between 1 (all rows on one line) and
    min(N, D). It is 0 if all rows are zero. It is computed from the D x D Gram matrix in float64, with
    O(N D^2) work and O(D^2) memory.
    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007); on embeddings: RankMe (ICML 2023).
    """
    gram = torch.zeros(
        embeddings.shape[1], embeddings.shape[1], dtype=torch.float64, device=embeddings.device
    )
    for part in embeddings.split(_CHUNK):
        gram += part.double().T @ part.double()
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    # Eigenvalues have rounding errors of about eps * max. Their square roots would count as directions.
    noise = values.max() * torch.finfo(torch.float64).eps * len(values)
    values = values[values > noise].sqrt()
    if len(values) == 0:
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(images: Tensor, texts: Tensor, owner: Tensor) -> float:
    """Returns the mean squared distance between the embeddings of a caption and its image.

    0 is best. 2 means orthogonal and 4 means opposite embeddings.
    images: shape (N, D). texts: shape (M, D). owner: int64, of shape (M,).

    Source: Wang and Isola, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere" (ICML 2020), with alpha = 2. A positive pair is an image and its caption.
    """
    return float((images[owner] - texts).double().square().sum(1).mean())


def uniformity(embeddings: Tensor, limit: int = 8192) -> float:
    """Returns the log of the mean of exp(-2 |x_i - x_j|^2) over pairs i < j of rows of `embeddings`.

    The result is 0 if all rows are equal. It is lower if the rows spread more evenly over the unit sphere. In
    many dimensions it approaches -4. The cost is quadratic. So if there are more than `limit` rows, only
    `limit` evenly spaced rows are used.

    Source: Wang and Isola (ICML 2020), with t = 2.
    """
    rows = len(embeddings)
    if rows < 2:
        return 0.0
    if rows > limit:
        embeddings = embeddings[torch.linspace(0, rows - 1, limit, device=embeddings.device).round().long()]
        rows = limit
    total = 0.0
    for part in embeddings.split(_CHUNK):
        squared = (2 - 2 * part @ embeddings.T).clamp(min=0)
        total += float(torch.exp(-2 * squared).sum(dtype=torch.float64))
    own = float(torch.exp(-2 * (2 - 2 * embeddings.square().sum(1)).clamp(min=0)).sum(dtype=torch.float64))
    return math.log((total - own) / (rows * (rows - 1)))


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Returns the distance between the mean image embedding and the mean caption embedding.

    images: shape (N, D). texts: shape (M, D).

    Source: Liang et al., "Mind the gap" (NeurIPS 2022).
    """
    return float((images.double().mean(0) - texts.double().mean(0)).norm())


def sparse_to_dense(
    sparse: Tensor, sparse_owner: Tensor, dense: Tensor, dense_owner: Tensor, images: int
) -> float:
    """Returns the mean cosine between an image's sparse and dense captions, averaged over images.

    Images without a sparse or without a dense caption are left out. If no image has both, the result is NaN.
    The mean cosine over all pairs from two sets of unit vectors is the dot product of the sets' means.

    Args:
        sparse, dense: embeddings of M sparse and M' dense captions, of shapes (M, D) and (M', D).
        sparse_owner, dense_owner: int64, of shapes (M,) and (M',).
        images: N, the number of images.
    """

    def means(rows: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        count = torch.bincount(owner, minlength=images)
        total = torch.zeros(images, rows.shape[1], dtype=torch.float64, device=rows.device)
        total.index_add_(0, owner, rows.double())
        return total / count.clamp(min=1).unsqueeze(1), count > 0

    (a, has_sparse), (b, has_dense) = means(sparse, sparse_owner), means(dense, dense_owner)
    both = has_sparse & has_dense
    return float((a * b).sum(1)[both].mean())
