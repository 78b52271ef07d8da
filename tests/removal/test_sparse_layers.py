"""Sparse layers: the same numbers, and only where a measurement says so."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from lightning_prune.removal import semi_structured, sparse_layers
from lightning_prune.removal.costs import measure_costs
from lightning_prune.removal.latency import Latency
from lightning_prune.removal.semi_structured import layer_faults, to_semi_structured
from lightning_prune.removal.sparse_layers import SparseLinear, sparsify


def pruned(model, share=0.95):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[torch.rand_like(parameter) < share] = 0
    return model


def mlp():
    return pruned(nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10)))


def timed_as(monkeypatch, *ratios):
    """Measurements say what we want, layer by layer."""
    left = list(ratios)

    def timed(dense, sparse, x, rounds):
        return Latency((1.0,) * rounds), Latency((left.pop(0),) * rounds)

    monkeypatch.setattr(sparse_layers, "_timed", timed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (0, 7), (1, 7), (2, 40, 7)])
def test_the_layer_computes_what_the_dense_one_does(dtype, bias, shape) -> None:
    dense = pruned(nn.Linear(7, 4, bias=bias, dtype=dtype), 0.7)
    x = torch.randn(shape, dtype=dtype)
    found = SparseLinear(dense)(x)
    torch.testing.assert_close(found, dense(x))
    assert found.is_contiguous()


@pytest.mark.parametrize("read", [0, 5, 15, 16, 20])
def test_inputs_that_no_weight_reads_are_left_out(read) -> None:
    dense = nn.Linear(20, 4, dtype=torch.float64)
    with torch.no_grad():
        dense.weight[:, torch.randperm(20)[read:]] = 0
    layer = SparseLinear(dense)
    picked = None if layer.inputs is None else len(layer.inputs)
    assert picked == (read if read <= 15 else None)
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(mine).square().sum().backward()
    dense(theirs).square().sum().backward()
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(layer.values.grad, dense.weight.grad[dense.weight != 0])


def test_a_layer_without_weights_and_inference_mode() -> None:
    dense = pruned(nn.Linear(6, 3), 1.0)
    layer = SparseLinear(dense)
    with torch.inference_mode():
        for rows in (2, 40):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(layer(x), dense.bias.expand(rows, 3))
    layer(torch.randn(2, 6)).sum().backward()


@pytest.mark.parametrize("samples", [3, 50])
def test_gradients_are_those_of_the_surviving_weights(samples) -> None:
    dense = pruned(nn.Linear(7, 4, dtype=torch.float64), 0.5)
    layer = SparseLinear(dense)
    x = torch.randn(samples, 7, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(mine).square().sum().backward()
    dense(theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(layer.values.grad, dense.weight.grad[dense.weight != 0])
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_it_copies_saves_loads_and_converts() -> None:
    dense = pruned(nn.Linear(30, 20), 0.9)
    dense.weight.requires_grad_(False)
    layer = SparseLinear(dense)
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.values.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 30)
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(other.double()(x.double()), dense.double()(x.double()))


def test_only_what_is_measured_faster_is_converted(monkeypatch) -> None:
    model, x = mlp(), torch.randn(8, 60)
    before = copy.deepcopy(model.state_dict())
    timed_as(monkeypatch, 0.5, 0.96, 0.8)
    small, found = sparsify(model, x)
    assert [type(layer) for layer in small] == [SparseLinear, nn.ReLU, nn.Linear]
    assert [(one.name, one.converted, one.ratio, one.samples) for one in found] == [
        ("0", True, 0.5, 8),
        ("2", False, 0.96, 8),
        ("", True, 0.8, 0),
    ]
    torch.testing.assert_close(small(x), model(x))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "weight", "density", "rows", "dense", "sparse", "ratio"]
    assert lines[1].endswith("0.50   converted")
    assert lines[2].endswith("left: 0.96 times the dense layer's time")
    assert "(whole model)" in lines[3]


def test_without_a_measurement_all_that_can_be_is() -> None:
    small, found = sparsify(mlp(), torch.randn(8, 60), measure=False)
    assert [type(layer) for layer in small] == [SparseLinear, nn.ReLU, SparseLinear]
    assert [one.ratio for one in found] == [None, None]
    assert str(found).count("converted without a measurement") == 2


def test_a_large_sparse_layer_is_faster_and_a_dense_one_is_left() -> None:
    model = nn.Sequential(pruned(nn.Linear(1500, 1500), 0.99), nn.ReLU(), nn.Linear(1500, 10))
    small, found = sparsify(model.eval(), torch.randn(64, 1500), rounds=9)
    assert isinstance(small[0], SparseLinear)
    assert found[0].ratio < 0.95
    assert type(small[2]) is nn.Linear
    assert found[1].reason == "left: 100% of the weights are not zero"
    assert found[2].ratio < 1.0


def test_the_dense_model_is_run_once_for_all_layers() -> None:
    model, run = mlp(), []
    model.register_forward_hook(lambda module, *_: run.append(module))
    _, found = sparsify(model, torch.randn(3, 60), measure=False)
    assert [one.converted for one in found] == [True, True]
    assert sum(module is model for module in run) == 1


def test_what_cannot_be_converted_is_left_with_a_reason() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied, self.table = nn.Linear(6, 9, bias=False), nn.Embedding(9, 6)
            self.tied.weight = self.table.weight
            self.unused, self.read, self.fine = (nn.Linear(6, 6) for _ in range(3))
            self.hooked = nn.Linear(6, 6)
            self.hooked.register_forward_hook(lambda *_: None)
            self.narrow = nn.Linear(6, 6).bfloat16()

        def forward(self, x):
            x = self.hooked(self.fine(self.read(x))) + self.read.weight.sum()
            return self.tied(self.narrow(x.bfloat16()).float())

    model = pruned(Model(), 0.8)
    small, found = sparsify(model, torch.randn(4, 6), measure=False)
    reasons = {one.name: one.reason for one in found}
    assert reasons["tied"] == "left: its weight is used elsewhere too"
    assert reasons["unused"] == "left: not called on the example inputs"
    assert reasons["hooked"] == "left: it has hooks"
    assert reasons["narrow"] == "left: no sparse product for torch.bfloat16"
    assert reasons["read"].startswith("left: the model needs it dense (AttributeError: 'SparseL")
    assert reasons["fine"] == "converted without a measurement"
    assert {name for name, m in small.named_modules() if type(m) is SparseLinear} == {"fine"}
    x = torch.randn(4, 6)
    torch.testing.assert_close(small(x), model(x))


def test_encoder_layers_read_their_weights_and_stay() -> None:
    model = pruned(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 0.8).eval()
    x = torch.randn(2, 5, 8)
    small, found = sparsify(model, {"src": x}, measure=False)
    assert [one.name for one in found] == ["linear1", "linear2"]
    torch.testing.assert_close(small(x), model(x))


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    layer = pruned(nn.Linear(6, 6), 0.8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    small, _ = sparsify(model, torch.randn(3, 6), measure=False)
    assert small[0] is small[2]
    assert isinstance(small[0], SparseLinear)


def test_costs_count_values_only() -> None:
    model, x = mlp(), torch.randn(8, 60)
    small, _ = sparsify(model, x, measure=False)
    dense, sparse = measure_costs(model, x), measure_costs(small, x)
    kept = sum(int((p != 0).sum()) for p in model.parameters())
    assert (sparse.parameters, sparse.nonzeros) == (kept, kept)
    assert sparse.macs == sparse.nonzero_macs == dense.nonzero_macs == kept - 60


def two_of_four(rows=32, columns=64, dtype=torch.float16):
    layer = nn.Linear(columns, rows).to(dtype)
    with torch.no_grad():
        layer.weight.view(rows, -1, 4)[..., 1::2] = 0
    return layer


def test_conditions_of_the_two_of_four_form(monkeypatch) -> None:
    assert layer_faults("x", two_of_four()) == [
        "'x': is on cpu; move the model to a CUDA device first"
    ]
    monkeypatch.setattr(semi_structured, "_device_faults", lambda device: [])
    assert layer_faults("x", two_of_four()) == []
    assert layer_faults("x", two_of_four(dtype=torch.bfloat16)) == []
    assert "is torch.float32" in layer_faults("x", two_of_four(dtype=torch.float32))[0]
    for rows, columns in ((16, 64), (32, 32)):
        (fault,) = layer_faults("x", two_of_four(rows, columns))
        assert f"({rows}, {columns})" in fault
        assert "multiples of (32, 64)" in fault
    layer = two_of_four()
    with torch.no_grad():
        layer.weight[3, 4:7] = 1.0
    (fault,) = layer_faults("x", layer)
    assert fault.endswith("not zero, in 1 of 512 places")
    with torch.no_grad():
        layer.weight[3, 4:8] = 0.0  # fewer than two is fine
    assert layer_faults("x", layer) == []
    assert "no module of this name" in layer_faults("x", None)[0]
    assert "is a Conv2d" in layer_faults("x", nn.Conv2d(1, 1, 1))[0]
    assert any("no multiple of 4" in fault for fault in layer_faults("x", nn.Linear(6, 32)))


@pytest.mark.parametrize(("capability", "fine"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_compute_capability(capability, fine, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    faults = semi_structured._device_faults(torch.device("cuda"))
    assert (faults == []) is fine
    assert fine or "a GPU of compute capability (7, 5)" in faults[0]


def test_the_layers_of_the_pattern_are_found_and_converted(monkeypatch) -> None:
    monkeypatch.setattr(semi_structured, "_device_faults", lambda device: [])
    converted = []

    def convert(weight):
        converted.append(weight)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    model = nn.Sequential(two_of_four(), nn.ReLU(), nn.Linear(32, 10).half())
    small = to_semi_structured(model)
    assert len(converted) == 1
    assert torch.equal(small[0].weight, model[0].weight)
    assert (small[0].weight.requires_grad, model[0].weight.requires_grad) == (False, True)
    with pytest.raises(ValueError, match=r"(?s)'2': has a weight of .*'2': has more than two of"):
        to_semi_structured(model, layers=["0", "2"])
    with pytest.raises(ValueError, match="no linear layer has at least two zeros"):
        to_semi_structured(nn.Linear(8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")
def test_on_a_gpu_the_outputs_are_the_same() -> None:
    model = nn.Sequential(two_of_four(128, 256), nn.ReLU(), two_of_four(64, 128)).cuda()
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(to_semi_structured(model)(x), model(x), rtol=1e-2, atol=1e-2)
