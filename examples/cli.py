"""The same network and digits, with both callbacks configured in a file instead of in code.

python examples/cli.py fit --config examples/pruning.yaml
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.cli import LightningCLI
from mnist import NETWORKS, Classifier, Digits


class DigitClassifier(Classifier):
    """The classifier of mnist.py with arguments that a file can hold.

    Args:
        network: 784-128-10 or LeNet-5.
        learning_rate: Adam's.
    """

    def __init__(
        self, network: Literal["mlp", "lenet"] = "mlp", learning_rate: float = 1e-3
    ) -> None:
        super().__init__(NETWORKS[network](), learning_rate)


if __name__ == "__main__":
    LightningCLI(DigitClassifier, Digits)
