"""A model for places without the code that built it: ONNX, and torch's own exported programs.

Enters: a model and example inputs. Leaves: a file, and before that a proof: what was written is
loaded again and has to say what the model says, at other batch sizes too. Without the proof there
is no file.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.passes.batches import batch_size
from lightning_prune.passes.isolation import plain_attention
from lightning_prune.removal.calls import answer, arguments, copied, resized

ROUND_OFF = 1e3
"""Outputs may differ by this many units of round-off of the largest output: another runtime adds
the same products in another order, layer after layer."""
PROOF_BATCHES = (1, 2, 5)
"""Batch sizes at which the written model has to agree. Some are not the traced one: what is fixed
by accident only shows there."""


class ExportError(RuntimeError):
    """A model cannot be exported, or what was exported says something else; no file is left."""


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> None:
    """Write a model in ONNX format, and prove in onnxruntime that it says the same.

    The model is exported as it answers in eval mode. A LightningModule is exported by its
    ``forward``, without the Trainer. An existing file is replaced when the new one is proved.

    Args:
        model: The model; it is left as it was.
        path: Where to write.
        example_inputs: What ``model(...)`` takes: a tensor, a tuple of arguments, or a dict of
            keywords, of which the ONNX inputs get their names.
        dynamic_batch: Whether the batch size is free. Axis 0 of every tensor that is as long as
            that of the first counts samples.
        check: Whether to run the file in onnxruntime and compare.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or (with ``check``) onnxruntime is not installed.
        ExportError: The model cannot be traced, or the outputs differ by more than round-off.
        TypeError: The example inputs hold no tensor.
    """
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        _required(package)
    plain, inputs = _prepared(model, example_inputs, dynamic_batch)
    with _replacing(path) as unfinished:
        with _quiet(), _naming(model, "ONNX", dynamic_batch):
            # Traced by us: torch.onnx alone would fix the batch size rather than complain.
            program = _traced(plain, inputs, dynamic_batch)
            torch.onnx.export(
                program, f=unfinished, dynamo=True, external_data=False, verbose=False
            )
        if check:
            _prove(model, plain, inputs, dynamic_batch, _onnx_runner(unfinished))


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> None:
    """Write a model as a program of ``torch.export``, which loads where only torch is installed.

    ``torch.export.load(path).module()`` gives a callable module in any process. The rest is as for
    :func:`export_onnx`.

    Args:
        model: The model; it is left as it was.
        path: Where to write; torch expects the ending ``.pt2``.
        example_inputs: What ``model(...)`` takes: a tensor, a tuple of arguments, or a dict of
            keywords. The program is called in the same way.
        dynamic_batch: Whether the batch size is free.
        check: Whether to load the file and compare.

    Raises:
        ExportError: The model cannot be traced, or the outputs differ by more than round-off.
        TypeError: The example inputs hold no tensor.
    """
    plain, inputs = _prepared(model, example_inputs, dynamic_batch)
    with _replacing(path) as unfinished:
        with _quiet(), _naming(model, "torch.export", dynamic_batch):
            program = _traced(plain, inputs, dynamic_batch)
            torch.export.save(program, unfinished)
        if check:
            with _quiet():
                loaded = torch.export.load(unfinished).module()
            _prove(model, plain, inputs, dynamic_batch, lambda x: _tensors(answer(loaded, x)))


def _prepared(model: nn.Module, example_inputs: Any, dynamic: bool) -> tuple[nn.Module, Any]:
    """Return a copy in eval mode without gradients, and inputs to trace it with."""
    arguments(example_inputs)
    plain = copied(model)
    for module in plain.modules():
        module.training = False
    plain.requires_grad_(False)
    # torch takes an axis of length 1 for a constant.
    inputs = (
        resized(example_inputs, max(2, _samples(example_inputs))) if dynamic else example_inputs
    )
    return plain, inputs


def _traced(plain: nn.Module, inputs: Any, dynamic: bool) -> torch.export.ExportedProgram:
    args, keywords = arguments(inputs)
    shapes = _shapes(inputs, dynamic)
    return torch.export.export(plain, args, keywords, dynamic_shapes=shapes)


def _samples(inputs: Any) -> int:
    return batch_size(inputs)


def _shapes(inputs: Any, dynamic: bool) -> Any:
    """Return torch's description of free axes: the batch axis of every tensor that has one."""
    if not dynamic:
        return None
    size, free = _samples(inputs), torch.export.Dim("batch", min=1)

    def axes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {0: free} if leaf.ndim and leaf.shape[0] == size else {}

    args, keywords = arguments(inputs)
    return pytree.tree_map(axes, keywords or args)


def _prove(
    model: nn.Module,
    plain: nn.Module,
    inputs: Any,
    dynamic: bool,
    run: Callable[[Any], list[Tensor]],
) -> None:
    """Compare what was written with the model, at several batch sizes.

    Raises:
        ExportError: It fails, or says something else.
    """
    name = type(model).__name__
    for samples in PROOF_BATCHES if dynamic else [_samples(inputs)]:
        x = resized(inputs, samples)
        with torch.no_grad(), plain_attention():  # the traced way, not torch's fused one
            expected = _tensors(answer(plain, x))
        try:
            with torch.no_grad():
                found = run(x)
        except Exception as error:
            raise ExportError(
                f"Expected the exported {name} to run on a batch of {samples}, but it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        for index, (theirs, mine) in enumerate(zip(found, expected, strict=False)):
            if fault := _difference(theirs, mine):
                raise ExportError(
                    f"Expected the exported {name} to say what the model says on a batch of "
                    f"{samples}, but output {index} {fault}. Nothing was written."
                )
        if len(found) != len(expected):
            raise ExportError(
                f"Expected {len(expected)} outputs of the exported {name}, but got {len(found)}."
            )


def _difference(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if not expected.numel():
        return None
    a, b = found.double(), expected.cpu().double()
    kind = expected.dtype if expected.is_floating_point() else torch.float32
    bound = ROUND_OFF * torch.finfo(kind).eps * float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())
    apart = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    worst = float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    return f"differs by {worst:.3g}, which is above {bound:.3g}" if worst > bound else None


def _onnx_runner(path: Path) -> Callable[[Any], list[Tensor]]:
    runtime = import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            "Expected onnxruntime to load what was exported, but it raised "
            f"{type(error).__name__}: {error}. Some types, such as bfloat16, it does not compute "
            "with: export the model in float32, or pass `check=False`."
        ) from error
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        args, keywords = arguments(inputs)
        # An input that the model does not use may not be in the file: matched by name if named.
        named = {key: value for key, value in keywords.items() if isinstance(value, Tensor)}
        feed = named if keywords else dict(zip(names, _tensors(args), strict=True))
        arrays = {key: value.cpu().numpy() for key, value in feed.items() if key in names}
        return [torch.from_numpy(out) for out in session.run(None, arrays)]

    return run


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside the target, which replaces it at the end if nothing went wrong."""
    target = Path(path)
    unfinished = target.with_name(f".{os.getpid()}.unfinished.{target.name}")
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _naming(model: nn.Module, kind: str, dynamic: bool) -> Iterator[None]:
    """Turn whatever the tracer raises into an error that says what to do."""
    try:
        yield
    except Exception as error:
        hint = (
            " If its forward fixes the batch size (`len(x)`, `int(x.shape[0])`), write "
            "`x.shape[0]` there, or pass `dynamic_batch=False`."
            if dynamic
            else ""
        )
        raise ExportError(
            f"Expected {type(model).__name__} to be traceable for {kind}, but tracing raised "
            f"{type(error).__name__}: {error}{hint}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    # torch 2.13 asks itself a question that it has deprecated, and regrets that torchvision, which
    # nobody here needs, is not there; nobody who exports can change that.
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        exporter.setLevel(level)


def _required(package: str) -> None:
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Expected {package} for ONNX export, but it is not installed: "
            'pip install "lightning_prune[export]"',
            name=package,
        ) from error
