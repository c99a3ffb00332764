"""The process that talks to wandb: `python -m megatron_moe.training.callbacks.wandb_process`.

Its standard input holds one JSON object a line: the settings of the run, then each step, then
`{"exit_code": ...}`; an end without that is the death of the rank. Where wandb fails, the last line of the
output says why.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_INIT_S = 30.0
"""What wandb tries to reach its server for."""


def serve(lines: Iterable[str]) -> None:
    """Start or go on with a run, log each step, finish."""
    import wandb

    messages = iter(lines)
    start = json.loads(next(messages))
    state = Path(start["state"])
    known: dict[str, Any] = json.loads(state.read_text())
    run = wandb.init(
        project=start["project"],
        entity=start["entity"],
        name=start["name"],
        id=known["id"],
        resume="allow",
        mode=start["mode"],
        dir=start["folder"],
        config=start["config"],
        settings=wandb.Settings(
            console="off",
            quiet=True,
            silent=True,
            init_timeout=_INIT_S,
            # The experiment and its metrics are sent; nothing about this machine, its user and its files.
            disable_code=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        ),
    )
    known["url"] = run.url
    _write(state, known)
    exit_code = 1
    for line in messages:
        message = json.loads(line)
        if "exit_code" in message:
            exit_code = message["exit_code"]
            break
        iteration = message["iteration"]
        # Online the server knows what it has, and wandb leaves out earlier steps by itself.
        if start["mode"] == "online" or iteration > known["iteration"]:
            run.log(message, step=iteration)
            known["iteration"] = max(known["iteration"], iteration)
            _write(state, known)
    # Whoever waits for us kills us after this time; nobody may be left to do it.
    signal.alarm(int(start["patience_s"]) + 1)
    run.finish(exit_code=exit_code)


def _write(state: Path, known: dict[str, Any]) -> None:
    aside = state.with_suffix(".part")
    aside.write_text(json.dumps(known))
    os.replace(aside, state)


def main() -> None:
    try:
        serve(sys.stdin)
    except Exception as error:
        print(str(error).strip().partition("\n")[0] or type(error).__name__, flush=True)
        # Not through wandb's exit hooks: they wait.
        os._exit(1)


if __name__ == "__main__":
    main()
