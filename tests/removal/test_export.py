"""What is exported says what the model says, elsewhere too; what does not leaves no file."""

from __future__ import annotations

import subprocess
import sys

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_prune.removal import export
from lightning_prune.removal.export import ExportError, export_onnx, export_program

KINDS = [export_onnx, export_program]


@pytest.fixture(autouse=True)
def _onnx_or_skip(request):
    if "onnx" in str(request.node.name):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


class LitNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(36, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Fixed(nn.Module):
    """Its batch size becomes a number while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).view(int(x.shape[0]), 3)


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left, right):
        both = self.a(left) * self.b(right)
        return {"sum": both.sum(1), "all": both}


def digits(n):
    images = torch.from_numpy(load_digits().images[:n]).float() / 16
    return images[:, None]


def run_onnx(path, *inputs):
    session = pytest.importorskip("onnxruntime").InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, feed)]


def test_onnx_of_a_trained_lightning_module(tmp_path) -> None:
    model, x = LitNet(), digits(128)
    loader = torch.utils.data.DataLoader(list(zip(x, torch.arange(128) % 10, strict=True)), 32)
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, loader)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "lit.onnx", x[:1])
    assert model.trainer is trainer
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            run_onnx(tmp_path / "lit.onnx", x)[0], model(x), rtol=1e-4, atol=1e-5
        )
    assert [p.name for p in tmp_path.iterdir()] == ["lit.onnx"]


def test_onnx_of_a_transformer(tmp_path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)).eval()
    x = torch.randn(3, 5, 8)
    export_onnx(model, tmp_path / "x.onnx", x)
    with torch.no_grad():
        expected = model(x[:1])
    found = run_onnx(tmp_path / "x.onnx", x[:1])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_program_runs_where_there_is_only_torch(tmp_path) -> None:
    model, x = LitNet(), digits(7)
    export_program(model, tmp_path / "lit.pt2", x[:1])
    with torch.no_grad():
        torch.save((x, model.eval()(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "x, y = torch.load(sys.argv[2])\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "assert torch.allclose(program(x), y, atol=1e-6), 'outputs'\n"
        "assert not {'lightning', 'lightning_prune', 'pytorch_lightning'} & set(sys.modules)\n"
        "print('fine')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(
        [*command, tmp_path / "lit.pt2", tmp_path / "expected.pt"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert (out.stdout.strip(), out.returncode) == ("fine", 0), out.stderr


@pytest.mark.parametrize(("kind", "form"), [(export_onnx, "dict"), (export_program, "tuple")])
def test_several_inputs_and_outputs(kind, form, tmp_path) -> None:
    left, right = torch.randn(3, 4), torch.randn(3, 5)
    inputs = (left, right) if form == "tuple" else {"right": right, "left": left}
    kind(TwoInputs(), tmp_path / "x.pt2", inputs)
    assert (tmp_path / "x.pt2").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_batch_size_is_an_error_with_a_way_out(kind, tmp_path) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(
        ExportError, match=r"Expected Fixed to be traceable(.|\n)*dynamic_batch=False"
    ):
        kind(Fixed(), tmp_path / "x.pt2", x)
    assert list(tmp_path.iterdir()) == []
    kind(Fixed(), tmp_path / "x.pt2", x, dynamic_batch=False)
    assert (tmp_path / "x.pt2").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_control_flow_that_depends_on_data_is_an_error(kind, tmp_path) -> None:
    with pytest.raises(ExportError, match="Expected Branching to be traceable"):
        kind(Branching(), tmp_path / "x.pt2", torch.ones(3, 4))


def test_what_says_something_else_is_not_written(tmp_path, monkeypatch) -> None:
    (tmp_path / "x.pt2").write_text("the old file")
    real = export.answer
    monkeypatch.setattr(
        export, "answer", lambda m, x: real(m, x) * (1 + 1e-3 * isinstance(m, nn.Linear))
    )
    with pytest.raises(ExportError, match=r"output 0 differs by .* Nothing was written"):
        export_program(nn.Linear(4, 3), tmp_path / "x.pt2", torch.ones(2, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt2"]
    assert (tmp_path / "x.pt2").read_text() == "the old file"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*lightning_prune\[export\]"):
        export_onnx(nn.Linear(4, 3), tmp_path / "x.onnx", torch.ones(2, 4))


def test_round_off_is_relative_to_the_largest_output() -> None:
    expected = torch.tensor([1e4, 0.0, float("nan")])
    assert export._difference(expected + torch.tensor([0.0, 0.1, 0.0]), expected) is None
    assert "differs by" in export._difference(expected + torch.tensor([0.0, 5.0, 0.0]), expected)
    assert "inf" in export._difference(torch.zeros(3).fill_(float("nan")), expected)
    assert "shape" in export._difference(torch.ones(2), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_does_not_matter(mode, tmp_path) -> None:
    with mode():
        x = torch.ones(2, 4)
        export_program(nn.Linear(4, 3), tmp_path / "x.pt2", x)
    assert (tmp_path / "x.pt2").is_file()


def test_a_type_that_onnxruntime_does_not_know_is_named(tmp_path) -> None:
    model = nn.Linear(4, 3).bfloat16()
    with pytest.raises(ExportError, match=r"onnxruntime to load.*bfloat16.*`check=False`"):
        export_onnx(model, tmp_path / "x.onnx", torch.randn(3, 4).bfloat16())
    assert not list(tmp_path.iterdir())
