"""The commands `train` and `verify`: who starts which ranks, and what the user is told in the end."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.config.one_process import in_one_process
from megatron_moe.config.schema import Experiment
from megatron_moe.data.prepare import prepare
from megatron_moe.launch import exit_codes, identity, joined, local_ranks, preflight, starting
from megatron_moe.launch.beginning import begin
from megatron_moe.launch.outcome import Outcome
from megatron_moe.launch.stop_request import Stopped, signals_raise
from megatron_moe.launch.supervisor import run_ranks
from megatron_moe.plan import plan
from megatron_moe.plan.auto import resolve
from megatron_moe.plan.wording import plural

_STOPPING = (
    "Stopping: the ranks finish this step and save. Ctrl-C once more ends them at once, without saving."
)


def train(config_path: Path, overrides: Sequence[str]) -> int:
    """Train an experiment: as one rank under torchrun or srun, else with all its ranks on this machine.

    Returns the exit code. Raises InputError.
    """
    rank = identity.from_environment(os.environ)
    if rank is not None:
        return joined.train(config_path, overrides, rank)

    try:
        with signals_raise():
            loaded = resolve(load(config_path, overrides, world_size=None))
            layout_plan = plan.make(loaded.experiment)
            job = begin(loaded, layout_plan, print)
    except Stopped:
        print("Stopped before the training began.", file=sys.stderr)
        return exit_codes.START_AGAIN
    if job.finished:
        return exit_codes.DONE
    world_size = layout_plan.layout.world_size
    print(f"{loaded.experiment.name}: starting {plural(world_size, 'rank')}", flush=True)
    outcome = run_ranks(
        _rank_command("train", str(job.path)),
        world_size,
        _threads(loaded.experiment, world_size),
        job.locked.folder.logs,
        quiet=False,
        held=[job.locked.descriptor],
        stop_message=_STOPPING,
    )
    return tell(outcome)


def verify(config_path: Path, overrides: Sequence[str], steps: int, tolerance: float | None) -> int:
    """Train a few steps under the experiment's layout, then in one process, and compare.

    Both start from the same weights and take the same batches.

    Returns the exit code, 1 where a difference is above `tolerance` (None: what the precision allows). Raises
    InputError.
    """
    if identity.from_environment(os.environ) is not None:
        raise InputError(
            "verify starts its ranks itself: run it without torchrun or srun, RANK and WORLD_SIZE unset"
        )
    try:
        with signals_raise(), tempfile.TemporaryDirectory(prefix="megatron-moe-verify-") as folder:
            loaded = resolve(load(config_path, overrides, world_size=None))
            preflight.check(loaded)
            starting.check(loaded)
            experiment = loaded.experiment
            world_size = plan.make(experiment).layout.world_size
            prepare(experiment, Path(experiment.logging.root))
            at = Path(folder)
            (at / "layout.yaml").write_text(to_yaml(experiment))
            reference = load(at / "layout.yaml", in_one_process(experiment), world_size=None).experiment
            (at / "reference.yaml").write_text(to_yaml(reference))
            for part, ranks, part_of in (("layout", world_size, experiment), ("reference", 1, reference)):
                argv = _rank_command("verify", folder, part, str(steps), json.dumps(tolerance))
                outcome = run_ranks(argv, ranks, _threads(part_of, ranks), at / "logs" / part, quiet=False)
                if outcome.exit_code != exit_codes.DONE:
                    break
            code = tell(outcome)
    except Stopped:
        code = exit_codes.START_AGAIN
    # There is nothing to go on with.
    return exit_codes.FAILED if code == exit_codes.START_AGAIN else code


def _rank_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_moe.launch.rank", *arguments]


def _threads(experiment: Experiment, ranks: int) -> int:
    return experiment.launch.threads_per_rank or local_ranks.threads_each(ranks)


def tell(outcome: Outcome) -> int:
    """Say what went wrong, if anything did. Returns the exit code."""
    if outcome.problems:
        raise InputError(*outcome.problems)
    if outcome.error:
        print(outcome.error, file=sys.stderr)
    return outcome.exit_code
