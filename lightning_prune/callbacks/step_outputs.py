"""What a validation step has computed already, as long as the step has left it alone.

Enters: the outputs of a model, as they are returned. Leaves: the logits of a step that has called
the model once, or nothing. Whether they are those of the batch is checked where they are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.passes.batches import unwrap_logits


class StepOutputs:
    """Watch the calls of a model.

    Args:
        module: Whose.
        watch: Without it there never are any logits.
    """

    def __init__(self, module: nn.Module, *, watch: bool) -> None:
        self._seen: list[tuple[Tensor, int] | None] = []
        self._hook = module.register_forward_hook(self._see) if watch else None

    @property
    def watching(self) -> bool:
        """Whether calls are noted."""
        return self._hook is not None

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        full = isinstance(logits, Tensor) and logits.dtype in (torch.float32, torch.float64)
        # In inference mode nobody counts what is written, so it could not be told.
        known = full and not logits.is_inference()
        self._seen.append((unwrap_logits(output), logits._version) if known else None)

    def take(self) -> Tensor | None:
        """Return the logits of the only call since the last time, in full precision.

        ``None`` if there were other calls, or if they were changed in place since, as by a step
        that masks classes: they are the step's then, and no longer the model's.
        """
        seen, self._seen = self._seen, []
        if len(seen) != 1 or seen[0] is None:
            return None
        logits, version = seen[0]
        return logits if logits._version == version else None

    def forget(self) -> None:
        """Forget the calls since the last time."""
        self._seen.clear()

    def close(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
