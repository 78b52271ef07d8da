"""A state dict with zeros in it, and a file without them.

Enters: a model or a state dict. Leaves: a safetensors file that stores of every sparse tensor the
values and where they are, and from it the same state dict again, bit for bit. Nothing in the file
is pickled: what it holds are numbers and, in the header, a layout in JSON.

Where the values are takes a bit for each entry (a mask), or a byte for each value (the gap to the
one before it), whichever is less: the gaps are, below a density of about one in eight.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.masking.apply import INTEGER_OF_WIDTH
from lightning_prune.masking.packing import pack_masks, unpack_masks

FORMAT, VERSION = "lightning_prune.compressed", "1"
FAR = 255
"""A byte of gaps that stands for 255 zeros and no value."""
ENTRY_BYTES = 90
"""About what one more tensor costs in the header of a safetensors file."""


def save_compressed(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> int:
    """Write a state dict without its zeros and return the size of the file in bytes.

    A zero is an entry whose bits are all zero, so that -0.0 and NaN come back as they were. Shared
    tensors are stored once and come back shared. An existing file is replaced when the new one is
    complete, not before. At 95 % sparsity a float32 model takes about 0.065 of its dense size:
    0.05 for the values, 0.0125 for where they are.

    Args:
        model_or_state_dict: A model, or its state dict.
        path: Where to write.
        dtype: Store floating point tensors in this dtype instead of their own, which loses digits.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        TypeError: An entry is no tensor, or one that has no plain numbers (sparse, quantized).
        ValueError: ``dtype`` is not floating point, or finite values become infinite in it.
    """
    library = _safetensors("safetensors.torch")
    state = _checked(model_or_state_dict)
    if dtype is not None:
        state = _converted(state, dtype)
    parts: dict[str, Tensor] = {}
    layout: list[dict[str, Any]] = []
    first: dict[tuple[Any, ...], str] = {}
    for index, (name, tensor) in enumerate(state.items()):
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            layout.append({"name": name, "same_as": first[place]})
            continue
        first[place] = name
        entry, pieces = _encode(tensor.detach().cpu().contiguous())
        layout.append({"name": name, **entry})
        parts.update({f"{index}.{piece}": value for piece, value in pieces.items()})
    header = {"format": FORMAT, "version": VERSION, "layout": json.dumps(layout)}
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    try:
        library.save_file(parts, unfinished, metadata=header)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target.stat().st_size


def load_compressed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict in a file of :func:`save_compressed`, on the CPU.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        FileNotFoundError: There is no such file.
        ValueError: The file is not one of these, is of a later version, or is damaged.
    """
    library = _safetensors("safetensors")
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a file of `save_compressed` at {path}; there is none.")
    try:
        with library.safe_open(path, framework="pt") as file:
            header = _checked_header(file.metadata() or {}, path)
            parts = {key: file.get_tensor(key) for key in list(file.keys())}
    except library.SafetensorError as error:
        raise ValueError(
            f"Expected {path} to be a file of `save_compressed`, but it cannot be read ({error}). "
            "Is it cut short, or a checkpoint of another kind (for `torch.load`)?"
        ) from error
    try:
        return dict(_decoded(json.loads(header["layout"]), parts))
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"Expected the parts of {path} to fit the layout in its header, but they do not "
            f"({type(error).__name__}: {error}). The file is damaged; write it again."
        ) from error


def _decoded(
    layout: list[dict[str, Any]], parts: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    found: dict[str, Tensor] = {}
    for index, entry in enumerate(layout):
        name = entry["name"]
        if "same_as" in entry:
            found[name] = found[entry["same_as"]]
        else:
            kinds = ("dense", "values", "mask", "gaps")
            pieces = {k: parts[f"{index}.{k}"] for k in kinds if f"{index}.{k}" in parts}
            found[name] = _decode(entry, pieces)
        yield name, found[name]


def _encode(tensor: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a tensor's entry in the layout, and its pieces in the smallest of the three forms."""
    entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if tensor.is_complex() or not tensor.numel():
        return entry, {"dense": plain}
    flat = tensor.reshape(-1)
    kept = flat.view(INTEGER_OF_WIDTH[tensor.itemsize]) != 0
    count, mask_bytes = int(kept.count_nonzero()), -(-len(kept) // 8)
    # There is a gap at least for each value, so that gaps, which take room to find, need not be
    # known where values are many.
    gaps = _gaps(kept) if count < mask_bytes else None
    where = mask_bytes if gaps is None else min(len(gaps), mask_bytes)
    if count * tensor.itemsize + where + ENTRY_BYTES >= len(flat) * tensor.itemsize:
        return entry, {"dense": plain}
    if gaps is not None and len(gaps) < mask_bytes:
        return entry, {"values": flat[kept], "gaps": gaps}
    return entry, {"values": flat[kept], "mask": pack_masks({"": kept})["bits"]}


def _decode(entry: Mapping[str, Any], pieces: Mapping[str, Tensor]) -> Tensor:
    """Undo :func:`_encode`; a ValueError says what does not fit."""
    shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
    if "dense" in pieces:
        dense = torch.view_as_complex(pieces["dense"]) if dtype.is_complex else pieces["dense"]
        if list(dense.shape) != shape or dense.dtype != dtype:
            raise ValueError(
                f"{entry['name']!r} should be {dtype} {shape}, but is {dense.dtype} "
                f"{list(dense.shape)}"
            )
        return dense
    values, size = pieces["values"], math.prod(shape)
    if "gaps" in pieces:
        kept = _positions(pieces["gaps"])
        inside = not len(kept) or int(kept[-1]) < size
    else:
        packed = {"names": [""], "shapes": [[size]], "bits": pieces["mask"]}
        kept, inside = unpack_masks(packed)[""].nonzero().squeeze(1), True
    if not inside or len(kept) != len(values) or values.dtype != dtype:
        raise ValueError(
            f"{entry['name']!r} of {size} {dtype} entries has {len(values)} {values.dtype} values "
            f"for {len(kept)} places"
        )
    flat = torch.zeros(size, dtype=dtype)
    integer = INTEGER_OF_WIDTH[dtype.itemsize]  # as numbers of 8 bits are not indexed everywhere
    flat.view(integer)[kept] = values.view(integer)
    return flat.view(shape)


def _gaps(kept: Tensor) -> Tensor:
    """Return the zeros before each value as bytes; 255 zeros without a value are a :data:`FAR`.

    Example:
        >>> _gaps(torch.tensor([False, True, True, False])).tolist()
        [1, 0]
        >>> _positions(torch.tensor([FAR, 1, 0], dtype=torch.uint8)).tolist()
        [256, 257]
    """
    positions = kept.nonzero().squeeze(1)
    zeros = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    ends = (zeros // FAR + 1).cumsum(0)
    gaps = torch.full((int(ends[-1]) if len(ends) else 0,), FAR, dtype=torch.uint8)
    gaps[ends - 1] = (zeros % FAR).to(torch.uint8)
    return gaps


def _positions(gaps: Tensor) -> Tensor:
    """Undo :func:`_gaps`."""
    value = gaps != FAR
    return ((gaps.long() + value).cumsum(0) - 1)[value]


def _checked(model_or_state_dict: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model_or_state_dict, nn.Module):
        state: Mapping[str, Any] = model_or_state_dict.state_dict()
    elif isinstance(model_or_state_dict, Mapping):
        state = model_or_state_dict
    else:
        raise TypeError(
            "Expected a model or a state dict, but got a "
            f"{type(model_or_state_dict).__name__}. A Lightning checkpoint holds its state dict "
            "under 'state_dict'."
        )
    faults = []
    for name, entry in state.items():
        if not isinstance(entry, Tensor):
            faults.append(f"{name!r} is a {type(entry).__name__}")
        elif entry.layout != torch.strided or entry.is_quantized or entry.is_meta:
            faults.append(f"{name!r} is {entry.layout} {entry.dtype} on {entry.device.type}")
    if faults:
        raise TypeError("\n- ".join(["Expected dense tensors in the state dict, but:", *faults]))
    return dict(state)


def _converted(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if not dtype.is_floating_point:
        raise ValueError(f"Expected argument `dtype` to be a floating point type, but got {dtype}.")
    converted: dict[str, Tensor] = {}
    done: dict[tuple[Any, ...], Tensor] = {}  # what was shared stays shared
    faults = []
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            converted[name] = tensor
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        converted[name] = done.setdefault(place, tensor.detach().to(dtype))
        if bool((tensor.isfinite() & ~converted[name].isfinite()).any()):
            faults.append(f"{name!r} has values up to {tensor[tensor.isfinite()].abs().max():g}")
    if faults:
        raise ValueError("\n- ".join([f"Expected values that fit into {dtype}, but:", *faults]))
    return converted


def _checked_header(header: dict[str, str], path: str | os.PathLike[str]) -> dict[str, str]:
    if header.get("format") != FORMAT or "layout" not in header:
        raise ValueError(
            f"Expected {path} to be a file of `save_compressed`, but its header says "
            f"{header.get('format', 'nothing')!r}. Plain safetensors files are read by "
            "`safetensors.torch.load_file`."
        )
    if header.get("version") != VERSION:
        raise ValueError(
            f"Expected version {VERSION} of the compressed format in {path}, but got "
            f"{header.get('version')!r}. Read it with a newer lightning_prune."
        )
    return header


def _safetensors(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected safetensors for compressed checkpoints, but it is not installed: "
            'pip install "lightning_prune[export]"',
            name="safetensors",
        ) from error
