"""What a user sees: scalars and histograms read back from the event file, lines, a table."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune._targets import Threshold
from lightning_prune.callbacks import SaliencyPruningCallback
from tests.callbacks.pruning_cases import (
    TOTAL,
    WEIGHTS,
    Digits,
    TrainOnly,
    fit,
    loaders,
    make_model,
    trainer,
)

HISTOGRAM = f"prune/score_log10/{WEIGHTS[1]}"
HALF, MOST = round(0.5 * TOTAL) / TOTAL, round(0.8 * TOTAL) / TOTAL


def events(folder):
    reader = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    return reader.Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit of 5 epochs of 5 steps; the last event comes when it is over."""
    logger = TensorBoardLogger(tmp_path_factory.mktemp("logs"), name="", version="")
    pruner = SaliencyPruningCallback({1: 0.5, 4: 0.8})
    model = fit(pruner, max_epochs=5, logger=logger)
    return pruner, events(logger.log_dir), model


@pytest.mark.parametrize("name", ["sparsity", "target"])
def test_curves_are_complete(run, name) -> None:
    scalars = run[1].Scalars(f"prune/{name}")
    # One point an epoch, of the weights validated in it, and one for the event after the last.
    asked = {"sparsity": (HALF, MOST), "target": (0.5, 0.8)}[name]
    expected = [0.0, 0.0, asked[0], asked[0], asked[0], asked[1]]
    assert [s.value for s in scalars] == pytest.approx(expected)
    assert [s.step for s in scalars] == [4, 9, 14, 19, 24, 25]


def test_densities_tell_the_sparsity(run) -> None:
    pruner, reader, model = run
    last = [reader.Scalars(f"prune/density/{name}")[-1].value for name in WEIGHTS]
    kept = last[0] * 64 * 24 + last[1] * 24 * 10
    assert 1 - kept / TOTAL == pytest.approx(pruner.sparsity, abs=1e-6)
    for name, density in zip(WEIGHTS, last, strict=True):
        recount = (model.get_parameter(name) != 0).float().mean().item()
        assert density == pytest.approx(recount)


def test_histograms_of_the_logarithm_of_the_scores(run) -> None:
    pruner, reader, _ = run
    for name in WEIGHTS:
        first, last = reader.Histograms(f"prune/score_log10/{name}")
        assert first.histogram_value.num <= pruner.masks[name].numel()
        # The second looks at the weights that were still there.
        assert last.histogram_value.num <= first.histogram_value.num
        finite = pruner.scores[name][pruner.scores[name] > 0].log10()
        assert last.histogram_value.max == pytest.approx(finite.max().item())


def test_histograms_leave_out_what_was_removed_before(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.8}, criterion="saliency", parameters=WEIGHTS[1:])
    fit(pruner, logger=logger)
    counts = [h.histogram_value.num for h in events(tmp_path).Histograms(HISTOGRAM)]
    assert counts == [240, 120]


def test_other_scalars(run) -> None:
    tags = run[1].Tags()["scalars"]
    assert {"prune/threshold", "prune/dropped_energy"} <= set(tags)
    assert run[1].Scalars("prune/threshold")[-1].value == pytest.approx(
        run[0].history[-1]["threshold"]
    )


def test_curves_are_complete_without_validation_too(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    pruner = SaliencyPruningCallback({1: 0.5}, criterion="magnitude")
    fit(pruner, model=TrainOnly(), val=False, max_epochs=3, logger=logger)
    scalars = events(tmp_path).Scalars("prune/sparsity")
    assert [s.value for s in scalars] == pytest.approx([0.0, 0.0, HALF])


def test_a_threshold_is_logged_as_it_is(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    pruner = SaliencyPruningCallback({0: Threshold(1e-3)}, criterion="saliency")
    fit(pruner, max_epochs=2, logger=logger)
    reader = events(tmp_path)
    assert reader.Scalars("prune/target")[-1].value == pytest.approx(1e-3)
    assert reader.Scalars("prune/sparsity")[-1].value == pytest.approx(pruner.sparsity)


def test_any_logger_sees_the_scalars(tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(SaliencyPruningCallback({0: 0.5}), max_epochs=2, logger=logger)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"prune/sparsity", "prune/target", f"prune/density/{WEIGHTS[0]}"} <= set(header)


def test_a_checkpoint_can_be_named_by_its_sparsity(tmp_path) -> None:
    pattern = "{epoch}-{prune/sparsity:.2f}"
    save = ModelCheckpoint(
        tmp_path, pattern, monitor="prune/sparsity", mode="max", auto_insert_metric_name=False
    )
    t = trainer(SaliencyPruningCallback({1: 0.5}), save, enable_checkpointing=True, max_epochs=4)
    t.fit(make_model(), *loaders())
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["2-0.50.ckpt"]


def test_one_scalar_on_the_progress_bar() -> None:
    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            shown.append({k for k in trainer.progress_bar_metrics if k.startswith("prune")})

    shown = []
    fit(SaliencyPruningCallback({0: 0.5}), Look())
    assert shown == [{"prune/sparsity"}] * 3


def test_lines_during_the_work_and_a_table_at_the_end(caplog) -> None:
    pruner = SaliencyPruningCallback({0: 0.5, 1: 0.8})
    with caplog.at_level(logging.INFO):
        fit(pruner)
    text = [record.getMessage() for record in caplog.records]
    assert any(
        "2 parameters with 1,776 weights by 'taylor': epoch 0: 50.0 % (888), epoch 1:" in t
        and "Left out:" in t
        and "a bias: net.0.bias, net.1.bias, net.3.bias" in t
        for t in text
    )
    assert sum(t.startswith("Epoch 0: pruned to 50.0 % (888 of 1,776") for t in text) == 1
    assert sum(pruner.report() in t for t in text) == 1
    rows = pruner.report().splitlines()
    assert len(rows) == 4
    assert rows[2].split()[:6] == ["1", "80.0", "%", "80.0", "%", "355"]


def test_a_report_before_any_event() -> None:
    assert SaliencyPruningCallback({}).report() == "No pruning event has happened."


def test_a_trainer_without_any_extras() -> None:
    class Silent(Digits):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    pruner = SaliencyPruningCallback({0: 0.5})
    Trainer(barebones=True, max_epochs=2, callbacks=[pruner]).fit(Silent(), *loaders())
    assert pruner.sparsity == HALF


def test_what_users_get_is_their_own_copy() -> None:
    pruner = SaliencyPruningCallback({0: 0.5})
    fit(pruner, max_epochs=2)
    pruner.masks[WEIGHTS[0]].fill_(True)
    pruner.history[0]["sparsity"] = 0.0
    pruner.scores.clear()
    assert pruner.sparsity == pruner.history[0]["sparsity"] == HALF
    assert torch.is_tensor(pruner.scores[WEIGHTS[0]])
