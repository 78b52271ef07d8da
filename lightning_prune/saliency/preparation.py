"""A model made ready to be scored, and given back as it was.

Enters: a model in any state. Leaves: the same model in eval mode with gradients on, for the length
of a ``with`` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.exceptions import NonFiniteScoresError, SaliencyError
from lightning_prune.passes.batches import outside_inference_mode
from lightning_prune.passes.isolation import eager, random_state_kept, unlogged
from lightning_prune.saliency.target import check_finite


@contextmanager
def prepared(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Put a model into the state in which it is scored, and back on exit, also after an exception.

    Inside: eval mode, gradients on, inference mode and autocast off (scores are those of the
    weights as they are stored), the given parameters require gradients, compiled modules run
    eagerly, what a LightningModule's ``forward`` logs is dropped, and random numbers drawn by the
    model (a stochastic forward) leave the caller's generators untouched.

    Raises:
        SaliencyError: If a batch norm layer is in train mode or keeps no running statistics; the
            message names it.
    """
    modules = dict(model.named_modules())
    _check_batch_norm(modules)
    training = [module for module in modules.values() if module.training]
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    try:
        with (
            random_state_kept(device),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            eager(),
            unlogged(model),
        ):
            for module in training:
                module.training = False
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield
    finally:
        for module in training:
            module.training = True
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])


@contextmanager
def first_non_finite_layer(model: nn.Module) -> Iterator[list[str]]:
    """Collect, in order of execution, the names of layers whose output is not finite."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                    found.append(name)

            handles.append(module.register_forward_hook(look))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def explained(model: nn.Module, run: Callable[[Any], Tensor], batch: Any) -> Iterator[None]:
    """Say which sample and layer non-finite logits come from, when a block raises for them.

    They were found on some part of the batch.
    """
    try:
        yield
    except NonFiniteScoresError:
        batch = outside_inference_mode(batch)
        with torch.no_grad(), first_non_finite_layer(model) as layers:
            logits = run(batch)
        try:
            check_finite(logits)
        except NonFiniteScoresError as error:
            where = f" The first layer with such an output is '{layers[0]}'." if layers else ""
            raise NonFiniteScoresError(f"{error}{where}") from None
        raise


def _check_batch_norm(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.training or module.running_mean is None:
            reason = "is in train mode" if module.training else "keeps no running statistics"
            raise SaliencyError(
                f"Expected batch norm to use its running statistics, but layer '{name}' {reason}: "
                "it mixes the samples of a batch, so that P(y|x) of one sample is not defined. "
                "Call model.eval() before scoring (Lightning's validation does), and give the "
                "layer track_running_stats=True."
            )
