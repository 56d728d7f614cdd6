"""The losses where the gathered side does not fit: columns travel around the ring of workers, block by block.

Gathering keeps N = W * B columns on every worker. Here a worker holds its own B rows and one block of B columns;
in W - 1 hops every block has come by, and what a row needs to know of all columns is folded together in between:
its hardest negative, a running log-sum-exp, or a sum. The gradient of a row needs the finished numbers, so the
backward sends the columns around once more, with the gradient that they collect; after W hops they are home. The
hardest negatives alone need no second ring: a row keeps its winner, and only winners' gradients are sent home.

Same values as `d2s.kernels.functional` with both=False: each class below is one direction (local rows against
everybody's columns) of one of those losses. Blocks come in the order me, me - 1, ..., me + 1 (modulo W), so the
order of every sum is fixed. Sizes: B local rows, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from d2s.workers.exchange import pass_on, rank, to_owners, world_size

# Entries of the similarity matrix at a time.
_CHUNK = 1 << 21
# Above it log(1 + exp(x)) is x in float64 too.
_EXACT = 60.0


@dataclass
class _Chunk:
    """Some local rows against one block of columns."""

    part: slice
    """Which of the local rows."""
    s: Tensor
    """(r, B) similarities; a rule without a scale may overwrite them."""
    teacher: Tensor | None
    """(r, B) similarities of the teacher, for relational distillation."""
    same: Tensor
    """(r, B) bool: the two sides show the same image."""
    own: bool
    """The block is this worker's own, which holds the positives, on its diagonal."""
    owner: int
    """The rank that the block belongs to."""

    def diagonal(self, x: Tensor) -> Tensor:
        """A view (r,) of the positive pairs in x (r, B); of use in the worker's own block."""
        return x[:, self.part.start :].diagonal()


class HingeSum:
    """All violations [margin + S_ij - S_positive]+ of the rows."""

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def start(self, positive: Tensor) -> None:
        self.limit = positive - self.margin
        self.cost, self.active = positive.new_zeros(()), torch.zeros_like(positive)

    def fold(self, chunk: _Chunk) -> None:
        over = self._over(chunk)
        self.cost += over.sum()
        self.active[chunk.part] += over.sign_().sum(1)

    def _over(self, chunk: _Chunk) -> Tensor:
        return chunk.s.masked_fill_(chunk.same, -torch.inf).sub_(self.limit[chunk.part, None]).relu_()

    def loss(self) -> Tensor:
        return self.cost

    def slope(self, chunk: _Chunk) -> Tensor:
        slope = self._over(chunk).sign_()
        if chunk.own:
            chunk.diagonal(slope).sub_(self.active[chunk.part])
        return slope


class InfoNCE:
    """0.5 * cross entropy of scale * S over the rows; other pairs of the same image are left out."""

    def start(self, positive: Tensor, scale: Tensor) -> None:
        self.scale, self.positive = scale, positive * scale
        self.lse = _RunningLse(positive)

    def fold(self, chunk: _Chunk) -> None:
        self.lse.fold(self._logits(chunk), chunk.part)

    def _logits(self, chunk: _Chunk) -> Tensor:
        logits = (chunk.s * self.scale).masked_fill_(chunk.same, -torch.inf)
        if chunk.own:
            chunk.diagonal(logits).copy_(self.positive[chunk.part])
        return logits

    def loss(self) -> Tensor:
        return 0.5 * (self.lse.value() - self.positive).sum()

    def slope(self, chunk: _Chunk) -> Tensor:
        slope = self._logits(chunk).sub_(self.lse.value()[chunk.part, None]).exp_().mul_(0.5)
        if chunk.own:
            chunk.diagonal(slope).sub_(0.5)
        return slope


class Sigmoid:
    """log(1 + exp(-y * (scale * S + bias))) over all pairs; other pairs of the same image are left out."""

    def start(self, positive: Tensor, scale: Tensor, bias: Tensor) -> None:
        self.scale, self.bias = scale, bias
        self.positive = positive * scale + bias
        self.cost = softplus(-self.positive, threshold=_EXACT).sum()

    def fold(self, chunk: _Chunk) -> None:
        self.cost += softplus(self._logits(chunk), threshold=_EXACT).sum()

    def _logits(self, chunk: _Chunk) -> Tensor:
        return (chunk.s * self.scale).add_(self.bias).masked_fill_(chunk.same, -torch.inf)

    def loss(self) -> Tensor:
        return self.cost

    def slope(self, chunk: _Chunk) -> Tensor:
        slope = self._logits(chunk).sigmoid_()
        if chunk.own:
            chunk.diagonal(slope).sub_(torch.sigmoid(-self.positive[chunk.part]))
        return slope


class Relational:
    """KL of the teacher's to the student's softmax over a row's similarities / temperature."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def start(self, positive: Tensor) -> None:
        self.student, self.teacher = _RunningLse(positive), _RunningLse(positive)
        self.apart = torch.zeros_like(positive)

    def fold(self, chunk: _Chunk) -> None:
        s, t = chunk.s / self.temperature, chunk.teacher / self.temperature
        self.student.fold(s, chunk.part)
        shrink = self.teacher.fold(t, chunk.part)
        weight = torch.exp(t - self.teacher.top[chunk.part, None])
        self.apart[chunk.part] = self.apart[chunk.part] * shrink + (weight * (t - s)).sum(1)

    def loss(self) -> Tensor:
        # sum of p (log p - log q), with log p = t - lse(t) and log q = s - lse(s).
        return (self.apart / self.teacher.total - self.teacher.value() + self.student.value()).sum()

    def slope(self, chunk: _Chunk) -> Tensor:
        p = torch.exp(chunk.teacher / self.temperature - self.teacher.value()[chunk.part, None])
        q = torch.exp(chunk.s / self.temperature - self.student.value()[chunk.part, None])
        return (q - p) / self.temperature


class _RunningLse:
    """log-sum-exp of rows whose entries come in parts: (B,) each, started by `like`."""

    def __init__(self, like: Tensor) -> None:
        self.top, self.total = torch.full_like(like, -torch.inf), torch.zeros_like(like)

    def fold(self, logits: Tensor, part: slice) -> Tensor:
        """Takes in logits (r, B) of the rows `part`; returns the factor (r,) on what was summed before."""
        top = torch.maximum(self.top[part], logits.amax(1))
        # Nothing seen yet in a row: any finite reference will do for its empty sum.
        shrink = torch.exp(self.top[part] - torch.where(top == -torch.inf, 0, top))
        reference = torch.where(top == -torch.inf, 0, top)
        self.total[part] = self.total[part] * shrink + torch.exp(logits - reference[:, None]).sum(1)
        self.top[part] = top
        return shrink

    def value(self) -> Tensor:
        return self.top + self.total.log()


Rule = HingeSum | InfoNCE | Sigmoid | Relational


def _chunks(rows: Tensor, ids: Tensor, block: tuple[Tensor, Tensor], owner: int, width: int):
    """Rows (B, D) against a block: columns (B, D) and their ids; what stands past `width` is the teacher's."""
    columns, column_ids = block
    size = max(1, _CHUNK // columns.shape[0])
    for start in range(0, rows.shape[0], size):
        part = slice(start, min(start + size, rows.shape[0]))
        teacher = rows[part, width:] @ columns[:, width:].t() if width < rows.shape[1] else None
        s = rows[part, :width] @ columns[:, :width].t()
        yield _Chunk(part, s, teacher, ids[part, None] == column_ids, owner == rank(), owner)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule: Rule, rows, columns, ids, teacher, *factors):
        rows_, columns_ = rows.detach(), columns.detach()
        width = rows.shape[1]
        if teacher is not None:
            rows_, columns_ = torch.cat([rows_, teacher], 1), torch.cat([columns_, teacher], 1)
        with torch.autocast(rows.device.type, enabled=False):
            positive = (rows_[:, :width] * columns_[:, :width]).sum(1)
            rule.start(positive, *(factor.detach().to(rows.dtype) for factor in factors))
            block = (columns_, ids)
            for hop in range(world_size()):
                for chunk in _chunks(rows_, ids, block, (rank() - hop) % world_size(), width):
                    rule.fold(chunk)
                if hop < world_size() - 1:
                    block = pass_on(*block)
        ctx.save_for_backward(rows_, columns_, ids, *factors)
        ctx.rule, ctx.width = rule, width
        return rule.loss()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, columns, ids, *factors = ctx.saved_tensors
        width, block = ctx.width, (columns, ids)
        own = rows[:, :width]
        d_rows, d_block = torch.zeros_like(own), torch.zeros_like(own)
        sums = [rows.new_zeros(()) for _ in factors]  # of slope * S for the scale, of slope for the bias
        scale = factors[0].to(rows.dtype) if factors else 1.0
        with torch.autocast(rows.device.type, enabled=False):
            for hop in range(world_size()):
                for chunk in _chunks(rows, ids, block, (rank() - hop) % world_size(), width):
                    slope = ctx.rule.slope(chunk)
                    if sums:  # the rules that have a scale leave chunk.s as it is
                        sums[0] += (slope * chunk.s).sum()
                    if len(sums) > 1:
                        sums[1] += slope.sum()
                    d_rows[chunk.part] += slope @ block[0][:, :width]
                    d_block += slope.t() @ own[chunk.part]
                if hop < world_size() - 1:
                    *block, d_block = pass_on(*block, d_block)
            (d_block,) = pass_on(d_block)
        return (
            None, grad * scale * d_rows, grad * scale * d_block, None, None,
            *((grad * total).reshape(factor.shape).to(factor.dtype)
              for total, factor in zip(sums, factors, strict=True)),
        )  # fmt: skip


def ring_loss(rule: Rule, rows: Tensor, columns: Tensor, ids: Tensor, *factors: Tensor) -> Tensor:
    """The share of a loss that belongs to the local rows (B, D) against all workers' columns (B, D each): 0-dim.

    Row i's positive is column i of the same worker; ids: (B,) int64, of rows and columns alike. factors: the
    scale, or the scale and the bias, of shape (1,). Gradients flow to rows, columns (wherever they are) and factors.
    """
    return _Ring.apply(rule, rows, columns, ids, None, *factors)


def ring_relational(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Relational distillation of the local rows (B, D) against all workers'; teacher (B, E) gets no gradient."""
    ids = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
    return _Ring.apply(Relational(temperature), student, student, ids, teacher.to(student.dtype))


class _HardestRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, columns, ids, margin: float):
        rows_, columns_ = rows.detach(), columns.detach()
        local = rows.shape[0]
        best, at = rows_.new_full((local,), -torch.inf), ids.new_zeros(local)
        winner = torch.zeros_like(rows_)
        block = (columns_, ids)
        with torch.autocast(rows.device.type, enabled=False):
            for hop in range(world_size()):
                owner = (rank() - hop) % world_size()
                for chunk in _chunks(rows_, ids, block, owner, rows.shape[1]):
                    part = chunk.part
                    top, place = chunk.s.masked_fill_(chunk.same, -torch.inf).max(1)
                    place += owner * local
                    # The lowest index keeps a tie, in whatever order the blocks come.
                    better = (top > best[part]) | ((top == best[part]) & (place < at[part]))
                    better &= top > -torch.inf
                    best[part] = torch.where(better, top, best[part])
                    at[part] = torch.where(better, place, at[part])
                    found = block[0][place - owner * local]
                    winner[part] = torch.where(better[:, None], found, winner[part])
                if hop < world_size() - 1:
                    block = pass_on(*block)
            cost = (margin + best - (rows_ * columns_).sum(1)).clamp_min(0)
        ctx.save_for_backward(rows_, columns_, winner, at, cost > 0)
        return cost.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, columns, winner, at, active = ctx.saved_tensors
        weight = active.to(rows.dtype)[:, None] * grad
        index, sums = _sums(at[active], (rows * weight)[active])
        d_columns = to_owners(index, sums, rows.shape[0]) - rows * weight
        return (winner - columns) * weight, d_columns, None, None


def _sums(index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct places in index (k,), ascending, and the sum of the rows (k, D) that go to each."""
    places, inverse, counts = torch.unique(index, return_inverse=True, return_counts=True)
    if not len(places):
        return places, rows
    # One bag a place, its rows in order: adding at an index would add in any order on a GPU.
    order = torch.argsort(inverse, stable=True)
    return places, embedding_bag(order, rows, counts.cumsum(0) - counts, mode="sum")


def ring_hinge_max(rows: Tensor, columns: Tensor, ids: Tensor, margin: float) -> Tensor:
    """[margin + S_hardest - S_positive]+ over the local rows; as `ring_loss`, ties to the lowest index."""
    return _HardestRing.apply(rows, columns, ids, margin)
