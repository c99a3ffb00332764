"""What the installed libraries do once they are imported: whether they load at all, and see the GPUs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_moe.engine.machine import Machine

_IMPORTED = {
    "torch": ("torch",),
    "megatron-core": ("megatron.core", "megatron.core.datasets.helpers_cpp"),
    "transformer-engine": ("transformer_engine.pytorch",),
    "apex": ("apex", "fused_weight_gradient_mlp_cuda"),
    "deep-ep": ("deep_ep",),
}
"""Package -> what is imported of it: the parts that were compiled for one torch and one CUDA."""

OPTIONAL = ("transformer-engine", "apex", "deep-ep")
"""Those that a run can do without."""


@dataclass(frozen=True)
class Libraries:
    """What came of importing them."""

    broken: dict[str, str] = field(default_factory=dict)
    """Package -> why it cannot be imported though it is installed."""
    blamed: dict[str, str] = field(default_factory=dict)
    """Package -> the optional one that it imports and that is broken."""
    visible_gpus: int = 0
    """GPUs that torch can use."""
    gpu_problem: str = ""
    """Why torch, built for CUDA, cannot use them."""
    nccl: str | None = None
    """Version of NCCL in torch."""


def load(machine: Machine) -> Libraries:
    """Import what is installed, and look. Takes some seconds, and prints nothing."""
    with _silence(), _without_wandb():
        errors = dict(_broken(name for name in _IMPORTED if name in machine.packages))
        broken = {name: _in_words(error) for name, error in errors.items()}
        blamed = {
            name: other for name, error in errors.items() if (other := culprit(error)) not in (None, name)
        }
        if "torch" not in machine.packages or "torch" in broken:
            return Libraries(broken, blamed)
        visible, problem = _visible_gpus(machine)
        return Libraries(broken, blamed, visible, problem, _nccl())


def culprit(error: BaseException) -> str | None:
    """The optional package in whose import the error was raised; None where it was in none's.

    Megatron-Core imports what is installed of them, and takes an ImportError only for an answer.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "<module>":
            module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if (name := module.replace("_", "-")) in OPTIONAL:
                return name
    return None


def explanation(error: BaseException) -> str | None:
    """One line on an error that an optional package raised when it was imported, and what to do; else
    None."""
    name = culprit(error)
    if name is None:
        return None
    return f"{name} is installed, but cannot be imported ({_in_words(error)}); {remedy(name)}"


def remedy(name: str) -> str:
    """What to do about an optional package that cannot be imported."""
    return f"build it again for this torch, or pip uninstall {name}"


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _broken(packages: Iterable[str]) -> Iterator[tuple[str, Exception]]:
    for package in packages:
        try:
            for module in _IMPORTED[package]:
                importlib.import_module(module)
        # A library that was built for another one fails in any way: OSError, AttributeError, RuntimeError ...
        except Exception as error:
            yield package, error


def _visible_gpus(machine: Machine) -> tuple[int, str]:
    import torch

    if machine.torch_cuda is None:
        return 0, ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return 0, str(error).strip().splitlines()[0]
    return torch.cuda.device_count(), ""


def _nccl() -> str | None:
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """As in a rank: Megatron-Core's timers would import it, a quarter of what all of this takes."""
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["wandb"]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what libraries say while they load off the screen."""
    logging.disable(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
