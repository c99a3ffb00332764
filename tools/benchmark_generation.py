"""Tokens a second of `megatron-moe generate` and of transformers' `generate`: the same model, prompts and
threads, greedy, in one run, taking turns.

    python tools/benchmark_generation.py SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a king who",
    "A mixture of experts is",
    "Water boils at",
    "In 1969, the first men",
    "The quick brown fox",
    "To be or not to be, that is",
    "def fibonacci(n):",
]


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="(default: 1 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of each, the median counts (default: 3)")
    args = parser.parse_args()
    # First, as what stands in for CUDA here is not there yet: transformers would make its tables of it.
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    from megatron_moe.convert.models import open_model
    from megatron_moe.inference.building import build
    from megatron_moe.inference.command import join
    from megatron_moe.inference.layout import inference_experiment
    from megatron_moe.inference.settings import Settings

    device, model = join(), open_model(args.model)
    generator = build(inference_experiment(model.experiment), model.weights, device, torch.float32)

    def of_ours(batch: int) -> list[list[int]]:
        ids = [tokenizer(text)["input_ids"] for text in PROMPTS[:batch]]
        found = generator.generate(ids, Settings(max_new_tokens=args.new_tokens, batch=batch))
        return [result.tokens for result in found]

    def of_theirs(batch: int) -> list[list[int]]:
        given = tokenizer(PROMPTS[:batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = theirs.generate(
                **given, max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return [row[given["input_ids"].size(1) :].tolist() for row in ids]

    print(f"{args.model.name}, fp32, {torch.get_num_threads()} threads, {args.new_tokens} new tokens, greedy")
    for batch in args.batches:
        rates: dict[str, list[float]] = {"ours": [], "transformers": []}
        tokens = {}
        for _ in range(args.rounds):
            for name, generate in (("ours", of_ours), ("transformers", of_theirs)):
                began = time.perf_counter()
                tokens[name] = generate(batch)
                rates[name].append(batch * args.new_tokens / (time.perf_counter() - began))
        shown = ", ".join(f"{name} {statistics.median(of):.1f} tokens/s" for name, of in rates.items())
        same = "the same tokens" if tokens["ours"] == tokens["transformers"] else "OTHER TOKENS"
        print(f"batch {batch}: {shown}; {same}")


if __name__ == "__main__":
    main()
