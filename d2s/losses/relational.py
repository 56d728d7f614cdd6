"""Distillation of similarities: moves similarities among sparse captions to similarities among dense captions."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2s.kernels import functional as F
from d2s.losses.base import Distillation
from d2s.losses.ring import Chunk, RunningLogSumExp, ring_loss
from d2s.workers.collectives import all_gather
from d2s.workers.exchange import gather_rows
from d2s.workers.group import several_workers


class Relational(Distillation):
    """The Kullback-Leibler divergence KL(p || q), summed over the captions of this worker.
    p: softmax of the teacher's similarities of one caption with all captions, divided by the temperature.
    q: softmax of the student's similarities, divided by the temperature."""

    gathered_sides = 3  # the captions, their gradient, and the teacher's embeddings

    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.config.distill_temperature
        if self.config.exchange == "ring" and several_workers():
            teacher = normalize(teacher, dim=-1).to(text.dtype)
            ids = torch.zeros(text.shape[0], dtype=torch.int64, device=text.device)  # this rule ignores them
            return ring_loss(_Rule(temperature), text, text, ids, teacher=teacher)
        return F.relational_distillation(
            text,
            normalize(teacher, dim=-1),
            gather_rows(text),
            normalize(all_gather(teacher), dim=-1),
            temperature=temperature,
        )

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        # The teacher's embeddings have no gradient, but the ring sends them in the backward pass too.
        side = (workers - 1) * local * row
        return 2 * side, 3 * side + local * row if self.config.exchange == "ring" else side


class _Rule:
    """The ring rule (:class:`d2s.losses.ring.RingRule`) of the divergence.
    s and t are the similarities of student and teacher, divided by the temperature. The rule accumulates three
    numbers for each row: the log-sum-exp of s, the log-sum-exp of t, and the sum of exp(t) * (t - s)."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def start(self, positive: Tensor) -> None:
        self.student, self.teacher = RunningLogSumExp(positive), RunningLogSumExp(positive)
        self.difference = torch.zeros_like(positive)

    def fold(self, chunk: Chunk) -> None:
        s, t = chunk.s / self.temperature, chunk.teacher / self.temperature
        self.student.fold(s, chunk.part)
        shrink = self.teacher.fold(t, chunk.part)
        weight = torch.exp(t - self.teacher.top[chunk.part, None])
        self.difference[chunk.part] = self.difference[chunk.part] * shrink + (weight * (t - s)).sum(1)

    def loss(self) -> Tensor:
        # The sum of p * (log p - log q), with log p = t - lse(t) and log q = s - lse(s).
        return (self.difference / self.teacher.total - self.teacher.value() + self.student.value()).sum()

    def slope(self, chunk: Chunk) -> Tensor:
        p = torch.exp(chunk.teacher / self.temperature - self.teacher.value()[chunk.part, None])
        q = torch.exp(chunk.s / self.temperature - self.student.value()[chunk.part, None])
        return (q - p) / self.temperature
