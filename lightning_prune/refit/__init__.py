"""How do the surviving weights make up for the removed ones? Masks and inputs in, weights out."""

from lightning_prune.refit.calibration import Calibration, hold_out
from lightning_prune.refit.gauss_newton import refit_outputs
from lightning_prune.refit.layerwise import refit_layers
from lightning_prune.refit.method import Refit, refit_method, refit_survivors
from lightning_prune.refit.obs import check_priced, obs_prices
from lightning_prune.refit.report import RefitReport

__all__ = [
    "Calibration",
    "Refit",
    "RefitReport",
    "check_priced",
    "hold_out",
    "obs_prices",
    "refit_layers",
    "refit_method",
    "refit_outputs",
    "refit_survivors",
]
