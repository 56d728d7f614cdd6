"""The public functions: what they refuse, how an implementation is chosen, odd inputs, memory, repeats."""

import logging

import pytest
import torch
from problems import CONTRASTIVE, contrastive, image_ids, sides, value_and_gradients

import d2s.kernels as kernels
from d2s.kernels.chunked import common
from d2s.kernels.operators import dispatch


def good():
    image, text = sides(4, 3, 0, dtype=torch.float32)
    return {"image": image, "text": text, "image_ids": torch.arange(4), "text_ids": torch.arange(4)}


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda: {"image": torch.ones(4)}, "image"),
        (lambda: {"image": torch.ones(4, 3, dtype=torch.int64)}, "image"),
        (lambda: {"text": torch.ones(4, 2)}, "text"),
        (lambda: {"text": torch.ones(4, 3, dtype=torch.float64)}, "text"),
        (lambda: {"text": torch.ones(4, 3, device="meta")}, "text"),
        (lambda: {"image_ids": torch.arange(5)}, "image_ids"),
        (lambda: {"image_ids": torch.arange(4).int()}, "image_ids"),
        (lambda: {"text_ids": torch.arange(3)}, "text_ids"),
        (lambda: {"text": torch.ones(6, 3), "text_ids": None, "both": False}, "text_ids"),
        (lambda: {"offset": 1}, "both"),
        (lambda: {"offset": 1, "both": False}, "offset"),
        (lambda: {"offset": -1, "both": False}, "offset"),
        (lambda: {"margin": float("nan")}, "margin"),
        (lambda: {"margin": float("inf")}, "margin"),
    ],
)
def test_hinge_refuses_in_one_line_that_names_the_argument(change, named):
    with pytest.raises(ValueError) as error:
        kernels.hinge_loss(**{**good(), **change()})
    assert str(error.value).startswith(f"{named}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda x: kernels.info_nce_loss(**x, scale=float("nan")), "scale"),
        (lambda x: kernels.info_nce_loss(**x, scale=torch.ones(2)), "scale"),
        (lambda x: kernels.sigmoid_loss(**x, scale=1.0, bias=torch.ones(1, device="meta")), "bias"),
        (lambda x: kernels.pointwise_distillation(x["image"], x["text"], kind="l3"), "kind"),
        (lambda x: kernels.pointwise_distillation(x["image"], x["text"][:2]), "teacher"),
        (lambda x: kernels.relational_distillation(x["image"], x["text"], temperature=0.0), "temperature"),
        (
            lambda x: kernels.relational_distillation(x["image"], x["text"], x["image"], temperature=1.0),
            "student_all, teacher_all",
        ),
        (lambda x: kernels.gpo_pool(x["image"], x["text"], x["text"]), "features"),
        (lambda x: kernels.gpo_pool(torch.ones(2, 3, 4), torch.ones(2, 4), torch.ones(2, 3) > 0), "weights"),
        (lambda x: kernels.gpo_pool(torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 3)), "mask"),
        (lambda x: kernels.retrieval_ranks(x["image"], x["text"]), "positives"),
        (lambda x: kernels.retrieval_ranks(x["image"], x["text"], query_ids=torch.arange(3),
                                           candidate_ids=torch.arange(4)), "query_ids"),
        (lambda x: kernels.retrieval_ranks(x["image"], x["text"], (torch.arange(3), torch.arange(4))),
         "positives[0]"),
    ],
)  # fmt: skip
def test_others_refuse_in_one_line_that_names_the_argument(call, named):
    with pytest.raises(ValueError) as error:
        call(good())
    assert str(error.value).startswith(f"{named}: ")
    assert "\n" not in str(error.value)


def test_implementation_is_chosen_by_the_environment_and_logged_once(monkeypatch, caplog):
    dispatch.load.cache_clear()
    with caplog.at_level(logging.INFO, logger="d2s.kernels"):
        results = {}
        for name in ("chunked", "reference"):
            monkeypatch.setenv("D2S_KERNELS", name)
            assert kernels.implementation() == name
            kernels.info_nce_loss(**good(), scale=3.0)
            results[name] = kernels.info_nce_loss(**good(), scale=3.0)
    assert [record.message for record in caplog.records] == ["kernels: chunked", "kernels: reference"]
    assert torch.allclose(results["chunked"], results["reference"])
    monkeypatch.delenv("D2S_KERNELS")
    assert kernels.implementation("cpu") == "chunked"


def test_unknown_implementation_is_refused(monkeypatch):
    monkeypatch.setenv("D2S_KERNELS", "fastest")
    with pytest.raises(
        ValueError, match=r"^D2S_KERNELS: 'fastest' is unknown; use one of triton, chunked, reference"
    ):
        kernels.hinge_loss(**good())


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_layout_autocast_and_repeats_do_not_change_a_bit(name):
    image, text = sides(130, 24, 3, dtype=torch.float32)
    ids = image_ids(130, 90, 3)

    def run(image, text):
        return value_and_gradients(
            lambda i, t, s, b: contrastive(kernels, name, i, t, ids, scale=s, bias=b),
            image,
            text,
            torch.tensor([14.0]),
            torch.tensor([-7.0]),
        )

    first = run(image, text)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(image, text), strict=True))
    strided = image.t().contiguous().t(), torch.cat([text, text], 1)[:, :24]
    assert all(torch.equal(a, b) for a, b in zip(first, run(*strided), strict=True))
    with torch.autocast(image.device.type, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(first, run(image, text), strict=True))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_only_one_side_wants_a_gradient(name):
    image, text = sides(20, 6, 1, dtype=torch.float32)
    ids = torch.arange(20)
    whole = value_and_gradients(lambda i, t: contrastive(kernels, name, i, t, ids), image, text)
    left = value_and_gradients(lambda i: contrastive(kernels, name, i, text, ids), image)
    right = value_and_gradients(lambda t: contrastive(kernels, name, image, t, ids), text)
    assert torch.equal(whole[1], left[1])
    assert torch.equal(whole[2], right[1])
    with torch.no_grad():
        silent = contrastive(kernels, name, image.clone().requires_grad_(), text, ids)
    assert not silent.requires_grad
    assert torch.equal(silent, whole[0])


def _peak(function) -> int:
    """Bytes in use above the start at the worst moment, from the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        function()
    now = top = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


@pytest.mark.on_cpu
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_extra_memory_grows_no_faster_than_the_batch(name, monkeypatch):
    monkeypatch.setattr(common, "CHUNK_ENTRIES", 1 << 14)

    def extra(n):
        image, text = (x.requires_grad_() for x in sides(n, 16, 0, dtype=torch.float32))
        ids = torch.arange(n)
        return _peak(lambda: contrastive(kernels, name, image, text, ids).backward())

    extra(64)
    small, large = extra(1024), extra(2048)
    assert 0 < large < 2 * small
    assert large < 2048 * 2048 * 4 / 4
