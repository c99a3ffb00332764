"""The command `generate`: reads prompts and model, and starts the ranks where there are several."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.launch import exit_codes, identity, local_ranks
from megatron_moe.launch.command import tell
from megatron_moe.launch.stop_request import Stopped, signals_raise
from megatron_moe.launch.supervisor import run_ranks

JOB = "job.json"


@dataclass(frozen=True)
class Request:
    """The command line.

    Attributes:
        texts: prompts given one by one; None stands for standard input.
        file: of prompts.
    """

    model: Path
    overrides: Sequence[str]
    texts: Sequence[str]
    file: Path | None
    chat: bool
    system: str | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    stops: Sequence[str]
    batch: int
    dtype: str
    logit_error: bool
    output: Path | None
    as_json: bool


def generate(request: Request) -> int:
    """Continue prompts. Returns the exit code. Raises InputError."""
    if identity.from_environment(os.environ) is not None:
        raise InputError(
            "generate starts its ranks itself: run it without torchrun or srun, RANK and WORLD_SIZE unset"
        )
    if request.temperature == 0 and (request.top_k is not None or request.top_p < 1):
        raise InputError(
            "--top-k and --top-p choose among what is drawn, and --temperature is 0, which draws nothing: "
            "give it, for example --temperature 1"
        )
    if request.logit_error and request.dtype != "fp8":
        raise InputError("--logit-error goes with --dtype fp8 only")
    given = _given(request)
    try:
        with signals_raise():
            job, ranks = _job(request, given)
            if ranks > 1:
                return _on_ranks(job, ranks)
            from megatron_moe.inference.command import run

            return run(job)
    except Stopped:
        return exit_codes.FAILED


def _given(request: Request) -> list[Any]:
    """Texts and conversations, from where they come."""
    from megatron_moe.inference.prompts import read_texts

    given: list[Any] = list(request.texts)
    if request.file is not None:
        given += read_texts(request.file)
    if not given and not sys.stdin.isatty():
        given = [text] if (text := sys.stdin.read().strip("\n")) else []
    if not given:
        raise InputError("there is no prompt: give --prompt TEXT, --file FILE, or text on standard input")
    return given


def _job(request: Request, given: list[Any]) -> tuple[Any, int]:
    """What the ranks are to do, and how many of them."""
    from megatron_moe.convert.models import open_model
    from megatron_moe.inference import prompts
    from megatron_moe.inference.job import Job
    from megatron_moe.inference.layout import inference_experiment
    from megatron_moe.inference.sampling import Sampling
    from megatron_moe.inference.settings import Settings
    from megatron_moe.plan.layout import Layout

    if request.output is not None and not request.output.absolute().parent.is_dir():
        raise InputError(f"--output {request.output}: there is no folder {request.output.parent}")
    model = open_model(request.model)
    ranks = Layout.of(inference_experiment(model.experiment, request.overrides)).world_size
    tokenizer = prompts.tokenizer_of(model)
    ends = prompts.ends_of(model, tokenizer)
    sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
    job = Job(
        model=str(request.model),
        overrides=list(request.overrides),
        dtype=request.dtype,  # type: ignore[arg-type]
        logit_error=request.logit_error,
        prompts=prompts.encode(model, tokenizer, given, request.chat, request.system),
        settings=Settings(request.max_new_tokens, sampling, sorted(ends), request.batch),
        stops=list(request.stops),
        hidden=sorted(prompts.hidden_of(tokenizer, ends)),
        output=None if request.output is None else str(request.output),
        as_json=request.as_json,
    )
    return job, ranks


def _on_ranks(job: Any, ranks: int) -> int:
    with tempfile.TemporaryDirectory(prefix="megatron-moe-generate-") as folder:
        at = Path(folder)
        (at / JOB).write_text(job.to_json())
        argv = [sys.executable, "-m", "megatron_moe.launch.rank", "generate", str(at / JOB)]
        outcome = run_ranks(argv, ranks, local_ranks.threads_each(ranks), at / "logs", quiet=False)
        return tell(outcome)
