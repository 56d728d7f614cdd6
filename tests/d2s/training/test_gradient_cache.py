"""Accumulation: gradients of a batch in pieces are those of the batch, draws included; what cannot be is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from worker_cases import PAIRS, build, micro_batches, pairs, set_case

from d2s.data.batch import Batch
from d2s.model.sample_draws import dropout
from d2s.shards.cli import main as shard
from d2s.train import main
from d2s.training.arguments import parse
from d2s.training.build import build_model, build_module
from d2s.training.checks import check_arguments
from d2s.training.gradient_cache import check_norms


def _batch() -> tuple[Batch, Tensor]:
    batch, teacher = pairs()
    batch.dense_index = torch.arange(PAIRS)
    return batch, teacher


class _Plain:
    """What MicroBatches asks of an engine, for a module in one process: each call's outputs are kept."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.seen, self.boundaries = module, [], []

    def __call__(self, batch, **options) -> tuple[Tensor, ...]:
        out = self.module(batch, **options)
        self.seen.append([part.detach().clone() for part in out])
        return out

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self.boundaries.append(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize(
    "stage, name", [("pretrain", "hinge max"), ("pretrain", "sigmoid"), ("finetune", "relational")]
)
def test_gradients_in_double_whatever_the_size(stage: str, name: str) -> None:
    # Token dropout and text dropout are on: their draws belong to the samples.
    found: dict[int, dict[str, Tensor]] = {}
    for size in (0, 1, 5, 8, PAIRS - 1):
        module = build(stage).double()
        warmup = set_case(module, stage, name)
        batch, teacher = _batch()
        if size:
            computation = micro_batches(_Plain(module), teacher, size)
            total = computation.forward(batch, 0, warmup)[0]
            computation.backward(total)
        else:
            total = whole = module(batch, warmup, teacher)[0]
            whole.backward()
        assert abs(total - whole) <= 1e-10 * abs(whole), size
        found[size] = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    for size, grads in found.items():
        assert grads.keys() == found[0].keys()
        for key, own in found[0].items():
            assert (grads[key] - own).abs().max() <= 1e-10 * max(1.0, own.abs().max()), (size, key)
    assert sum(own.abs().max() > 1e-6 for own in found[0].values()) > 40


def test_both_passes_draw_alike_and_micro_batches_do_not() -> None:
    engine = _Plain(build("pretrain", dropout=True))
    batch, computation = _batch()[0], micro_batches(engine, None, 6)
    total = computation.forward(batch, 0, set_case(engine.module, "pretrain", "infonce"))[0]
    computation.backward(total)
    first, second = engine.seen[:3], engine.seen[3:]
    assert engine.boundaries == [False, False, True]
    assert [len(outputs[0]) for outputs in first] == [6, 6, 4]
    for before, after in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # The towers' own dropout is on: without new draws the same pairs would come out again.
    torch.manual_seed(1)
    assert not torch.equal(engine(batch.rows(0, 6), embed_only=True)[1], first[0][1])


def test_buffers_and_weights_stay_and_a_left_step_leaves_nothing() -> None:
    engine = _Plain(build("pretrain"))
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    polls = []

    def poll() -> None:
        polls.append(None)
        if len(polls) == 5:
            raise InterruptedError

    computation = micro_batches(engine, None, 6, check=poll)
    total = computation.forward(_batch()[0], 0, set_case(engine.module, "pretrain", "infonce"))[0]
    with pytest.raises(InterruptedError):
        computation.backward(total)
    assert len(engine.seen) == 4
    assert all(torch.equal(before[name], value) for name, value in engine.module.state_dict().items())


def test_a_samples_dropout_depends_on_its_seed_alone() -> None:
    values, seeds = torch.ones(40, 50, 8), torch.arange(40) - 20
    out = dropout(values, seeds, 0.25)
    assert torch.equal(dropout(values[7:9], seeds[7:9], 0.25), out[7:9])
    assert torch.equal(dropout(values[:, :13], seeds, 0.25), out[:, :13])  # and not on how it is padded
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.015)
    assert (out == 0).float().mean((0, 1)).sub(0.25).abs().max() < 0.05
    assert not torch.equal(out[0], out[1])
    assert torch.equal(dropout(values, seeds, 0.0), values)
    assert not dropout(values, seeds, 1.0).any()


@pytest.mark.parametrize(
    "vision, norm, remedy",
    [
        ("vit", "batch", "set model.text_mlp_norm to layer"),
        ("resnet", "layer", "choose a tower without BatchNorm"),
    ],
)
def test_statistics_of_a_batch_are_refused(vision: str, norm: str, remedy: str) -> None:
    model = build("pretrain", vision=vision, norm=norm).model
    with pytest.raises(ValueError, match=f"engine.micro_batch is 4 .*{remedy}"):
        check_norms(model, 4, 16)
    check_norms(model, 16, 16)
    check_norms(model, 0, 16)
    assert model.training
    check_norms(build("pretrain").model, 4, 16)


def test_held_statistics_are_no_hindrance() -> None:
    model = build("pretrain", vision="resnet").model
    model.image_encoder.frozen = True
    check_norms(model, 4, 16)


CONVNEXT = [
    *("--model.image_encoder.config.model_type", "convnext", "--model.text_mlp_norm", "layer"),
    *("--model.image_encoder.config.hidden_sizes", "8", "8", "8", "8"),
    *("--model.image_encoder.config.depths", "1", "1", "1", "1"),
    *("--batch_size", "8", "--model.width", "16", "--log.every", "1", "--data.loader_workers", "0"),
    *("--data.image_size", "32", "--model.image_size", "32"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("accumulate") / "scenes"
    assert shard(f"build --source scenes --count train=16,val=8,test=8 --size 32 --out {out}".split()) == 0
    return out


def test_the_command_line(scenes: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["scenes_small_pretrain", "--data", str(scenes), "--dry-run", *CONVNEXT]
    assert main([*arguments, "--engine.micro_batch", "3"]) == 0
    assert "8 each, embedded 3 at a time" in capsys.readouterr().out
    for wrong, message in (
        (["--engine.micro_batch", "-1"], "engine.micro_batch is -1"),
        (["--engine.micro_batch", "3", "--model.text_mlp_norm", "batch"], "set model.text_mlp_norm to layer"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_dry_run_counts_one_micro_batch(scenes: Path) -> None:
    from d2s.plan.dry_run import memory_parts

    kept = {}
    for size in (0, 4, 8):
        arguments = ["scenes_small_pretrain", "--data", str(scenes), "--dry-run", *CONVNEXT]
        prepared = check_arguments(*parse([*arguments, "--engine.micro_batch", str(size)]))
        module = build_module(prepared, build_model(prepared))
        kept[size] = memory_parts(prepared, module)["activations"]
    embeddings = 2 * 2 * 4 * 16 * 8
    # With sample draws the mask is kept in another form, hence 8 (all pairs) against 4 and not against 0.
    assert kept[4] - embeddings == pytest.approx(kept[8] / 2, rel=1e-4)
    assert kept[4] < kept[0]
