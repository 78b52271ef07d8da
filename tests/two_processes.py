"""One of the processes of a distributed run over gloo, on one machine."""

from __future__ import annotations

import os
import warnings

import torch
from lightning.pytorch.strategies import DDPStrategy


def join_group(rank: int, store: str, processes: int = 2) -> DDPStrategy:
    """Make this process number ``rank`` of a group that meets in a file; return its strategy."""
    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(processes),
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    return DDPStrategy(process_group_backend="gloo")
