"""A generative model beside the network: batch -> batch with generated samples.

Enters: the inputs of training batches. Leaves: generated inputs in the form of the user's batches,
and the gradients of a training term on them.

- ``vae.py``: the VAE and its loss, of linear layers; ``conv_vae.py``: of convolutions; their parts
  are in ``networks.py``, ``conv_networks.py``, ``conditional.py``, ``likelihoods.py`` and
  ``input_range.py``
- ``feature_encoder.py``: features of the network being pruned in the encoder's place
- ``choosing.py``, ``drawing.py``: which generated inputs are worth injecting, and drawing them
- ``adaptive.py``: how much of them the training should use
- ``protocol.py``: what makes a module a generator; ``transformed.py``: real inputs under a random
  transform as one
- ``fitting.py``: training a generator beside the model, drawing from it
- ``mixing.py``: generated inputs as a batch with labels; the distillation loss
- ``injection.py``: batches for a scoring pass, gradients for a training step
- ``pictures.py``: a grid of samples
"""

from __future__ import annotations

from lightning_prune.augment.conv_vae import ConvVAE
from lightning_prune.augment.fitting import GeneratorFitter
from lightning_prune.augment.mixing import Distillation
from lightning_prune.augment.protocol import Generator, GeneratorError, Samples
from lightning_prune.augment.transformed import TransformedInputs
from lightning_prune.augment.vae import VAE, DenseVAE

__all__ = [
    "VAE",
    "ConvVAE",
    "DenseVAE",
    "Distillation",
    "Generator",
    "GeneratorError",
    "GeneratorFitter",
    "Samples",
    "TransformedInputs",
]
