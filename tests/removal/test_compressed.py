"""The file without the zeros: smaller, and the same state dict again, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.removal import compressed
from lightning_prune.removal.compressed import load_compressed, save_compressed

safetensors = pytest.importorskip("safetensors.torch")


def lenet_300_100():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def pruned(model, sparsity):
    """All matrices at one share of zeros, at random places."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel())[: round(sparsity * parameter.numel())]
                parameter.view(-1)[order] = 0
    return model


def same_bits(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(a, b)


@pytest.mark.parametrize("build", [lenet_300_100, mlp])
@pytest.mark.parametrize(("sparsity", "most"), [(0.95, 0.10), (0.95, 0.068), (0.98, 0.03)])
def test_the_file_is_a_fraction_of_the_dense_one(build, sparsity, most, tmp_path) -> None:
    model = pruned(build(), sparsity)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    size = save_compressed(model, tmp_path / "small.safetensors")
    assert size == (tmp_path / "small.safetensors").stat().st_size
    dense = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert size <= most * dense  # without what torch.save adds
    assert size <= most * (tmp_path / "dense.pt").stat().st_size
    same_bits(load_compressed(tmp_path / "small.safetensors"), model.state_dict())
    build().load_state_dict(load_compressed(tmp_path / "small.safetensors"))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_no_density_costs_more_than_the_dense_tensor(sparsity, tmp_path) -> None:
    model = pruned(nn.Linear(200, 50, bias=False), sparsity)
    size = save_compressed(model, tmp_path / "x")
    assert size <= 200 * 50 * 4 + 400
    assert size <= 200 * 50 * (4 * (1 - sparsity) + 1 / 8) + 600  # values and a mask
    same_bits(load_compressed(tmp_path / "x"), model.state_dict())


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(
        [
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
        ]
    ),
    seed=st.integers(0, 1000),
)
def test_any_tensor_comes_back(tmp_path_factory, shape, density, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    if dtype == torch.bool:
        bits %= 2
    kept = torch.rand(*shape, 1, generator=generator) < density
    state = {"a": (bits * kept).view(dtype).reshape(shape)}
    path = tmp_path_factory.mktemp("files") / "x"
    save_compressed(state, path)
    same_bits(load_compressed(path), state)


def test_many_values_are_not_looked_for_one_by_one(tmp_path, monkeypatch) -> None:
    """Their gaps would take eight times the room of the tensor, and never be the smallest form."""
    monkeypatch.setattr(compressed, "_gaps", lambda kept: pytest.fail(f"{int(kept.sum())} values"))
    state = {"half": torch.randn(4000) * (torch.arange(4000) % 2), "dense": torch.randn(40)}
    save_compressed(state, tmp_path / "file")
    same_bits(load_compressed(tmp_path / "file"), state)


def test_long_runs_of_zeros_between_values(tmp_path) -> None:
    flat = torch.zeros(5000)
    flat[[0, 254, 255, 510, 765 + 255, 2000, 4999]] = torch.arange(1.0, 8.0)
    save_compressed({"a": flat, "none": torch.zeros(5000)}, tmp_path / "x")
    same_bits(load_compressed(tmp_path / "x"), {"a": flat, "none": torch.zeros(5000)})


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 600))
def test_gaps_against_a_slow_twin(bits, start) -> None:
    kept = torch.tensor([False] * start + bits, dtype=torch.bool)
    slow, zeros = [], 0
    for bit in kept.tolist():
        if bit:
            slow += [255] * (zeros // 255) + [zeros % 255]
            zeros = 0
        else:
            zeros += 1
    found = compressed._gaps(kept)
    assert found.tolist() == slow
    assert compressed._positions(found).tolist() == kept.nonzero().squeeze(1).tolist()


def test_only_zero_bits_are_zero(tmp_path) -> None:
    values = torch.zeros(1000)
    values[[3, 500, 501, 502]] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    size = save_compressed({"a": values}, tmp_path / "x")
    assert size < 1000
    found = load_compressed(tmp_path / "x")["a"]
    same_bits({"a": found}, {"a": values})
    assert torch.signbit(found[3])
    assert torch.isnan(found[500])
    assert found[502] > 0


def test_whole_models_with_buffers_and_tied_weights(tmp_path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(40, 40), nn.Embedding(40, 40)
    )
    model[3].weight = model[2].weight
    pruned(model, 0.9)
    size = save_compressed(model, tmp_path / "x")
    assert size < 4200  # of 1600 shared weights one copy in 10
    found = load_compressed(tmp_path / "x")
    same_bits(found, model.state_dict())
    assert found["3.weight"].data_ptr() == found["2.weight"].data_ptr()
    assert found["1.num_batches_tracked"].shape == ()


def test_strided_and_partly_shared_tensors(tmp_path) -> None:
    whole = torch.arange(2000.0).view(40, 50)
    state = {"whole": whole, "transposed": whole.t(), "column": whole[:, 3], "rows": whole[:40]}
    save_compressed(state, tmp_path / "x")
    same_bits(load_compressed(tmp_path / "x"), state)


def test_names_are_free(tmp_path) -> None:
    state = {"": torch.ones(2), "0.values": torch.zeros(999), "__metadata__": torch.ones(1)}
    save_compressed(state, tmp_path / "x")
    same_bits(load_compressed(tmp_path / "x"), state)


def test_another_dtype(tmp_path) -> None:
    model = pruned(mlp(), 0.5)
    expected = {k: v.bfloat16() for k, v in model.state_dict().items()}
    save_compressed(
        {**model.state_dict(), "n": torch.tensor(3)}, tmp_path / "x", dtype=torch.bfloat16
    )
    same_bits(load_compressed(tmp_path / "x"), {**expected, "n": torch.tensor(3)})
    with pytest.raises(
        ValueError, match=r"fit into torch.float16, but:\n- 'w' has values up to 1e"
    ):
        save_compressed({"w": torch.tensor([1e6, 1.0])}, tmp_path / "y", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"floating point type, but got torch.int8"):
        save_compressed(model, tmp_path / "y", dtype=torch.int8)
    assert not (tmp_path / "y").exists()


def test_a_process_with_safetensors_alone_can_list_it(tmp_path) -> None:
    save_compressed(pruned(mlp(), 0.95), tmp_path / "x")
    code = (
        "import json, sys; from safetensors import safe_open\n"
        "f = safe_open(sys.argv[1], framework='numpy')\n"
        "print([e['name'] for e in json.loads(f.metadata()['layout'])])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x"], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "['1.weight', '1.bias', '3.weight', '3.bias']"


def test_what_cannot_be_saved_is_named(tmp_path) -> None:
    state = {"a": {"epoch": 3}, "b": torch.eye(3).to_sparse(), "c": torch.ones(2)}
    with pytest.raises(TypeError, match=r"'a' is a dict\n- 'b' is torch.sparse_coo"):
        save_compressed(state, tmp_path / "x")
    with pytest.raises(TypeError, match="a model or a state dict, but got a list"):
        save_compressed([torch.ones(2)], tmp_path / "x")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x"
    save_compressed({"a": torch.ones(3)}, path)

    def half(parts, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_compressed({"a": torch.zeros(3)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert torch.equal(load_compressed(path)["a"], torch.ones(3))


def test_files_of_another_kind(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is none"):
        load_compressed(tmp_path / "none")
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_compressed(tmp_path / "a.pt")
    safetensors.save_file({"a": torch.ones(3)}, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"header says 'nothing'.*load_file"):
        load_compressed(tmp_path / "plain")
    header = {"format": compressed.FORMAT, "version": "2", "layout": "[]"}
    safetensors.save_file({"a": torch.ones(3)}, tmp_path / "new", metadata=header)
    with pytest.raises(ValueError, match=r"Expected version 1 .* got '2'"):
        load_compressed(tmp_path / "new")


def test_a_file_cut_short(tmp_path) -> None:
    path = tmp_path / "x"
    save_compressed(pruned(mlp(), 0.95), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        load_compressed(path)


@pytest.mark.parametrize(
    "piece", ["0.values", "0.gaps", "1.values", "1.mask", "2.dense", "one", "missing"]
)
def test_parts_that_do_not_fit(piece, tmp_path) -> None:
    half = torch.randn(400) * (torch.arange(400) % 2)
    state = {"a": pruned(nn.Linear(40, 40), 0.95).weight, "b": half, "c": torch.ones(7)}
    save_compressed(state, tmp_path / "x")
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        parts, header = {k: file.get_tensor(k) for k in list(file.keys())}, file.metadata()
    if piece == "missing":
        layout = [*json.loads(header["layout"]), {"name": "d", "shape": [1], "dtype": "float32"}]
        header["layout"] = json.dumps(layout)
    elif piece == "one":  # a single value would go to all places
        parts["0.values"] = parts["0.values"][:1]
    else:
        parts[piece] = parts[piece][:-1]
    safetensors.save_file(parts, tmp_path / "y", metadata=header)
    with pytest.raises(ValueError, match="The file is damaged"):
        load_compressed(tmp_path / "y")


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_prune\[export\]"):
        save_compressed({"a": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(ModuleNotFoundError, match=r"lightning_prune\[export\]"):
        load_compressed(tmp_path / "x")
