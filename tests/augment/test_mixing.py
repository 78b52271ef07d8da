"""Generated inputs take the place of real ones in any form of batch; labels and the loss follow."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence
from torch.nn import functional as F

from lightning_prune.augment.mixing import (
    BatchForm,
    Distillation,
    distillation_loss,
    predicted_labels,
)

Pair = namedtuple("Pair", ["x", "y"])


@pytest.fixture
def x():
    return torch.zeros(3, 2)


@pytest.fixture
def y():
    return torch.tensor([7, 8, 9])


@pytest.mark.parametrize("n", [1, 3, 5])
def test_every_form_of_batch_is_kept(x, y, n):
    new, labels = torch.ones(n, 2), torch.zeros(n, dtype=torch.long)
    assert BatchForm(x, x).fill(new) is new
    for batch in ((x, y), [x, y], Pair(x, y)):
        filled = BatchForm(batch, x, y).fill(new, labels)
        assert type(filled) is type(batch)
        assert filled[0] is new
        assert filled[1] is labels
    for kind in (dict, OrderedDict, UserDict):
        filled = BatchForm(kind(image=x, label=y), x, y).fill(new, labels)
        assert filled["image"] is new
        assert filled["label"] is labels


def test_other_tensors_give_rows_and_the_rest_is_passed_on(x, y):
    weights, scalar = torch.arange(3.0), torch.tensor(5.0)
    batch = (x, y, {"weights": weights, "scalar": scalar, "name": "a"})
    filled = BatchForm(batch, x, y).fill(torch.ones(5, 2), torch.zeros(5))
    assert filled[2]["weights"].tolist() == [0, 1, 2, 0, 1]
    assert filled[2]["scalar"] is scalar
    assert filled[2]["name"] == "a"
    assert BatchForm(batch, x, y).fill(torch.ones(2, 2))[1].tolist() == [7, 8]


def test_the_users_batch_is_not_written_to(x, y):
    batch = {"x": x, "y": y}
    BatchForm(batch, x, y).fill(torch.ones(2, 2), torch.zeros(2))
    assert batch["x"] is x
    assert batch["y"].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("shape", "like", "expected_shape"),
    [
        ((4, 3), torch.zeros(9, dtype=torch.long), (4,)),
        ((4, 3), torch.zeros(9, 1, dtype=torch.long), (4, 1)),
        ((4, 3, 5), torch.zeros(9, 5, dtype=torch.long), (4, 5)),
        ((4, 3, 2, 5), torch.zeros(9, 2, 5, dtype=torch.int32), (4, 2, 5)),
    ],
)
def test_classes_are_the_likeliest_on_axis_one(shape, like, expected_shape):
    logits = torch.randn(shape)
    labels = predicted_labels(logits, like, "categorical")
    assert labels.shape == expected_shape
    assert labels.dtype == like.dtype
    assert torch.equal(labels.reshape(-1).long(), logits.argmax(1).reshape(-1))


def test_soft_labels_stay_soft():
    logits = torch.randn(4, 3)
    soft = predicted_labels(logits, torch.zeros(2, 3), "categorical")
    torch.testing.assert_close(soft, logits.softmax(1))


def test_bits_and_regressions():
    logits = torch.tensor([[2.0, -2.0]])
    bits = predicted_labels(logits, torch.zeros(3, 2, dtype=torch.bool), "bernoulli")
    assert bits.tolist() == [[True, False]]
    assert torch.equal(predicted_labels(logits, torch.zeros(3, 2), "gaussian"), logits)
    assert predicted_labels(torch.ones(4, 1), torch.zeros(3), "gaussian").shape == (4,)


def test_labels_that_no_prediction_fits_are_named():
    with pytest.raises(ValueError, match=r"\(4, 7\).*`likelihood`"):
        predicted_labels(torch.zeros(4, 3), torch.zeros(9, 7, dtype=torch.long), "categorical")


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_one_logit_is_no_distribution_over_classes(shape, dtype):
    """Its softmax is 1 and its argmax 0 whatever the input."""
    like = torch.zeros(9, *shape[1:], dtype=dtype)
    with pytest.raises(ValueError, match=r"at least 2 classes.*'bernoulli', for regression"):
        predicted_labels(torch.randn(shape), like, "categorical")
    with pytest.raises(ValueError, match=r"at least 2 classes.*'bernoulli', for regression"):
        distillation_loss(torch.randn(shape), torch.randn(shape), "categorical", 1.0)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_of_torch(shape, temperature):
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)

    def at(logits):
        return logits.movedim(1, -1) / temperature

    expected = kl_divergence(Categorical(logits=at(teacher)), Categorical(logits=at(student)))
    loss = distillation_loss(student, teacher, "categorical", temperature)
    torch.testing.assert_close(loss, temperature**2 * expected.mean())

    expected = kl_divergence(Bernoulli(logits=at(teacher)), Bernoulli(logits=at(student)))
    loss = distillation_loss(student, teacher, "bernoulli", temperature)
    torch.testing.assert_close(loss, temperature**2 * expected.mean())

    expected = kl_divergence(Normal(teacher, 1.0), Normal(student, 1.0))
    loss = distillation_loss(student, teacher, "gaussian", temperature)
    torch.testing.assert_close(loss, expected.mean())


@given(st.integers(2, 6), st.floats(0.5, 10.0))
def test_distillation_is_zero_only_for_equal_predictions(classes, temperature):
    logits = torch.randn(5, classes, dtype=torch.float64)
    same = distillation_loss(logits + 3.0, logits, "categorical", temperature)
    assert abs(same.item()) < 1e-9
    other = torch.randn(5, classes, dtype=torch.float64)
    assert distillation_loss(other, logits, "categorical", temperature) > 0


def test_at_a_high_temperature_logits_are_matched():
    """Hinton et al. 2015, section 2.1: the gradient tends to (z - v) / C for centred logits."""
    student = torch.randn(1, 5, dtype=torch.float64)
    teacher = torch.randn(1, 5, dtype=torch.float64)
    student -= student.mean()
    teacher -= teacher.mean()
    student.requires_grad_()
    distillation_loss(student, teacher, "categorical", 1e4).backward()
    torch.testing.assert_close(
        student.grad, ((student - teacher) / 5).detach(), rtol=1e-3, atol=1e-4
    )


def test_hard_teachers_give_the_cross_entropy():
    student = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    teacher = 1e4 * F.one_hot(labels, 3).double()
    loss = distillation_loss(student, teacher, "categorical", 1.0)
    torch.testing.assert_close(loss, F.cross_entropy(student, labels))


def test_half_precision_is_computed_in_single():
    logits = torch.randn(4, 3)
    loss = distillation_loss(logits.half(), logits.half() + 1, "categorical", 2.0)
    assert loss.dtype == torch.float32
    assert Independent(Normal(logits, 1.0), 1).mean.dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"weight": 1.0}, {"weight": -0.1}, {"temperature": 0.0}])
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        Distillation(**arguments)


def forms():
    """The same three samples as a tensor, a pair with more beside it, and a dict."""
    x, y, ids = torch.rand(3, 2), torch.tensor([4, 5, 6]), torch.tensor([[7], [8], [9]])
    yield BatchForm(x, x), lambda b: (b, None, None)
    yield BatchForm((x, y, ids, "a", 3.0), x, y), lambda b: b[:3]
    yield BatchForm({"x": x, "y": y, "more": [ids]}, x, y), lambda b: (b["x"], b["y"], b["more"][0])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_generated_rows_stand_behind_the_users_own(n):
    new, labels = torch.rand(n, 2), torch.arange(n)
    for form, parts in forms():
        joined = form.join(new, None if form.labels is None else labels)
        filled = form.fill(new, labels)
        for whole, own, extra in zip(parts(joined), parts(form.batch), parts(filled), strict=True):
            if own is not None:
                assert torch.equal(whole, torch.cat([own, extra]))
        assert type(joined) is type(form.batch)


def test_what_has_no_rows_joins_nothing():
    x, y, weight = torch.rand(3, 2), torch.zeros(3), torch.ones(4)
    joined = BatchForm((x, y, weight, "a"), x, y).join(torch.rand(2, 2), torch.ones(2))
    assert joined[2] is weight
    assert joined[3] == "a"
    assert joined[1].tolist() == [0, 0, 0, 1, 1]


def test_labelled_batches_are_not_joined_by_inputs_without_labels():
    x, y = torch.rand(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="labels for the generated inputs"):
        BatchForm((x, y), x, y).join(torch.rand(2, 2))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_lists_with_an_entry_a_sample_follow_the_samples(x, y, n):
    new, labels = torch.ones(n, 2), torch.zeros(n, dtype=torch.long)
    rest = {"names": ["a", "b", "c"], "pair": (["d", "e", "f"], [[1], [2, 3], []]), "size": (8, 8)}
    form = BatchForm((x, y, rest), x, y)
    order = [0, 1, 2, 0, 1][:n]
    filled, joined = form.fill(new, labels)[2], form.join(new, labels)[2]
    for read in (lambda r: r["names"], lambda r: r["pair"][0], lambda r: r["pair"][1]):
        assert read(filled) == [read(rest)[i] for i in order]
        assert read(joined) == [*read(rest), *read(filled)]
    assert filled["size"] == joined["size"] == (8, 8)
    assert rest["names"] == ["a", "b", "c"]


def test_a_list_of_another_length_is_passed_on(x, y):
    form = BatchForm((x, y, ["a", "b"], 3.0), x, y)
    assert form.join(torch.ones(1, 2), torch.zeros(1))[2:] == (["a", "b"], 3.0)


def test_what_may_be_labels_is_told_from_what_is_none(x, y):
    names, box, constant = ["a", "b", "c"], torch.zeros(3, 1, 4), torch.zeros(4)
    for batch in ((x, y, names, constant, torch.tensor(1.0)), (x, y, x, y)):
        assert BatchForm(batch, x, y).possible_labels() == []
    assert BatchForm((x, y, box), x, y).possible_labels() == [
        "a torch.float32 tensor of shape (3, 1, 4)"
    ]
    assert BatchForm((x, {"cls": y}), x).possible_labels() == ["a torch.int64 tensor of shape (3,)"]
    assert BatchForm((x, names), x).possible_labels() == ["a list of 3 entries"]
    assert BatchForm({"x": x, "size": (8, 8, 8)}, x).possible_labels() == []
