"""The main job as people run it: a process of its own, read back from what it leaves behind."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.functional.classification import multiclass_accuracy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "mnist.py"
WEIGHTS = {"network.1.weight": 784 * 128, "network.3.weight": 128 * 10}
TOTAL = sum(WEIGHTS.values())
TARGETS = [0.5, 0.8, 0.9, 0.95, 0.98]


@dataclass
class Run:
    """What one run of the example printed and wrote."""

    out: Path
    screen: str
    errors: str

    def __post_init__(self) -> None:
        results = json.loads((self.out / "results.json").read_text())
        self.settings: dict[str, Any] = results["settings"]
        self.rows: list[dict[str, Any]] = results["rows"]
        self.weights: dict[str, torch.Tensor] = torch.load(
            self.out / "weights.pt", weights_only=True
        )
        self.events = EventAccumulator(str(self.out), size_guidance={"images": 0, "histograms": 0})
        self.events.Reload()

    def scalars(self, tag: str) -> list[float]:
        return [event.value for event in self.events.Scalars(tag)]

    def nonzero(self) -> int:
        return sum(int(w.count_nonzero()) for w in self.weights.values() if w.ndim > 1)


def start(script: Path, *options: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *options],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@functools.cache
def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.mnist_data = functools.cache(module.mnist_data)  # reading the file takes seconds
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The main job with its real network, data and steps, two epochs a stage."""
    out = tmp_path_factory.mktemp("main") / "run"
    done = start(EXAMPLE, "--out", str(out), "--epochs", "2", "--seed", "1")
    assert done.returncode == 0, done.stderr
    return Run(out, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def threshold_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The published form: keep the weights with R > T, here without a VAE."""
    out = tmp_path_factory.mktemp("threshold") / "run"
    options = ("--criterion", "saliency", "--threshold", "0.1", "--no-vae", "--epochs", "1")
    done = start(EXAMPLE, "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    return Run(out, done.stdout, done.stderr)


def test_each_row_is_as_sparse_as_was_asked(run: Run) -> None:
    assert [row["step"] for row in run.rows] == ["dense", "1", "2", "3", "4", "5"]
    assert [row["last_epoch"] for row in run.rows] == [1, 3, 5, 7, 9, 11]
    for row, target in zip(run.rows, [0.0, *TARGETS], strict=True):
        assert row["weights_left"] == TOTAL - round(target * TOTAL)
        assert row["sparsity"] == pytest.approx(1 - row["weights_left"] / TOTAL, abs=1e-12)


def test_the_saved_weights_are_the_last_row(run: Run) -> None:
    assert run.nonzero() == run.rows[-1]["weights_left"]
    module = load_example()
    network = module.mlp()
    network.load_state_dict(run.weights)  # a plain network takes them: same keys, same shapes
    x, y = module.Digits(run.settings["seed"]).test.tensors
    with torch.no_grad():
        accuracy = multiclass_accuracy(network(x), y, 10, average="micro")
    assert run.rows[-1]["test_accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)


def test_it_learned_and_kept_what_it_learned(run: Run) -> None:
    accuracy = [row["test_accuracy"] for row in run.rows]
    assert accuracy[0] > 0.8
    assert accuracy[3] > accuracy[0] - 0.05  # a tenth of the weights is enough for these digits
    assert run.scalars("val/accuracy")[-1] > 0.5


def test_the_printed_table_is_the_file(run: Run) -> None:
    lines = re.findall(
        r"^(dense|\d)\s+([\d.]+) %\s+([\d,]+)\s+([\d.]+) %\s+([\d.]+)$", run.screen, re.MULTILINE
    )
    assert len(lines) == len(run.rows)
    for line, row in zip(lines, run.rows, strict=True):
        assert line[0] == row["step"]
        assert float(line[1]) == pytest.approx(100 * row["sparsity"], abs=0.051)
        assert int(line[2].replace(",", "")) == row["weights_left"]
        assert float(line[3]) == pytest.approx(100 * row["test_accuracy"], abs=0.051)
        assert float(line[4]) == pytest.approx(row["seconds"], abs=0.051)


def test_the_screen_shows_progress_and_no_warning(run: Run) -> None:
    assert "Epoch 11/11" in run.screen + run.errors
    assert "warn" not in (run.screen + run.errors).lower()
    assert str(run.out) in run.screen


def test_tensorboard_shows_sparsity_target_and_density(run: Run) -> None:
    assert run.scalars("prune/sparsity")[-1] == pytest.approx(1 - run.nonzero() / TOTAL, abs=1e-6)
    assert set(TARGETS) <= {round(value, 6) for value in run.scalars("prune/target")}
    for name, size in WEIGHTS.items():
        kept = int(run.weights[name.removeprefix("network.")].count_nonzero())
        assert run.scalars(f"prune/density/{name}")[-1] == pytest.approx(kept / size, abs=1e-6)
    for tag in ("prune/sparsity", "prune/target"):
        values = run.scalars(tag)
        assert values == sorted(values)


def test_tensorboard_shows_the_vae_learning(run: Run) -> None:
    for tag in ("vae/loss", "vae/reconstruction", "vae/kl"):
        assert np.isfinite(run.scalars(tag)).all()
    loss = run.scalars("vae/loss")
    assert loss[-1] < loss[0]
    assert run.scalars("vae/kl")[-1] > 1  # nats; a collapsed posterior would have none


def test_tensorboard_shows_generated_digits(run: Run) -> None:
    (tag,) = run.events.Tags()["images"]
    picture = Image.open(io.BytesIO(run.events.Images(tag)[-1].encoded_image_string)).convert("L")
    pixels = np.asarray(picture) / 255
    assert min(pixels.shape) >= 4 * 28  # a grid
    # Ink on paper: mostly dark, some strokes, as in the digits themselves (mean about 0.13).
    assert 0.03 < pixels.mean() < 0.35
    assert pixels.max() > 0.6


def test_tensorboard_shows_the_scores(run: Run) -> None:
    tags = run.events.Tags()["histograms"]
    for name, size in WEIGHTS.items():
        (tag,) = [tag for tag in tags if tag.endswith(name)]
        events = [event.histogram_value for event in run.events.Histograms(tag)]
        assert len(events) == len(TARGETS)
        # Orders of magnitude of the scores that are not zero: pixels at the rim are never lit.
        assert size / 2 < events[0].num <= size
        assert events[0].max - events[0].min > 3
        assert events[0].max < 4
    # Each event looks at the weights that the one before it has left.
    scored = sum(run.events.Histograms(tag)[-1].histogram_value.num for tag in tags)
    assert 0.9 * run.rows[-2]["weights_left"] < scored <= run.rows[-2]["weights_left"]


def test_the_threshold_form(threshold_run: Run) -> None:
    sparsity = [row["sparsity"] for row in threshold_run.rows]
    assert sparsity[0] == 0
    assert 0.05 < sparsity[1] < 1
    assert sparsity == sorted(sparsity)
    assert threshold_run.nonzero() == threshold_run.rows[-1]["weights_left"]
    assert threshold_run.settings["threshold"] == 0.1
    assert threshold_run.events.Tags()["images"] == []
    assert not any(tag.startswith("vae/") for tag in threshold_run.events.Tags()["scalars"])


def test_the_callbacks_come_from_a_file(tmp_path: Path) -> None:
    file = ROOT / "examples" / "pruning.yaml"
    limits = {"max_epochs": 6, "limit_train_batches": 3, "limit_val_batches": 2, "logger": "false"}
    options = [f"--trainer.{name}={value}" for name, value in limits.items()]
    command = ("fit", "--config", str(file), "--trainer.enable_checkpointing=false", *options)
    done = start(ROOT / "examples" / "cli.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Epoch 5: pruned to 50.0 %" in done.stdout + done.stderr


def test_the_split_is_seeded_stratified_and_disjoint() -> None:
    data, same, other = (load_example().Digits(seed) for seed in (3, 3, 4))
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [3200, 800, 1000]
    for part in parts:
        assert part.tensors[1].bincount().unique().numel() == 1
    seen = {x.numpy().tobytes() for part in parts for x in part.tensors[0]}
    assert len(seen) == 5000  # no digit is in two parts
    assert torch.equal(data.test.tensors[0], same.test.tensors[0])
    assert not torch.equal(data.test.tensors[0], other.test.tensors[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--threshold", "-1"], "--threshold: expected 0 or more, got -1"),
        (["--threshold", "nan"], "--threshold: expected 0 or more, got nan"),
        (["--criterion", "luck"], "--criterion: invalid choice: 'luck'"),
        (["--out", __file__], "is a file, expected a folder"),
    ],
)
def test_wrong_options_are_refused_in_words(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_example().parse_arguments(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_someone_elses_events_are_not_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events.out.tfevents.1.theirs"
    events.touch()
    with pytest.raises(SystemExit):
        load_example().parse_arguments(["--out", str(tmp_path)])
    assert "choose another" in capsys.readouterr().err
    assert events.exists()
