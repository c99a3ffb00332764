"""Ours against the same model in transformers, on the same text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.inference.evaluation.job import Comparison
from megatron_moe.inference.generation import Generator
from megatron_moe.inference.precision import logits_of
from megatron_moe.inference.settings import Settings


def check(vocab_size: int, folder: str) -> None:
    """Raises InputError where transformers is not installed, or what lies in the folder is no such model, or
    one with another vocabulary."""
    from megatron_moe.convert.models import open_folder, read_config
    from megatron_moe.data.packed import optional

    config, _ = read_config(open_folder(folder))
    if (theirs := config.get("vocab_size")) != vocab_size:
        raise InputError(
            f"--against {folder}: its vocabulary has {theirs} tokens, that of the model {vocab_size}: these "
            "are not the same model"
        )
    optional("transformers", "evaluation", f"--against {folder}")


def compare(
    generator: Generator, comparison: Comparison, dtype: torch.dtype, advance: Callable[[int], object]
) -> dict[str, Any] | None:
    """Losses, logits and greedy tokens of both, on rank 0; None on others. Collective over all ranks.

    Theirs is computed in one process, by rank 0, which holds both models.
    """
    is_first = dist.get_rank() == 0
    model = _load(comparison.folder, dtype, generator.network.device) if is_first else None
    tokens, losses, most, largest, agreeing = 0, [0.0, 0.0], 0.0, 0.0, 0
    for window in comparison.windows:
        (ours,) = logits_of(generator.network, [window])
        if model is not None:
            theirs = _logits(model, window)[:, : ours.size(-1)]
            targets = torch.tensor(window[1:], device=ours.device)
            tokens += len(targets)
            for number, logits in enumerate((ours, theirs)):
                logs = logits[:-1].double().log_softmax(-1)
                losses[number] -= logs.gather(1, targets[:, None]).sum().item()
            most = max(most, (ours - theirs).abs().max().item())
            largest = max(largest, theirs.abs().max().item())
            agreeing += int((ours[:-1].argmax(-1) == theirs[:-1].argmax(-1)).sum())
        advance(1)
    settings = Settings(max_new_tokens=comparison.new_tokens)
    generated = [found.tokens for found in generator.generate(comparison.prompts, settings)]
    if model is None:
        return None
    expected = [_greedy(model, prompt, comparison.new_tokens) for prompt in comparison.prompts]
    same = sum(ours == theirs for ours, theirs in zip(generated, expected, strict=True))
    alike = sum(_alike(*both) for both in zip(generated, expected, strict=True))
    return {
        "windows": len(comparison.windows),
        "tokens": tokens,
        "loss": losses[0] / tokens,
        "loss_of_transformers": losses[1] / tokens,
        "perplexity": math.exp(losses[0] / tokens),
        "perplexity_of_transformers": math.exp(losses[1] / tokens),
        "largest_logit_difference": most,
        "largest_logit": largest,
        "same_most_likely_token": agreeing / tokens,
        "greedy_texts": len(expected),
        "same_greedy_texts": same / len(expected),
        "same_greedy_tokens": alike / (len(expected) * comparison.new_tokens),
    }


def _load(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--against {folder}: transformers cannot open it: {reason[:300]}") from None
    # What generation_config.json says would change what is most likely into what is drawn.
    model.generation_config = transformers.GenerationConfig()
    return model.to(device).eval()


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids], device=model.device)).logits[0].float()
    return logits


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in found[0, len(prompt) :]]


def _alike(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(ours, theirs, strict=False)
    return next((at for at, (mine, other) in enumerate(pairs) if mine != other), min(len(ours), len(theirs)))
