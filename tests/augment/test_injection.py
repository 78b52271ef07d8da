"""The dense weights as a teacher: what it says, what the student learns, what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm, Distillation, distillation_loss
from lightning_prune.passes.teacher import Teacher


def _forward(module, batch):
    return module(batch[0] if isinstance(batch, tuple) else batch)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(108, 10),
    )
    for _ in range(3):  # running statistics that differ from a batch's
        model(3 * torch.randn(16, 1, 8, 8) + 1)
    return model


@pytest.fixture
def model() -> nn.Sequential:
    return _model()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8)


def _state(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_teacher_answers_like_a_copy_of_the_dense_model(model, x):
    teacher, dense = Teacher.of(model), copy.deepcopy(model).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.mul_(0.1)
    pruned = _state(model)
    assert torch.equal(teacher.logits(model, x, _forward), dense(x))
    assert all(torch.equal(tensor, pruned[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model[3].training


def test_a_teacher_survives_an_exception(model, x):
    teacher = Teacher.of(model)
    before = [id(p) for p in model.parameters()]
    nn.init.zeros_(model[5].weight)
    with pytest.raises(RuntimeError):
        teacher.logits(model, x[:, :, :4], _forward)
    assert [id(p) for p in model.parameters()] == before
    assert not model[5].weight.any()
    assert model.training


def test_a_teacher_knows_its_model(model):
    teacher = Teacher.of(model)
    assert teacher.fits(model)
    assert not teacher.fits(model[:5])
    model[5] = nn.Linear(108, 11)
    assert not teacher.fits(model)


def test_gradients_are_those_of_the_loss_written_out(model, x):
    teacher, dense = Teacher.of(model), copy.deepcopy(model).eval()
    nn.init.normal_(model[5].weight)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        target = dense(x)
    expected_loss = distillation_loss(twin(x), target, "categorical", 3.0)
    (0.25 * expected_loss).backward()

    injection = Injection(_forward, distillation=Distillation(0.25, 3.0))
    loss, gradients = injection.gradients(model, list(model.parameters()), x, teacher)
    torch.testing.assert_close(loss, expected_loss.detach())
    for gradient, parameter in zip(gradients, twin.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    _, scaled = injection.gradients(model, list(model.parameters()), x, teacher, scale=64.0)
    torch.testing.assert_close(scaled[0], 64.0 * gradients[0])


def test_a_student_that_is_the_teacher_learns_nothing(model, x):
    _, gradients = Injection(_forward).gradients(
        model, list(model.parameters()), x, Teacher.of(model)
    )
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-6


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(model, x, context):
    teacher, injection = Teacher.of(model), Injection(_forward)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    state, random = _state(model), torch.get_rng_state()
    y = torch.zeros(5, dtype=torch.long)
    with context():
        injection.rehearse(model, BatchForm((x, y), x, y), labels=True)
        injection.labelled(model, BatchForm((x, y), x, y), x[:1])
        injection.gradients(model, [model[5].weight], (x[:1], y[:1]), teacher)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
    assert model[0].weight.grad is None
    assert all(module.training for module in model.modules())


def test_labels_are_the_models_own_prediction(model, x):
    y = torch.zeros(5, dtype=torch.long)
    batch = Injection(_forward).labelled(model, BatchForm((x, y), x, y), x[:3])
    assert torch.equal(batch[1], model.eval()(x[:3]).argmax(1))
    assert Injection(_forward).labelled(model, BatchForm(x, x), x[:3]) is not x


def test_parameters_that_the_term_does_not_reach_get_zeros(model, x):
    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = model, nn.Linear(2, 2)

        def forward(self, x):
            return self.net(x)

    module = WithSpare()
    parameters = list(module.parameters())
    _, gradients = Injection(_forward).gradients(module, parameters, x, Teacher.of(module))
    assert gradients[-1].shape == (2,)
    assert not gradients[-1].any()


def test_a_forward_that_mixes_up_rows_is_found_in_rehearsal(model, x):
    with pytest.raises(ValueError, match="2 inputs"):
        Injection(lambda module, batch: module(batch).mean(0)).rehearse(
            model, BatchForm(x, x), labels=False
        )


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`likelihood`"):
        Injection(_forward, likelihood="poisson")
    with pytest.raises(TypeError, match="`forward`"):
        Injection("forward")


def test_joined_samples_are_labelled_by_the_dense_self_and_not_by_what_it_has_become(model, x):
    y = torch.tensor([3, 1, 4, 1, 5])
    teacher, dense = Teacher.of(model), copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = dense(x[:3]).argmax(1)
        model[5].weight.mul_(-1.0)
    inputs, labels = Injection(_forward).joined(
        model, BatchForm((x, y), x, y), x[:3], None, teacher
    )
    assert torch.equal(inputs, torch.cat([x, x[:3]]))
    assert torch.equal(labels, torch.cat([y, expected]))
    assert not torch.equal(expected, model.eval()(x[:3]).argmax(1))


def test_joined_samples_keep_the_classes_they_were_made_for(model, x):
    y, teacher = torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32), Teacher.of(model)
    made_for = torch.tensor([7, 8])
    form = BatchForm((x, y), x, y)
    labels = Injection(_forward).joined(model, form, x[:2], made_for, teacher)[1]
    assert labels.tolist() == [3, 1, 4, 1, 5, 7, 8]
    assert labels.dtype == torch.int32
    soft = torch.rand(5, 10).softmax(1)  # in this form the class is not a label
    form = BatchForm((x, soft), x, soft)
    labels = Injection(_forward).joined(model, form, x[:2], made_for, teacher)[1]
    with torch.no_grad():
        expected = model.eval()(x[:2]).softmax(1)
    torch.testing.assert_close(labels[5:], expected)


def test_without_labels_inputs_are_all_that_joins(model, x):
    batch = Injection(_forward).joined(model, BatchForm(x, x), x[:2], None, Teacher.of(model))
    assert torch.equal(batch, torch.cat([x, x[:2]]))
