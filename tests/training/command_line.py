"""`python -m megatron_moe train` for tests, with ranks that break at a chosen place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

EXPERIMENT = f"""
name: small
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2, hidden_dropout: 0.1}}
moe: {{num_moe_experts: 4, moe_ffn_hidden_size: 24, moe_z_loss_coeff: 0.001}}
parallel: {{tensor_model_parallel_size: 2}}
data:
  prepare: {{input: [{REPOSITORY}/corpus/tinyshakespeare.txt], documents: paragraph}}
  tokenizer: {{kind: bytes}}
optimizer: {{lr: 1e-2, lr_warmup_fraction: 0.25}}
training:
  {{train_iters: 8, global_batch_size: 4, micro_batch_size: 2, seq_length: 32, eval_interval: 3,
  eval_iters: 1}}
checkpoint: {{save_interval: 1}}
logging: {{detail_interval: 2, curves: false}}
"""
"""Experts over the two tensor-parallel ranks (EDP), dropout, and a checkpoint after each of eight steps."""

# Python runs a file of this name at its start, in each rank too.
SITE = """
import os, signal, sys, time

def break_at(place):
    from megatron_moe.engine import checkpoint_folders as folders

    def die(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_launcher(*arguments, **keywords):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)

    def disk_full(run_folder, iteration):
        raise OSError(28, "No space left on device", str(run_folder))

    begin = folders.begin

    def stop_launcher(run_folder, iteration):
        folders.begin = begin
        handler, came = signal.getsignal(signal.SIGTERM), []

        def note(*arguments):
            handler(*arguments)
            came.append(True)

        signal.signal(signal.SIGTERM, note)
        os.kill(os.getppid(), signal.SIGTERM)
        while not came:
            time.sleep(0.01)
        return begin(run_folder, iteration)

    if place == "launcher":
        folders.begin = kill_launcher
    elif place == "inside a save":
        folders.commit = die
    elif place == "before the rename":
        folders.os = type("os", (), {**vars(os), "rename": die})
    elif place == "before latest":
        folders.point_latest = die
    elif place == "disk full":
        folders.begin = disk_full
    elif place == "signal":
        folders.begin = stop_launcher

if os.environ.get("RANK") == "0" and "BREAK_AT" in os.environ:
    break_at(os.environ["BREAK_AT"])
"""


def install(folder: Path) -> Path:
    """Write experiment and hooks into `folder`. Returns the experiment's file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    config = folder / "small.yaml"
    config.write_text(EXPERIMENT)
    return config


def train(config: Path, *overrides: str, break_at: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one start in the folder of `config`, broken at a place that `SITE`
    knows."""
    environment = {**os.environ, "PYTHONPATH": f"{config.parent}:{REPOSITORY}"}
    if break_at is not None:
        environment["BREAK_AT"] = break_at
    done = subprocess.run(
        [sys.executable, "-m", "megatron_moe", "train", str(config), *overrides],
        cwd=config.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout, done.stderr
