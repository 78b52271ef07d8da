"""The features of one of the network's layers, caught during the user's own training step.

Enters: a submodule's name, batches. Leaves: its output on them, detached. No second forward pass is
made for the training of a generator; where features are wanted outside of a training step, the
network is run in eval mode, and left as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_prune.passes.isolation import evaluating, ours, own_randomness


class FeatureEncoder:
    """Catches what a named submodule returns.

    Args:
        path: Its name, as in ``model.named_modules()``.
        forward: ``forward(module, batch) -> logits``, to run the network outside a training step.
        name: What to call the callback in messages.
    """

    def __init__(self, path: str, forward: Callable[[nn.Module, Any], Tensor], name: str) -> None:
        self.path, self.forward, self.name = path, forward, name
        self._model: Callable[[], nn.Module | None] = _nothing
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._armed = False
        self._caught: Any = None

    def check(self, model: nn.Module) -> None:
        """Refuse a model that has no submodule of this name.

        Raises:
            MisconfigurationException: With the names that come close.
        """
        names = [name for name, _ in model.named_modules() if name]
        if self.path not in names:
            close = get_close_matches(self.path, names, n=3, cutoff=0.4) or names[:10]
            raise MisconfigurationException(
                f"{self.name}: expected `encoder` to be the name of a submodule of "
                f"{type(model).__name__}, but got {self.path!r}. Close to it are: "
                f"{', '.join(close)}."
            )

    def attach(self, model: nn.Module) -> None:
        """Listen to the submodule, until :meth:`detach`."""
        self.detach()
        self.check(model)
        self._model = weakref.ref(model)
        self._handle = model.get_submodule(self.path).register_forward_hook(self._catch)

    def detach(self) -> None:
        """Take the hook off; the model is remembered, for :meth:`compute`."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._armed, self._caught = None, False, None

    def arm(self) -> None:
        """Catch the next output."""
        self._armed, self._caught = True, None

    def take(self, n: int, joined: int = 0) -> Tensor:
        """Return the first output since :meth:`arm`, for a batch of n samples.

        Args:
            n: The batch's samples.
            joined: Samples that stood behind them in the training step; their rows are cut off.

        Raises:
            MisconfigurationException: The submodule was not run, or returned no tensor of n rows.
        """
        caught, missed = self._caught, self._armed
        self._armed, self._caught = False, None
        if missed:
            raise MisconfigurationException(
                f"{self.name}: expected the training step to run the submodule {self.path!r}, "
                "whose output the generator encodes, but it did not. Name a submodule in `encoder` "
                "that every training step runs, by calling it."
            )
        return self._checked(caught, n + joined)[:n]

    def compute(self, batch: Any, n: int) -> Tensor:
        """Return the submodule's output on a batch of n samples, by a pass in eval mode.

        Raises:
            MisconfigurationException: As :meth:`take`.
            RuntimeError: The network does not exist any more.
        """
        model = self._model()
        if model is None:
            raise RuntimeError(
                f"{self.name}: expected the network whose layer {self.path!r} is the generator's "
                "encoder, but it is gone. Keep the model, or call `trainer.fit` first."
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with (
            torch.no_grad(),
            own_randomness(device, "features"),
            evaluating(model),
            self._listening(model) as outputs,
        ):
            self.forward(model, batch)
        if not outputs:
            raise MisconfigurationException(
                f"{self.name}: expected the model's forward pass to run the submodule "
                f"{self.path!r}, but it did not. Name one in `encoder` that it calls."
            )
        return self._checked(outputs[0], n)

    @contextmanager
    def _listening(self, model: nn.Module) -> Iterator[list[Any]]:
        outputs: list[Any] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)

        armed, self._armed = self._armed, False  # this pass is none of the training step's
        handle = model.get_submodule(self.path).register_forward_hook(note)
        try:
            yield outputs
        finally:
            handle.remove()
            self._armed = armed

    def _catch(self, module: nn.Module, args: Any, output: Any) -> None:
        # Callbacks behind the generator's may yet run the model before the step.
        if self._armed and not ours():
            # Let go of the graph at once.
            self._caught = output.detach() if isinstance(output, Tensor) else output
            self._armed = False

    def _checked(self, output: Any, n: int) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != n:
            found = f"a {type(output).__name__}"
            found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else found
            raise MisconfigurationException(
                f"{self.name}: expected the submodule {self.path!r} to return one tensor with a "
                f"row for each of the {n} samples, but got {found}. Name another in `encoder`."
            )
        if not output.is_floating_point():
            raise MisconfigurationException(
                f"{self.name}: expected the submodule {self.path!r} to return floating-point "
                f"features, but got {output.dtype}. Name another in `encoder`."
            )
        return output.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the network."""
        lent = {"_model": _nothing, "_handle": None, "_armed": False, "_caught": None}
        return {**vars(self), **lent}


def _nothing() -> None:
    return None
