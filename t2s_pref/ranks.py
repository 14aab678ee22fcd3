"""The processes of `accelerate launch`: who this one is, and waiting for the others."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import PartialState

# Ranks meet once, after hours of sampling at unequal speed; torch's own limit of half an hour would end a good run.
PATIENCE = timedelta(days=7)


def world_size() -> int:
    """How many processes run together; 1 outside of a launcher. Imports nothing."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0; rank 0 alone writes results."""
    return int(os.environ.get("RANK", "0"))


def started_alone() -> bool:
    """Whether accelerate was asked for several processes and started this one only: on CPUs it needs `--multi_gpu`."""
    environment = os.environ
    return "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment and world_size() == 1


def state(cpu: bool = False) -> PartialState:
    """Accelerate's view of the processes: NCCL between GPUs, gloo between CPUs."""
    import torch
    from accelerate import PartialState

    # Without GPUs accelerate must be told: it would take each process for one of its own, and nobody would wait.
    return PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=PATIENCE)


def wait_for_everyone(cpu: bool = False) -> None:
    """Return once every rank has come here."""
    if world_size() > 1:
        state(cpu).wait_for_everyone()


def from_main(value: Any, cpu: bool = False) -> Any:
    """What rank 0 has as `value`, on every rank."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    state(cpu)
    return broadcast_object_list([value])[0]
