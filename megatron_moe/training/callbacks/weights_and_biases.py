"""Weights & Biases, from a process of its own (`wandb_process`).

wandb's client talks to servers, asks at the terminal, installs exit hooks, and waits in all of these. In a
process beside the rank none of that reaches the training, and what hangs can be killed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment, WandB
from megatron_moe.training.callbacks.sink import Sink, SinkError, Values

MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": None,
}
"""What WANDB_MODE may say, and what it means."""

PROGRAM = "megatron_moe.training.callbacks.wandb_process"


def mode_of(settings: WandB, environment: Mapping[str, str]) -> str | None:
    """`online`, `offline`, or None for none. WANDB_MODE, which says it for one machine or one start, comes
    before the experiment.

    Raises InputError where wandb does not know what WANDB_MODE says.
    """
    word = environment.get("WANDB_MODE")
    if not word:
        return settings.mode
    if word not in MODES:
        raise InputError(f"WANDB_MODE: must be online, offline or disabled, not {word}; or unset it")
    return MODES[word]


class WeightsAndBiases(Sink):
    """A run under the id that the run folder holds in `wandb/run.json`.

    A run that begins at step 1 again gets a new id: what it does is not what the old one did.
    """

    key = "logging.wandb"
    patience_s = 15.0

    def __init__(self, run_folder: Path, experiment: Experiment, mode: str) -> None:
        self.run_folder = run_folder
        self.folder = run_folder / "wandb"
        self.experiment = experiment
        self.mode = mode
        self.process: subprocess.Popen[str] | None = None
        self.last_sent = 0
        self.address: str | None = None

    def open(self, iteration: int) -> None:
        self._clear_temporary()
        self._temporary.mkdir(parents=True)
        if iteration == 0:
            self._state.unlink(missing_ok=True)
        if not self._state.exists():
            self._state.write_text(json.dumps({"id": secrets.token_hex(4), "iteration": 0}))
        settings = self.experiment.logging.wandb
        assert settings is not None
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM],
                # What is killed leaves nothing in the machine's folder of temporary files.
                env=environment | {"TMPDIR": str(self._temporary.resolve())},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
            )
        self._send(
            {
                "project": settings.project,
                "entity": settings.entity,
                "mode": self.mode,
                "name": self.experiment.name,
                "folder": str(self.run_folder),
                "state": str(self._state),
                "config": self.experiment.model_dump(mode="json"),
                "patience_s": self.patience_s,
            }
        )

    def write(self, values: Values) -> None:
        self._send(values)
        self.last_sent = int(values["iteration"])
        self._look_for_address()

    def close(self, completed: bool) -> None:
        self._send({"exit_code": 0 if completed else 1})
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait()
        self._look_for_address()
        if code != 0:
            raise self._failure()
        self._clear_temporary()

    def abandon(self) -> str:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._clear_temporary()
        if json.loads(self._state.read_text())["iteration"] < self.last_sent:
            return "no answer from its server; logging.wandb.mode=offline needs none"
        return f"not all is sent yet; `wandb sync {self.folder / 'latest-run'}` sends the rest"

    @property
    def _state(self) -> Path:
        return self.folder / "run.json"

    @property
    def _temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def _output(self) -> Path:
        return self.folder / "output.txt"

    def _clear_temporary(self) -> None:
        # A process that was killed may still be on its way out.
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _look_for_address(self) -> None:
        """Tell where the run can be looked at, once it has begun."""
        if self.mode == "online" and self.address is None:
            self.address = self.news = json.loads(self._state.read_text()).get("url")

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            self.process.wait()
            raise self._failure() from error

    def _failure(self) -> SinkError:
        """Why the process ended: the last line that it said."""
        assert self.process is not None
        self._clear_temporary()
        lines = self._output.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        why = said[-1].partition(". ")[0] if said else f"its process ended with {self.process.returncode}"
        return SinkError(f"{why} (`wandb login` logs in; logging.wandb.mode=offline needs no account)")
