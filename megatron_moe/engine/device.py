"""The device of this process: a GPU where CUDA is there, else the host (see `engine.host`)."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass

import torch

from megatron_moe.engine import allocator, host
from megatron_moe.engine.stand_ins import HOST


@dataclass(frozen=True)
class Device:
    """Where this rank computes.

    Attributes:
        torch_device: for tensors.
        backend: torch.distributed backend that moves its tensors.
    """

    torch_device: torch.device
    backend: str

    @property
    def is_host(self) -> bool:
        return self.torch_device.type == "cpu"

    def synchronize(self) -> None:
        """Wait until everything that was queued has been computed."""
        torch.cuda.synchronize()

    def resolve_precision(self, precision: str) -> torch.dtype:
        """The dtype of matrix products for `training.precision`.

        `auto` is bf16 on a GPU with bf16 units, else float32: many processors have none, and there a bf16
        product takes a hundred times as long.
        """
        if precision == "auto":
            fast = not self.is_host and torch.cuda.get_device_capability()[0] >= 8
            return torch.bfloat16 if fast else torch.float32
        return torch.bfloat16 if precision == "bf16" else torch.float32


def start(local_rank: int) -> Device:
    """Choose this process's device and make Megatron-Core ready to be imported. Call before any import of
    `megatron.core`."""
    quiet_libraries()
    leave_out_wandb()
    if torch.cuda.is_available():
        # Megatron-Core overlaps sequence-parallel communication with products only if kernels start in order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank)
        return Device(torch.device("cuda", local_rank), "nccl")
    allocator.use_huge_pages()
    host.install()
    return Device(HOST, "gloo")


def leave_out_wandb() -> None:
    """Let Megatron-Core's timers find no wandb in this process.

    They would import it for a writer that nobody here gives them: 0.4 s of processor time a rank, and folders
    of temporary files that a killed rank leaves behind. Our own sink has wandb in a process of its own.
    """
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]


def quiet_libraries() -> None:
    """Keep what the libraries say about missing optional parts off the user's screen; `doctor` and the log
    say it once, in our words."""
    for pattern in (
        r".*[Tt]ransformer ?[Ee]ngine.*",
        r".*[Aa]pex.*",
        r".*[Nn]vidia-modelopt.*",
        r".*deprecat.*",
        r".*No module named.*",
        r".*TypedStorage.*",
        r".*_all_gather_base.*|.*_reduce_scatter_base.*",
        r".*CUDA initialization.*",
        r".*pin_memory.*",
        r".*absl\.logging.*",
        r".*\.grad attribute of a Tensor that is not a leaf.*",
        r".*CUDA_DEVICE_MAX_CONNECTIONS.*",
        r".*is experimental and still under active development.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("megatron", "torch.distributed", "torch.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
