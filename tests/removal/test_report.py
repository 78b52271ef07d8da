"""Counts against a hand count, for models whose costs can be written down."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.networks import lenet, resnet20
from lightning_prune.removal.calls import arguments, copied, resized
from lightning_prune.removal.costs import count_macs, measure_costs, peak_bytes
from lightning_prune.removal.proof import RemovalError
from lightning_prune.removal.report import Agreement, agree, compare
from lightning_prune.removal.running import tensors_in
from lightning_prune.removal.sparse_layers import sparsify


def zeroed(model, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
    return model


def slow_macs(model, x):
    """By hooks: entries of the output times products for each, and times density."""
    found = [0, 0.0]

    def hook(layer, args, out) -> None:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            macs = out[0].numel() * layer.weight[0].numel()
            found[0] += macs
            found[1] += macs * float((layer.weight != 0).double().mean())

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found[0], round(found[1])


@pytest.mark.parametrize(("build", "size"), [(lenet, 28), (resnet20, 32)])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_macs_of_convolutional_networks(build, size, share) -> None:
    model, x = zeroed(build().eval(), share), torch.rand(3, 1, size, size)
    assert count_macs(model, x) == slow_macs(model, x[:1])


@pytest.mark.parametrize("fused", [True, False])
def test_macs_of_attention(fused) -> None:
    t, d, hidden = 5, 8, 12
    layer = nn.TransformerEncoderLayer(d, 2, hidden, batch_first=True).eval()
    layer.requires_grad_(not fused)  # torch takes the fused path of encoder layers then
    expected = t * (3 * d * d + d * d + 2 * d * hidden) + 2 * t * t * d
    assert count_macs(layer, torch.randn(3, t, d)) == (expected, expected)
    with torch.no_grad():
        layer.self_attn.in_proj_weight[d:].zero_()  # of keys and values
    assert count_macs(layer, torch.randn(3, t, d))[1] == expected - t * 2 * d * d
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_macs_of_recurrent_layers(kind, gates) -> None:
    layer = kind(4, 6, batch_first=True)
    expected = 7 * gates * 6 * (4 + 6)
    assert count_macs(layer, torch.randn(2, 7, 4)) == (expected, expected)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    assert count_macs(layer, torch.randn(2, 7, 4))[1] == 7 * gates * 6 * 4


def test_a_module_used_twice_counts_twice_and_tied_weights_once() -> None:
    layer = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    costs = measure_costs(model, torch.ones(1, 6))
    assert (costs.parameters, costs.macs) == (36, 72)


def test_peak_memory_by_hand() -> None:
    # 10 -> 100 -> 5, then 5 -> 50: the worst moment has the input, 10 and 100, and 5 or 100 again.
    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 5), nn.Linear(5, 50))
    held = sum(p.numel() for p in model.parameters())
    n = 8
    assert peak_bytes(model, torch.ones(n, 10)) == 4 * (held + n * (10 + 100 + 100))
    # In place there is no second hundred; what is alive after the next layer is larger.
    model[1] = nn.ReLU(inplace=True)
    assert peak_bytes(model, torch.ones(n, 10)) == 4 * (held + n * (10 + 100 + 5))


def test_peak_memory_knows_what_is_kept_for_a_skip() -> None:
    class Skip(nn.Module):
        def forward(self, x):
            y = x
            for _ in range(4):
                y = y.sin()
            return x + y

    # The input, one link of the chain, and the next or the sum.
    assert peak_bytes(Skip(), torch.ones(3, 100)) == 3 * 3 * 100 * 4


def test_shared_storage_counts_once() -> None:
    assert peak_bytes(nn.Flatten(), torch.ones(2, 3, 4)) == 24 * 4


def test_the_costs_of_a_real_network() -> None:
    model = zeroed(lenet(), 0.98)
    costs = measure_costs(model, torch.rand(2, 1, 28, 28))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    parameters = list(model.parameters())
    assert costs.parameters == sum(p.numel() for p in parameters) == 61706
    assert costs.nonzeros == sum(int((p != 0).sum()) for p in parameters)
    assert costs.file_bytes == len(file.getvalue())


def test_a_comparison_of_a_network_and_a_smaller_one() -> None:
    wide = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    small = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad():
        for source, target in ((wide[0], small[0]), (wide[2], small[2])):
            target.weight.copy_(source.weight[: len(target.weight), : target.weight.shape[1]])
            target.bias.copy_(source.bias[: len(target.bias)])
        wide[2].weight[:, 8:] = 0
    x = torch.from_numpy(load_digits().data[:50]).float() / 16
    state = torch.get_rng_state(), random.getstate()
    wide.train()
    found = compare(wide, small, (x,), rounds=5)
    assert wide.training
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert (found.before.macs, found.after.macs) == (74 * 512, 74 * 8)
    assert found.before.nonzero_macs == 64 * 512 + 80
    assert list(found.latency) == [1, 64]
    before, after = found.latency[64]
    assert len(before.seconds) == 5
    assert min(before.median, after.median) > 0  # which is faster is up to the machine
    assert found.agreement.absolute < 1e-5
    assert found.agreement.same_argmax == 1.0
    assert found.log["removal/parameters_after"] == 8 * 65 + 90
    assert found.log["removal/speedup_64"] == before.ratio(after)
    assert all(type(value) is float for value in found.log.values())
    table = str(found).splitlines()
    assert "before" in table[0]
    assert table[1].split() == ["parameters", "38,410", "610", f"{610 / 38410:.3f}"]
    assert sum(line.startswith("latency, batch") for line in table) == 2
    assert "the same class for 100.00% of the samples" in table[-1]


def test_nothing_runs_in_training_mode_or_with_gradients() -> None:
    seen = set()

    class Watch(nn.Module):
        def forward(self, x):
            seen.add((self.training, torch.is_grad_enabled()))
            return x

    compare(Watch().train(), Watch().train(), torch.ones(2, 3), rounds=1)
    assert seen == {(False, False)}


def test_agreement_by_hand() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    with torch.no_grad():
        one.weight.copy_(torch.eye(3))
        other.weight.copy_(torch.eye(3) * torch.tensor([1.0, 1.0, 0.5]))
        one.bias.zero_()
        other.bias.zero_()
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 2.0, 3.0], [0.0, 1.0, 8.0], [0.0, 5.0, 0.0]])
    assert agree(one, other, x) == Agreement(4.0, 0.5, 0.75)


def test_agreement_of_models_that_draw_and_of_what_is_not_finite() -> None:
    class Drawing(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    assert agree(Drawing(), Drawing(), torch.ones(2, 3)).absolute == 0.0
    nan = torch.tensor([[float("nan"), float("inf"), 1.0]])
    assert agree(nn.Identity(), nn.Identity(), nan).absolute == 0.0
    assert agree(nn.Identity(), nn.Hardtanh(), nan).absolute == float("inf")
    with pytest.raises(ValueError, match=r"before: \[\(2, 3, 4\)\], after: \[\(2, 12\)\]"):
        agree(nn.Identity(), nn.Flatten(), torch.ones(2, 3, 4))


def test_forms_of_example_inputs() -> None:
    x, mask = torch.arange(6).view(3, 2), torch.ones(3)
    fixed = torch.ones(5)
    args, keywords = arguments((x, mask))
    assert (len(args), keywords) == (2, {})
    assert arguments({"x": x})[0] == ()
    found = resized({"x": x, "mask": mask, "fixed": fixed, "flag": True}, 7)
    assert found["x"].tolist() == x[[0, 1, 2, 0, 1, 2, 0]].tolist()
    assert found["mask"].shape == (7,)
    assert found["fixed"] is fixed
    assert found["flag"] is True
    assert resized((x,), 1)[0].tolist() == [[0, 1]]
    with pytest.raises(TypeError, match="with a tensor among them"):
        arguments({"x": [1, 2]})
    for empty in (torch.ones(0, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="at least one sample"):
            resized(empty, 2)
    with pytest.raises(ValueError, match=r"positive numbers, but got \[0\]"):
        compare(nn.ReLU(), nn.ReLU(), torch.ones(2), batch_sizes=[0])


def test_a_copy_leaves_the_trainer_behind() -> None:
    class NotCopied:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    model = nn.Linear(2, 2)
    model._trainer = NotCopied()
    assert copied(model)._trainer is None
    assert isinstance(model._trainer, NotCopied)
    with pytest.raises(AssertionError, match="copied"):
        copy.deepcopy(model)


@dataclass
class Answer:
    logits: Any
    more: Any = None


@dataclass
class Slotted:
    __slots__ = ("logits",)
    logits: Any


class Lazy(Mapping):
    """Makes its values when it is asked for them."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __getitem__(self, key: int) -> Answer:
        return Answer(self.z * (key + 1))


def chained(z: Tensor) -> Answer:
    """Return an answer deep inside of others, beside a module of Python."""
    found = Answer(z, more=math)
    for _ in range(3000):
        found = Answer("no tensor", more=found)
    return found


class Wrapped(dict):
    """A mapping that torch does not know."""


class Answering(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x))


FORMS = {
    "dataclass": Answer,
    "nested": lambda z: Answer("no tensor", more=[{"z": (z,)}]),
    "mapping": lambda z: {"all": Wrapped(z=z)},
    "complex": lambda z: torch.complex(torch.zeros_like(z), z),
    "slots": Slotted,
    "made when asked": Lazy,
    "deep inside": chained,
    "holds itself": lambda z: vars(a := Answer(z)).update(more=a) or a,
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_any_form_are_compared(form) -> None:
    torch.manual_seed(0)
    one, other, x = Answering(FORMS[form]), Answering(FORMS[form]), torch.randn(5, 4)
    assert agree(one, one, x).absolute == 0
    expected = float((one.layer(x) - other.layer(x)).detach().abs().max())
    expected *= 3 if form == "made when asked" else 1
    assert agree(one, other, x).absolute == pytest.approx(expected, rel=1e-5)
    assert len(tensors_in(Lazy(x), one)) == 4  # three, and the one that it holds


def test_models_without_an_output_do_not_agree() -> None:
    model = Answering(lambda z: "nothing")
    with pytest.raises(RemovalError, match="return tensors"):
        agree(model, model, torch.randn(5, 4))


@pytest.mark.parametrize("rows", [1, 50])
def test_macs_of_sparse_layers_are_those_of_the_weights_left(rows: int) -> None:
    model = zeroed(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 8)), 0.8)
    small, _ = sparsify(model, torch.randn(4, rows, 40), measure=False)
    left = sum(int((layer.weight != 0).sum()) for layer in (model[0], model[2]))
    assert count_macs(small, torch.randn(4, rows, 40))[0] == pytest.approx(rows * left)
