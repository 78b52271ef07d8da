"""Errors that have no fitting class in the standard library.

Wrong arguments raise ``ValueError`` or ``TypeError``; a Trainer that cannot work raises Lightning's
``MisconfigurationException``. What is left happens while a model is being scored.
"""

from __future__ import annotations


class SaliencyError(RuntimeError):
    """A model or a batch cannot be scored; the message names the layer, parameter or sample."""


class BatchFormatError(SaliencyError, TypeError):
    """The default forward cannot read a batch; the message shows the ``forward=`` way out."""


class NonFiniteScoresError(SaliencyError):
    """Logits or scores contain NaN or infinity; nothing was pruned by them."""
