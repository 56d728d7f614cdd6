"""Wrong arguments of every public function: ValueError in one line that names the argument; never a crash."""

import os
import subprocess
import sys

import pytest
import torch
from problems import sides

import d2s.kernels as kernels
from d2s.kernels import reference
from d2s.kernels.operators import dispatch

IDS, DOUBLE = torch.arange(4), torch.float64
np = pytest.importorskip("numpy")
pytestmark = pytest.mark.on_cpu


def floats(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def contrastive():
    return {"image": floats(4, 3), "text": floats(4, 3), "image_ids": IDS, "text_ids": IDS}


# name: right arguments.
RIGHT = {
    "hinge_loss": lambda: {**contrastive(), "margin": 0.2, "hardest": True, "offset": 0, "both": True},
    "info_nce_loss": lambda: {**contrastive(), "scale": 5.0, "offset": 0, "both": True},
    "sigmoid_loss": lambda: {**contrastive(), "scale": 5.0, "bias": -5.0, "offset": 0},
    "pointwise_distillation": lambda: {"student": floats(4, 3), "teacher": floats(4, 3), "normalize": True},
    "relational_distillation": lambda: {
        "student": floats(4, 3),
        "teacher": floats(4, 2),
        "student_all": floats(5, 3),
        "teacher_all": floats(5, 2),
        "temperature": 0.1,
    },
    "gpo_pool": lambda: {"features": floats(2, 4, 3), "weights": floats(2, 4), "mask": floats(2, 4) > 0},
    "retrieval_ranks": lambda: {
        "queries": floats(4, 3),
        "candidates": floats(5, 3),
        "query_ids": IDS,
        "candidate_ids": torch.arange(5),
    },
}
TENSORS = [(f, a) for f, make in RIGHT.items() for a, x in make().items() if isinstance(x, torch.Tensor)]
FLOAT_TENSORS = [(f, a) for f, a in TENSORS if RIGHT[f]()[a].is_floating_point()]
NUMBERS = [(f, a) for f, make in RIGHT.items() for a, x in make().items() if type(x) is float]
FLAGS = [(f, a) for f, make in RIGHT.items() for a, x in make().items() if type(x) is bool]
OFFSETS = [(f, "offset") for f, make in RIGHT.items() if "offset" in make()]


def refused(function, argument, value, remedy="", **more):
    with pytest.raises(ValueError) as error:
        getattr(kernels, function)(**{**RIGHT[function](), **more, argument: value})
    message = str(error.value)
    # None stands for an argument that is missing.
    assert (
        message.startswith(f"{argument}") or (value is None and argument in message) or "positives" in message
    )
    assert "\n" not in message
    assert len(message) < 160
    assert remedy in message


@pytest.mark.parametrize("name", RIGHT)
def test_right_arguments_pass(name):
    assert getattr(kernels, name)(**RIGHT[name]()).isfinite().all()


@pytest.mark.parametrize("function, argument", [x for x in TENSORS if x[1] != "text_ids"])
def test_what_is_missing(function, argument):
    refused(function, argument, None, "")


@pytest.mark.parametrize("function, argument", TENSORS)
@pytest.mark.parametrize("kind", ["list", "array", "sparse"])
def test_what_is_no_dense_tensor(function, argument, kind):
    right = RIGHT[function]()[argument]
    wrong = {
        "list": right.tolist,
        "array": right.numpy,
        "sparse": right.to_sparse,
    }[kind]()
    refused(function, argument, wrong, {"sparse": "to_dense", "array": "as_tensor"}.get(kind, ""))


@pytest.mark.parametrize("function, argument", FLOAT_TENSORS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64])
def test_types_that_are_not_computed_with(function, argument, dtype):
    wrong = RIGHT[function]()[argument].to(dtype)
    refused(function, argument, wrong)
    # Both sides of one type: what the type is like the other's says nothing.
    pair = {"image": "text", "queries": "candidates", "student": "teacher", "features": "weights"}.get(
        argument
    )
    if pair:
        refused(function, argument, wrong, "bfloat16", **{pair: RIGHT[function]()[pair].to(dtype)})


@pytest.mark.parametrize("function, argument", NUMBERS)
@pytest.mark.parametrize("value", [None, "1", True, torch.ones(2), torch.ones(1, dtype=torch.int64)])
def test_what_is_no_number(function, argument, value):
    refused(function, argument, value)


@pytest.mark.parametrize("function, argument", NUMBERS)
@pytest.mark.parametrize("value", [1e39, float("inf"), float("nan")])
def test_numbers_that_the_type_cannot_hold(function, argument, value):
    refused(function, argument, value)


@pytest.mark.parametrize("function, argument", NUMBERS)
def test_numbers_of_numpy_are_numbers(function, argument):
    call, right = getattr(kernels, function), RIGHT[function]()
    wanted = call(**{**right, argument: 0.5})
    for value in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(call(**{**right, argument: value}), wanted)
    wide = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in right.items()
    }
    assert call(**{**wide, argument: 1e39}).dtype == DOUBLE


@pytest.mark.parametrize(
    "function, argument", [("hinge_loss", "margin"), ("relational_distillation", "temperature")]
)
def test_a_tensor_for_a_number_is_told_how_to_become_one(function, argument):
    refused(function, argument, torch.tensor(0.2), ".item()")


@pytest.mark.parametrize("function, argument", FLAGS)
@pytest.mark.parametrize("value", ["no", None, 0, torch.tensor(True)])
def test_what_is_neither_true_nor_false(function, argument, value):
    refused(function, argument, value, "True or False")


@pytest.mark.parametrize("function, argument", OFFSETS)
@pytest.mark.parametrize("value", [0.0, None, False, torch.tensor(0), -1])
def test_what_is_no_offset(function, argument, value):
    refused(function, argument, value, **({} if function == "sigmoid_loss" else {"both": False}))


def test_whole_numbers_of_numpy_are_offsets():
    part = {**contrastive(), "image": floats(2, 3), "image_ids": IDS[1:3], "both": False}
    assert torch.equal(kernels.hinge_loss(**part, offset=np.int64(1)), kernels.hinge_loss(**part, offset=1))


@pytest.mark.parametrize("kind", [None, 3, "L1"])
def test_unknown_distances(kind):
    refused("pointwise_distillation", "kind", kind, "cosine, l1, l2")


# ---- lists of positives -----------------------------------------------------------------------------------------


def listed(starts, indices):
    return torch.tensor(starts, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64)


@pytest.mark.parametrize(
    "positives, named, remedy",
    [
        (listed([0, 1, 2, 9], [0, 1, 2]), "positives[0]: goes from 0 to 9", "3"),
        (listed([0, 1, 2, 2], [0, 1, 2]), "positives[0]: goes from 0 to 2", "3"),
        (listed([1, 1, 2, 3], [0, 1, 2]), "positives[0]: goes from 1 to 3", "0"),
        (listed([0, 2, 1, 3], [0, 1, 2]), "positives[0]: goes from 0 to 3, falling at 1", "rise"),
        (listed([0, 1, 2, 3], [0, 1, 10**9]), "positives[1]: 1000000000 is none of the 5", "0 to 4"),
        (listed([0, 1, 2, 3], [0, 5, 1]), "positives[1]: 5 is none of the 5", "0 to 4"),
        (listed([0, 1, 2, 3], [0, -1, 2]), "positives[1]: -1 is none of the 5", "0 to 4"),
        (listed([0, 0, 0, 1], []), "positives[0]: goes from 0 to 1", "0"),
        (listed([0, 1, 2], [0, 1]), "positives[0]: the shape is (3,)", "(4,)"),
        (listed([0, 1, 2, 3], [[0, 1, 2]]), "positives[1]: the shape is (1, 3)", "(3,)"),
        ((*listed([0, 1, 2, 3], [0, 1, 2]), IDS), "positives: a tuple", "(starts, indices)"),
        (torch.ones(2, 4, dtype=torch.int64), "positives: int64 (2, 4)", "(starts, indices)"),
        (5, "positives: 5 ", "(starts, indices)"),
        ({0: 1, 1: 2}, "positives: a dict", "(starts, indices)"),
        ([[0, 1, 2, 3], [0, 1, 2]], "positives[0]: a list", "as_tensor"),
        ((listed([0, 1, 2, 3], [])[0], [0, 1, 2]), "positives[1]: a list", "as_tensor"),
        ((None, None), "positives[0]: None", "as_tensor"),
    ],
)
@pytest.mark.parametrize("name", ["chunked", "triton", "reference"])
def test_wrong_lists_of_positives(positives, named, remedy, name, monkeypatch):
    monkeypatch.setenv("D2S_KERNELS", name)
    with pytest.raises(ValueError) as error:
        kernels.retrieval_ranks(floats(3, 2), floats(5, 2), positives)
    message = str(error.value)
    assert message.startswith(named)
    assert remedy in message
    assert "\n" not in message


def test_lists_that_are_right():
    got = kernels.retrieval_ranks(floats(3, 2), floats(5, 2), list(listed([0, 0, 2, 3], [4, 4, 0])))
    assert got.tolist() == [5, 4, 4]
    none = kernels.retrieval_ranks(floats(3, 2), floats(5, 2), listed([0, 0, 0, 0], []))
    assert none.tolist() == [5, 5, 5]


def test_compiled_lists_are_not_waited_for():
    torch._dynamo.reset()
    queries, candidates = (x.float() for x in sides(3, 4, 0))
    compiled = torch.compile(kernels.retrieval_ranks, fullgraph=True, backend="aot_eager")
    lists = listed([0, 1, 1, 3], [2, 0, 1])
    wanted = kernels.retrieval_ranks(queries, candidates, lists)
    assert torch.equal(compiled(queries, candidates, lists), wanted)


# ---- other float types ------------------------------------------------------------------------------------------

TYPES = [
    (torch.float32, DOUBLE),
    (DOUBLE, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, DOUBLE),
]


@pytest.mark.parametrize("one, other", TYPES)
def test_the_other_side_in_another_type(one, other):
    student, every = (x.to(t) for x, t in zip(sides(6, 3, 0), (one, other), strict=True))
    teacher, teachers = (x.to(t) for x, t in zip(sides(6, 4, 1), (other, one), strict=True))
    student, every = student.requires_grad_(), every.requires_grad_()
    loss = kernels.relational_distillation(student, teacher, every, teachers, temperature=0.5)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (student, every)]
    wanted = reference.relational_distillation(
        exact[0], teacher.double(), exact[1], teachers.double(), temperature=0.5
    )
    wanted.backward()
    assert loss.dtype == (DOUBLE if one == DOUBLE else torch.float32)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for ours, theirs in zip((student, every), exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-3)
    point = kernels.pointwise_distillation(student, teacher[:, :3])
    assert point.dtype == loss.dtype
    weights, mask = torch.rand(1, 6, dtype=other), torch.ones(1, 6) > 0
    assert kernels.gpo_pool(student[None], weights, mask).dtype == one


# ---- who computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", ["cpu"]])
def test_unknown_devices(device):
    with pytest.raises(ValueError, match=r"^device: .* is unknown; give ") as error:
        kernels.implementation(device)
    assert "\n" not in str(error.value)


def test_unknown_types():
    with pytest.raises(ValueError, match=r"^dtype: 'float32' is not a type; give "):
        dispatch.implementation("cpu", "float32")


LATE = """
import os, torch, triton
import d2s.kernels as kernels
os.environ["TRITON_INTERPRET"] = "1"
x, ids = torch.ones(4, 3), torch.arange(4)
try:
    kernels.hinge_loss(x, x, ids)
except ValueError as error:
    print(error)
"""


def test_the_interpreter_asked_for_too_late_is_told_so():
    pytest.importorskip("triton")
    environment = {**os.environ, "D2S_KERNELS": "triton"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", LATE], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("TRITON_INTERPRET: set after triton was imported")
    assert done.stdout.count("\n") == 1
