"""Masks in, a smaller model out: removed means removed.

The smaller model computes what the masked one does; its classes stay, its layers are narrower.
What enters: a model, example inputs, perhaps masks. What leaves: a copy without the units that are
not needed, proved on its outputs, and a report; what it is worth; files of it.
"""

from __future__ import annotations

from lightning_prune.removal.compressed import load_compressed, save_compressed
from lightning_prune.removal.export import ExportError, export_onnx, export_program
from lightning_prune.removal.optimizer import carry_optimizer
from lightning_prune.removal.outcome import RemovalReport
from lightning_prune.removal.proof import RemovalError
from lightning_prune.removal.rebuild import load_shrunk, save_shrunk
from lightning_prune.removal.report import Comparison, compare
from lightning_prune.removal.semi_structured import to_semi_structured
from lightning_prune.removal.shrink import shrink, shrink_with_report
from lightning_prune.removal.sparse_layers import sparsify

__all__ = [
    "Comparison",
    "ExportError",
    "RemovalError",
    "RemovalReport",
    "carry_optimizer",
    "compare",
    "export_onnx",
    "export_program",
    "load_compressed",
    "load_shrunk",
    "save_compressed",
    "save_shrunk",
    "shrink",
    "shrink_with_report",
    "sparsify",
    "to_semi_structured",
]
