"""Generated inputs for a fit: drawn as the user chose, on the device that needs them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.augment.drawing import Drawing, Place
from lightning_prune.augment.injection import Injection
from lightning_prune.augment.mixing import BatchForm
from lightning_prune.augment.protocol import Samples
from lightning_prune.callbacks.co_training import CoTraining


@dataclass(frozen=True)
class Supply:
    """Where a callback's generated inputs come from.

    Attributes:
        generator: What is trained beside the model.
        drawing: Which of its samples are used.
        injection: How the model reads them.
    """

    generator: CoTraining
    drawing: Drawing
    injection: Injection

    def __call__(
        self, trainer: Trainer, pl_module: LightningModule, form: BatchForm, n: int
    ) -> Samples:
        """Return ``n`` inputs, with their classes from a conditional VAE; each process its own.

        Raises:
            GeneratorError: The generator returned something else.
        """
        asks_the_model = self.drawing.select == "starved"
        precision = trainer.precision_plugin.forward_context() if asks_the_model else nullcontext()
        with self.generator.in_use() as fitter, precision:
            return self.drawing(
                fitter,
                n,
                Place("inject", rank=trainer.global_rank),
                module=pl_module,
                injection=self.injection,
                form=form,
            )
