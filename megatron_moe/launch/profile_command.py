"""The command `profile`: starts the ranks that measure, and keeps what they found."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import Loaded, load
from megatron_moe.engine.machine import look
from megatron_moe.launch import exit_codes, identity, local_ranks, preflight
from megatron_moe.launch.command import tell
from megatron_moe.launch.profile_experiment import measured
from megatron_moe.launch.stop_request import Stopped, signals_raise
from megatron_moe.launch.supervisor import run_ranks
from megatron_moe.plan.profile import Piece, Profile, path_of, ranks_at_once, settings_of
from megatron_moe.plan.wording import plural

_MERGED = "moe.overlap_moe_expert_parallel_comm"
_MEBI = 2**20


def profile(config_path: Path, overrides: Sequence[str], output: Path | None) -> int:
    """Measure the pieces of an experiment's model on this machine, and write the file that the planner reads.

    Returns the exit code. Raises InputError.
    """
    if identity.from_environment(os.environ) is not None:
        raise InputError(
            "profile starts its ranks itself: run it once on one machine, without torchrun or srun, RANK and "
            "WORLD_SIZE unset"
        )
    try:
        with signals_raise(), tempfile.TemporaryDirectory(prefix="megatron-moe-profile-") as folder:
            loaded = load(config_path, overrides, world_size=None)
            experiment = loaded.experiment
            on_host = _check(loaded)
            ranks = ranks_at_once(experiment, on_host)
            threads = experiment.launch.threads_per_rank or local_ranks.threads_each(ranks)
            found = Path(folder) / "measured.json"
            pieces_of = measured(experiment, ranks, on_host, Path(folder))
            (Path(folder) / "pieces.yaml").write_text(to_yaml(pieces_of))
            print(f"{experiment.name}: measuring with {plural(ranks, 'rank')}", flush=True)
            argv = [sys.executable, "-m", "megatron_moe.launch.rank", "profile", folder]
            outcome = run_ranks(argv, ranks, threads, Path(folder) / "logs", quiet=False)
            if outcome.exit_code != exit_codes.DONE:
                code = tell(outcome)
                return exit_codes.FAILED if code == exit_codes.START_AGAIN else code
            record = json.loads(found.read_text())
    except Stopped:
        return exit_codes.FAILED
    pieces = {kind: Piece(**piece) for kind, piece in record.pop("pieces").items()}
    made = Profile(settings=settings_of(experiment), ranks=ranks, threads=threads, pieces=pieces, **record)
    path = output or path_of(experiment)
    made.write(path)
    _print(made, path)
    return exit_codes.DONE


def _check(loaded: Loaded) -> bool:
    """Whether the ranks compute on a host. Raises InputError where they cannot be measured here."""
    preflight.check(loaded)
    experiment = loaded.experiment
    if experiment.moe is not None and experiment.moe.overlap_moe_expert_parallel_comm:
        raise InputError(
            f"{_MERGED} computes two microbatches at once, whose pieces cannot be told apart: leave it out "
            "to profile, or plan without a profile"
        )
    machine = look()
    on_host = not machine.gpus or machine.torch_cuda is None
    ranks = ranks_at_once(experiment, on_host)
    if not on_host and ranks > len(machine.gpus):
        raise InputError(
            f"profile needs the {ranks} ranks of one pipeline stage on this machine (TP x CP, and as many "
            f"replicas as the experts need), which has {plural(len(machine.gpus), 'GPU')}: profile on a node "
            "with more, or plan without a profile"
        )
    return on_host


def _print(found: Profile, path: Path) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("piece", no_wrap=True)
    columns = ("forward", "backward", "recomputed", "waiting", "kept", "kept if\nrecomputed", "working")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for kind, piece in found.pieces.items():
        times = (piece.forward_s, piece.backward_s, piece.recompute_s, piece.exposed_s)
        sizes = (piece.kept_bytes, piece.kept_if_recomputed_bytes, piece.working_bytes)
        table.add_row(
            kind,
            *(f"{1000 * time:.2f} ms" if time else "-" for time in times),
            *(f"{size / _MEBI:,.1f} MiB" for size in sizes),
        )
    console = Console(highlight=False)
    console.width = max(console.width, 98)
    console.print(f"\n[bold]One microbatch in one piece on one rank[/], from {found.source}")
    console.print(table)
    console.print(
        f"Updating {found.optimizer_parameters:,} parameters takes {1000 * found.optimizer_s:.1f} ms. "
        f"Written to {path}",
        soft_wrap=True,
    )
