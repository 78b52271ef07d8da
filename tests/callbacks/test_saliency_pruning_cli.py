"""Both callbacks from a LightningCLI YAML file: plain types, schedules by class_path."""

from __future__ import annotations

import sys

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_prune._targets import Threshold
from lightning_prune.callbacks import SaliencyPruningCallback, VAEAugmentCallback
from lightning_prune.schedules import CallableSchedule, CubicSchedule, EpochSchedule
from tests.callbacks import pruning_cases
from tests.callbacks.pruning_cases import TOTAL, Digits, loaders

HEAD = """
trainer:
  max_epochs: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_prune.callbacks.SaliencyPruningCallback
      init_args:
"""
TAIL = """
    - class_path: lightning_prune.callbacks.VAEAugmentCallback
      init_args:
        inject: [saliency]
"""

SCHEDULES = {
    "mapping": ("schedule: {0: 0.5, 1: 0.8}", EpochSchedule({0: 0.5, 1: 0.8})),
    "threshold": (
        "schedule: {0: 0.5, 1: {value: 1.0e-6}}",
        EpochSchedule({0: 0.5, 1: Threshold(1e-6)}),
    ),
    "class": (
        """schedule:
          class_path: lightning_prune.schedules.CubicSchedule
          init_args: {sparsity: 0.8, start_epoch: 0, end_epoch: 2}""",
        CubicSchedule(0.8, 0, 2),
    ),
    "class-of-epochs": (
        """schedule:
          class_path: lightning_prune.schedules.EpochSchedule
          init_args:
            targets: {0: 0.5, 1: 0.8}""",
        EpochSchedule({0: 0.5, 1: 0.8}),
    ),
    "callable": (
        "schedule: tests.callbacks.pruning_cases.every_epoch",
        CallableSchedule(pruning_cases.every_epoch),
    ),
}


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """From the pruner's arguments in YAML to a LightningCLI, as from the command line."""

    def make(text: str, *, whole: bool = False) -> LightningCLI:
        file = tmp_path / "config.yaml"
        file.write_text(text if whole else HEAD + "        " + text + TAIL)
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own calls
        monkeypatch.setattr(sys, "argv", ["train.py", f"--config={file}"])
        return LightningCLI(
            Digits, run=False, save_config_callback=None, seed_everything_default=False
        )

    return make


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_in_yaml(configure, kind) -> None:
    text, expected = SCHEDULES[kind]
    pruner = configure(text).trainer.callbacks[0]
    assert isinstance(pruner, SaliencyPruningCallback)
    assert pruner.schedule == expected


def test_all_arguments_in_yaml_and_a_fit(configure) -> None:
    text = """schedule: {0: 0.5, 1: 0.8}
        criterion: saliency
        target: fisher
        likelihood: categorical
        tolerance: 0.01
        parameters: [net.0.weight, net.3.weight]
        seed: 3"""
    cli = configure(text)
    pruner, augment = cli.trainer.callbacks[:2]
    assert isinstance(augment, VAEAugmentCallback)
    cli.trainer.fit(cli.model, *loaders())
    assert pruner.sparsity == round(0.8 * TOTAL) / TOTAL


@pytest.mark.parametrize(
    "criterion", ["obs", "saliency", "taylor", "tests.callbacks.pruning_cases.flat"]
)
def test_the_configuration_that_lightning_saves_makes_the_same_run(configure, criterion) -> None:
    text = f"""schedule: {{0: 0.5}}
        criterion: {criterion}
        refit: layers"""
    saved = configure(text)
    saved = saved.parser.dump(saved.config, skip_none=False)
    again = configure(saved, whole=True)
    assert again.parser.dump(again.config, skip_none=False) == saved
    assert f"criterion: {criterion}" in saved


@pytest.mark.parametrize(
    "text", ["schedule: {0: half}", "schedule: {0: 0.5}\n        target: unknown"]
)
def test_wrong_types_in_yaml_are_refused(configure, text, capsys) -> None:
    with pytest.raises(SystemExit):
        configure(text)
    assert "SaliencyPruningCallback" in capsys.readouterr().err


def test_the_module_of_the_tests_can_be_imported_by_name() -> None:
    assert sys.modules["tests.callbacks.pruning_cases"] is pruning_cases
