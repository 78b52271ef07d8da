"""What the README promises, done."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    SaliencyPruningCallback,
    export_onnx,
    prune,
    recipes,
    shrink,
    sparsity,
)

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


class Classifier(L.LightningModule):
    """What the README calls your LightningModule: it knows nothing of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def what_a_user_has() -> dict[str, Any]:
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(labels))
    return {
        "model": Classifier(),
        "train_loader": DataLoader(torch.utils.data.Subset(data, range(1200)), 32, shuffle=True),
        "val_loader": DataLoader(torch.utils.data.Subset(data, range(1200, 1797)), 200),
    }


def test_the_calls_that_do_best_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code, _ = blocks()
    names = what_a_user_has()
    given = {"L": L, "recipes": recipes, "prune": prune, "batches": names["val_loader"]}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {**given, **names}, made := {})
    assert sparsity(names["model"]) == sparsity(made["masks"]) == pytest.approx(0.99, abs=1e-3)
    made["trainer"].fit(names["model"], names["train_loader"], names["val_loader"])
    assert sparsity(names["model"]) == pytest.approx(0.99, abs=1e-3)
    names["model"] = Classifier()
    exec(compile(code.split("# Or")[0], "README.md", "exec"), {**given, **names}, made)
    made["trainer"].fit(names["model"], names["train_loader"], names["val_loader"])
    assert sparsity(names["model"]) == pytest.approx(0.95, abs=1e-3)


def test_the_smaller_model_is_made_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, code = blocks()
    model, x = Classifier(), torch.rand(20, 64)
    with torch.no_grad():
        model.network[2].weight[:, :20] = 0
    monkeypatch.chdir(tmp_path)
    names = {"shrink": shrink, "export_onnx": export_onnx, "model": model, "x": x}
    exec(compile(code, "README.md", "exec"), names)
    assert names["small"].network[0].out_features == 12
    assert (tmp_path / "small.onnx").stat().st_size > 0


def test_the_ten_lines_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, *_ = blocks()
    assert len(code.splitlines()) <= 12
    names = what_a_user_has()
    monkeypatch.chdir(tmp_path)  # Lightning's default logger writes here
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        exec(compile(code, "README.md", "exec"), names)  # the README is ours
    pruner = names["pruner"]
    assert isinstance(pruner, SaliencyPruningCallback)
    assert [(record["epoch"], record["sparsity"]) for record in pruner.history] == [
        (epoch, pytest.approx(share, abs=1e-3)) for epoch, share in ((2, 0.5), (4, 0.8), (6, 0.9))
    ]
    assert sparsity(names["model"]) == pytest.approx(0.9, abs=1e-3)
    assert "90.0 %" in screen.getvalue()
    Classifier().load_state_dict(names["model"].state_dict())  # keys and shapes as ever


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_make_help_names_what_the_readme_uses() -> None:
    targets = set(re.findall(r"^([a-z]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"`?\bmake ([a-z]+)\b", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= used
    assert used <= targets
