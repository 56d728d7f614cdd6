"""Parameter groups and the schedule, by hand."""

import pytest
import torch
from torch import nn

from d2s.training.optimizer import OptimConfig, build_optimizer, lr_factor, set_learning_rate


def test_stepped_schedule_drops_at_the_papers_epochs() -> None:
    config = OptimConfig()
    factors = [lr_factor(config, epoch * 10, 10, 300) for epoch in range(30)]
    expected = [1.0] * 9 + [0.3] * 6 + [0.09] * 5 + [0.027] * 5 + [0.0081] * 5
    assert factors == pytest.approx(expected)


def test_warmup_rises_and_cosine_ends_at_zero() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=4)
    assert lr_factor(config, 0, 10, 100) == pytest.approx(0.25)
    assert lr_factor(config, 50, 10, 100) == pytest.approx(0.5)
    assert lr_factor(config, 100, 10, 100) == pytest.approx(0.0)


def test_groups_divide_by_rate_and_by_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[1].weight.requires_grad_(False)
    optimizer = build_optimizer(module, [module[0].weight], OptimConfig(lr=1e-2, backbone_lr=1e-3))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups) == {"backbone", "head_no_decay"}
    assert [p.shape for p in groups["head_no_decay"]["params"]] == [(4,), (2,)]
    assert groups["backbone"]["lr"] == 1e-3
    assert groups["backbone"]["weight_decay"] == 1e-4
    assert groups["head_no_decay"]["weight_decay"] == 0.0
    set_learning_rate(optimizer, 0.5)
    assert groups["head_no_decay"]["lr"] == 5e-3


def test_nothing_to_train_is_said() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(module, [], OptimConfig())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"optim\.lr is -1"):
        OptimConfig(lr=-1)
    with pytest.raises(ValueError, match="later than the one before"):
        OptimConfig(milestones=(5, 3))


def test_torch_adamw_sees_the_groups() -> None:
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(module, [], OptimConfig())
    assert isinstance(optimizer, torch.optim.AdamW)
