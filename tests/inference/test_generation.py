"""Generation gives what transformers gives, token by token, whatever the layout and the batch."""

from __future__ import annotations

import generation_on_ranks
import pytest
import torch
from distributed import ranks
from tiny_families import CASES, Tiny, tiny

from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.settings import Settings

NEW = 12
PROMPTS = [[5, 9, 17, 33, 2, 64, 101], [7], list(range(40, 62)), [150, 3, 99, 20]]
GREEDY = Settings(max_new_tokens=NEW)
SAMPLED = Settings(max_new_tokens=NEW, sampling=Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=3))
IN_PARTS = Settings(max_new_tokens=NEW, batch=2, prefill_tokens=5)

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
EP1 = "parallel.expert_model_parallel_size=1"
ETP2 = "parallel.expert_tensor_parallel_size=2"
DP2 = "parallel.data_parallel_size=2"


def of_transformers(model: Tiny) -> list[list[int]]:
    """What its own `generate` makes of each prompt, which no token ends."""
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            ids = model.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        found.append(ids[0, len(prompt) :].tolist())
    return found


@pytest.mark.second_pair
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """Prompts of different lengths at once; all in one step, and as they come, piece by piece."""
    model = tiny(name)
    ((at_once, in_parts),) = ranks(1).run(
        generation_on_ranks.generated, model.experiment(), model.ours(), [], PROMPTS, [GREEDY, IN_PARTS]
    )
    assert at_once == of_transformers(model)
    assert in_parts == at_once


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v2", "gpt_oss"])
def test_a_batch_is_what_each_prompt_alone_gets(name: str) -> None:
    model = tiny(name)
    given = model.experiment(), model.ours()
    ((together,),) = ranks(1).run(generation_on_ranks.generated, *given, [], PROMPTS, [SAMPLED])
    (alone,) = ranks(1).run(generation_on_ranks.each_alone, *given, PROMPTS[:1], SAMPLED)
    assert together[:1] == alone
    # Draws are by the number of a prompt: others are held against a batch in another order of steps.
    parts = Settings(max_new_tokens=NEW, sampling=SAMPLED.sampling, batch=1)
    ((one_by_one,),) = ranks(1).run(generation_on_ranks.generated, *given, [], PROMPTS, [parts])
    assert together == one_by_one
    assert len({tuple(tokens) for tokens in together}) == len(PROMPTS)


LAYOUTS = {
    "TP": ("llama", [TP2]),
    "TP, biases": ("llama, tied, biases, wide heads", [TP2]),
    "TP, one key head": ("llama, one key head, linear", [TP2]),
    "PP": ("qwen3", [PP2]),
    "PP, tied": ("llama, tied, biases, wide heads", [PP2]),
    "EDP": ("qwen3_moe", [TP2]),
    "EP over replicas": ("qwen3_moe", [DP2, EP2]),
    "ETP": ("qwen2_moe", [TP2, ETP2, EP1]),
    "replicas": ("llama", [DP2]),
    "MLA, EDP": ("deepseek_v2", [TP2]),
    "MLA, PP": ("deepseek_v3", [PP2]),
    "sinks, TP": ("gpt_oss", [TP2, EP1, ETP2]),
    "norm of all heads": ("olmoe", [TP2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_changes_no_token(name: str) -> None:
    case, layout = LAYOUTS[name]
    model = tiny(case)
    settings = [GREEDY, SAMPLED, IN_PARTS]
    given = model.experiment(), model.ours()
    (one,) = ranks(1).run(generation_on_ranks.generated, *given, [], PROMPTS, settings)
    several = ranks(2).run(generation_on_ranks.generated, *given, layout, PROMPTS, settings)
    assert several == [one, one]


@pytest.mark.parametrize("layout", [[TP2, DP2, "parallel.expert_model_parallel_size=4"], [TP2, PP2]])
def test_four_ranks_change_no_token(layout: list[str]) -> None:
    model = tiny("deepseek_v3")
    given = model.experiment(), model.ours()
    (one,) = ranks(1).run(generation_on_ranks.generated, *given, [], PROMPTS, [GREEDY, SAMPLED])
    assert (
        ranks(4).run(generation_on_ranks.generated, *given, layout, PROMPTS, [GREEDY, SAMPLED]) == [one] * 4
    )


@pytest.mark.parametrize("layout", [[], [TP2], [PP2], [DP2]])
def test_likelihoods_are_those_of_the_logits_of_transformers(layout: list[str]) -> None:
    model, starts = tiny("qwen3_moe"), [3, 1, 20, 2]
    prompts = [PROMPTS[0], [7, 9], PROMPTS[2], PROMPTS[3]]
    count = 2 if layout else 1
    given = model.experiment(), model.ours(), layout, prompts, starts
    for found in ranks(count).run(generation_on_ranks.likelihoods, *given):
        for prompt, start, likelihood in zip(prompts, starts, found, strict=True):
            with torch.no_grad():
                logits = model.model(torch.tensor([prompt])).logits[0, start - 1 : -1].double()
            exact = logits.log_softmax(-1).gather(1, torch.tensor(prompt[start:])[:, None]).squeeze(1)
            torch.testing.assert_close(likelihood.log_probs.double(), exact, rtol=0, atol=1e-4)
            assert likelihood.is_greedy == (logits.argmax(-1).tolist() == prompt[start:])
