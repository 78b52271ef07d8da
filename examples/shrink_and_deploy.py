"""Prune LeNet-5 on real digits, cut out what was pruned, export it, run it without torch.

    python examples/shrink_and_deploy.py

Half of the channels and hidden units go while the network is fine-tuned; at the end of the fit the
callback makes the smaller network. It is compared with the dense one, exported to ONNX, run by
onnxruntime on the test digits, and saved three ways.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import onnxruntime  # type: ignore[import-untyped]
import torch
from low_data import quiet_trainer
from mnist import Classifier, Digits, lenet
from torch import Tensor, nn

from lightning_prune import (
    LearningRateDecay,
    SaliencyPruningCallback,
    Selection,
    compare,
    export_onnx,
    load_compressed,
    load_shrunk,
    save_compressed,
    save_shrunk,
)


def accuracy(answers: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, in percent."""
    return 100 * float((answers.argmax(1) == labels).double().mean())


def pruned(data: Digits, dense: Classifier, epochs: int) -> tuple[Classifier, nn.Module]:
    """Return a copy of the dense model that was pruned and trained, and the smaller one of it."""
    model = Classifier(lenet())
    model.load_state_dict(dense.state_dict())
    names = ["network.0", "network.3", "network.7", "network.9"]
    units = SaliencyPruningCallback(
        {0: 0.3, 1: 0.5},
        parameters=[f"{name}.weight" for name in names],
        selection=Selection(granularity="unit", scope="layer"),
        shrink_at_end=True,
    )
    trainer = quiet_trainer(epochs, [units, LearningRateDecay()])
    trainer.fit(model, data)
    if units.shrunk is None:
        raise RuntimeError("Expected a smaller model after the fit, but none was made.")
    return model, units.shrunk


def exported(small: nn.Module, folder: Path, x: Tensor) -> Tensor:
    """Export a model, run it in onnxruntime on test digits, return the answers."""
    export_onnx(small, folder / "small.onnx", x[:4])
    session = onnxruntime.InferenceSession(folder / "small.onnx")
    (name,) = (inputs.name for inputs in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def files(model: nn.Module, small: nn.Module, folder: Path) -> list[tuple[str, int]]:
    """Save the models, check that they come back bit for bit, return the files' sizes."""
    torch.save(model.state_dict(), folder / "masked.pt")
    save_compressed(model, folder / "masked.safetensors")
    save_shrunk(small, folder / "small.pt")
    again = load_compressed(folder / "masked.safetensors")
    rebuilt = load_shrunk(folder / "small.pt", Classifier(lenet()))
    for name, value in model.state_dict().items():
        if not torch.equal(value, again[name]):
            raise RuntimeError(f"Expected {name} to come back as it was saved.")
    for name, value in small.state_dict().items():
        if not torch.equal(value, rebuilt.state_dict()[name]):
            raise RuntimeError(f"Expected {name} to come back as it was saved.")
    names = ("masked.pt", "masked.safetensors", "small.pt", "small.onnx")
    return [(name, (folder / name).stat().st_size) for name in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(description="Prune LeNet-5, shrink it, run it without torch.")
    parser.add_argument("--epochs", type=int, default=8, help="of the training with pruning")
    parser.add_argument("--dense-epochs", type=int, default=6, help="of the training before")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_prune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 on torch 2.13, in its own code.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    L.seed_everything(0, verbose=False)
    data = Digits()
    x, y = data.test.tensors
    dense = Classifier(lenet())
    quiet_trainer(options.dense_epochs, [LearningRateDecay()]).fit(dense, data)
    masked, small = pruned(data, dense, options.epochs)
    with torch.no_grad():
        answers = [network.eval()(x) for network in (dense, masked, small)]
    print("From dense to small:")
    print(compare(dense, small, x[:64]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers.append(exported(small, folder, x))
        sizes = files(masked, small, folder)
    print("\ntest accuracy")
    for kind, logits in zip(("dense", "masked", "small", "onnxruntime"), answers, strict=True):
        print(f"  {kind:<12}{accuracy(logits, y):6.1f} %")
    print("\nfiles")
    for name, size in sizes:
        print(f"  {name:<20}{size:>9,} bytes")


if __name__ == "__main__":
    main()
