"""The command `eval`: reads tasks, texts and model, has the ranks answer, and scores what they said."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.launch import exit_codes, identity, local_ranks
from megatron_moe.launch.command import tell
from megatron_moe.launch.stop_request import Stopped, signals_raise
from megatron_moe.launch.supervisor import run_ranks

_WINDOWS, _PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 8, 4, 32, 32
"""Of a comparison, unless --limit says otherwise of its windows."""


@dataclass(frozen=True)
class Request:
    """The command line.

    Attributes:
        texts: files, folders and globs.
        length, stride: of their windows; None: the model's sequence length, half of it.
        against: folder of a model of transformers.
        with_records: of each sample in the JSON.
    """

    model: Path
    overrides: Sequence[str]
    tasks: Sequence[Path]
    texts: Sequence[str]
    json_key: str
    length: int | None
    stride: int | None
    chat: bool
    limit: int | None
    samples: int | None
    k: list[int] | None
    temperature: float | None
    top_p: float | None
    seed: int
    against: Path | None
    batch: int
    dtype: str
    output: Path | None
    with_records: bool
    as_json: bool


def evaluate(request: Request) -> int:
    """Evaluate a model. Returns the exit code. Raises InputError."""
    if identity.from_environment(os.environ) is not None:
        raise InputError(
            "eval starts its ranks itself: run it without torchrun or srun, RANK and WORLD_SIZE unset"
        )
    _check(request)
    try:
        with signals_raise(), tempfile.TemporaryDirectory(prefix="megatron-moe-eval-") as folder:
            began = time.monotonic()
            asked, job, ranks = _job(request, Path(folder) / "found.json")
            code = _answer(job, ranks, Path(folder))
            if code != exit_codes.DONE:
                return exit_codes.FAILED if code == exit_codes.START_AGAIN else code
            found = json.loads(Path(job.found).read_text())
            _report(request, asked, found, ranks, time.monotonic() - began)
    except Stopped:
        return exit_codes.FAILED
    return exit_codes.DONE


def _check(request: Request) -> None:
    if not request.tasks and not request.texts:
        raise InputError("there is nothing to evaluate: give --task FILE.yaml or --text FILE")
    if request.against is not None and not request.texts:
        raise InputError("--against compares on text: give it with --text FILE")
    if request.with_records and request.output is None and not request.as_json:
        raise InputError("--records are written as JSON: give --output FILE.json or --json, too")
    if request.output is not None and not request.output.absolute().parent.is_dir():
        raise InputError(f"--output {request.output}: there is no folder {request.output.parent}")


def _job(request: Request, found: Path) -> tuple[Any, Any, int]:
    """What is asked, what the ranks are to do, and how many of them."""
    from megatron_moe.convert.models import open_model
    from megatron_moe.data.instruction.chat import open_chat
    from megatron_moe.inference import prompts
    from megatron_moe.inference.evaluation import parity
    from megatron_moe.inference.evaluation.job import EvalJob
    from megatron_moe.inference.evaluation.questions import Encoder, first_of
    from megatron_moe.inference.evaluation.reading import Choices, all_asked, read_tasks
    from megatron_moe.inference.layout import inference_experiment
    from megatron_moe.plan.layout import Layout

    given = Choices(
        request.limit, request.samples, request.k, request.temperature, request.top_p, request.seed
    )
    tasks = read_tasks(request.tasks, given)
    model = open_model(request.model)
    experiment = model.experiment
    ranks = Layout.of(inference_experiment(experiment, request.overrides)).world_size
    tokenizer = prompts.tokenizer_of(model)
    length, stride = _windows(request, experiment)
    if request.against is not None:
        parity.check(experiment.model.vocab_size or 0, str(request.against))
    file = model.tokenizer.model if model.tokenizer is not None else None
    chat = open_chat(tokenizer, file) if request.chat else None
    asked = all_asked(
        tasks,
        request.texts,
        lambda: Encoder(tokenizer, chat, _positions(experiment), first_of(model)),
        given,
        request.json_key,
        length,
        stride,
    )
    job = EvalJob(
        model=str(request.model),
        overrides=list(request.overrides),
        dtype=request.dtype,  # type: ignore[arg-type]
        batch=request.batch,
        is_chat=request.chat,
        questions=[one.questions for one in asked],
        comparison=None if request.against is None else _comparison(request, asked),
        found=str(found),
    )
    return asked, job, ranks


def _windows(request: Request, experiment: Any) -> tuple[int, int]:
    """Tokens of a window, and of the step from one to the next."""
    positions = _positions(experiment)
    length = request.length or min(experiment.training.seq_length, positions)
    if not 2 <= length <= positions:
        raise InputError(
            f"--length {length}: must be from 2 to model.max_position_embeddings, which is {positions}"
        )
    stride = request.stride or length // 2
    if stride >= length:
        raise InputError(
            f"--stride {stride}: must be less than the windows' {length} tokens, of which one at least is "
            f"given, for example {length // 2}"
        )
    return length, stride


def _positions(experiment: Any) -> int:
    """The most tokens of a sequence."""
    positions: int = experiment.model.max_position_embeddings
    return positions


def _comparison(request: Request, asked: Sequence[Any]) -> Any:
    """The first windows of the texts."""
    from megatron_moe.inference.evaluation.job import Comparison

    endings = [ending.ids for one in asked[: len(request.texts)] for ending in one.questions.endings]
    windows = endings[: request.limit or _WINDOWS]
    starts = [ids[:_PROMPT_TOKENS] for ids in windows[:_PROMPTS]]
    return Comparison(str(request.against), windows, starts, _NEW_TOKENS)


def _answer(job: Any, ranks: int, folder: Path) -> int:
    if ranks == 1:
        from megatron_moe.inference.evaluation.command import run

        return run(job)
    (folder / "job.json").write_text(job.to_json())
    argv = [sys.executable, "-m", "megatron_moe.launch.rank", "evaluate", str(folder / "job.json")]
    outcome = run_ranks(argv, ranks, local_ranks.threads_each(ranks), folder / "logs", quiet=False)
    return tell(outcome)


def _report(request: Request, asked: Sequence[Any], found: Any, ranks: int, took_s: float) -> None:
    from megatron_moe.inference.evaluation import report
    from megatron_moe.inference.evaluation.questions import Answers

    answers = [Answers.from_json(record) for record in found["answers"]]
    results = [one.score(its) for one, its in zip(asked, answers, strict=True)]
    whole: dict[str, Any] = {
        "model": str(request.model),
        "layout": list(request.overrides),
        "dtype": found["dtype"],
        "chat": request.chat,
        "limit": request.limit,
        "seed": request.seed,
        "results": [result.to_json(request.with_records) for result in results],
    }
    if found["comparison"] is not None:
        whole["against"] = {"folder": str(request.against), **found["comparison"]}
    if request.output is not None:
        report.write(request.output, whole)
    if request.as_json:
        print(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    report.print_results(results)
    if found["comparison"] is not None:
        report.print_comparison(found["comparison"], str(request.against))
    print(f"{request.model}: {found['dtype']}, {ranks} rank{'s' if ranks > 1 else ''}, {took_s:.1f} s")
