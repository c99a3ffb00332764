"""Scores against those of transformers' logits, and against formulas written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import evaluation_on_ranks
import numpy as np
import pytest
import torch
from distributed import ranks
from letter_models import LETTERS, ids_of, write_model
from tiny_families import tiny

from megatron_moe.convert.models import open_model
from megatron_moe.data.instruction.chat import open_chat
from megatron_moe.inference.evaluation.questions import Encoder, Prompt, Questions
from megatron_moe.inference.evaluation.reading import Choices, asked_of, read_tasks
from megatron_moe.inference.evaluation.result import Result
from megatron_moe.inference.evaluation.statistics import mean, pass_at_k, ratio
from megatron_moe.inference.evaluation.texts import AskedText, windows
from megatron_moe.inference.prompts import tokenizer_of

LENGTH = 64
TP2 = ["parallel.tensor_model_parallel_size=2"]
TEXTS = ["First Citizen: Before we proceed any further, hear me speak. " * 2, "Speak, speak.", "You are all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def encoder_of(folder: Path, chat: bool = False) -> Encoder:
    model = open_model(folder)
    assert model.tokenizer is not None
    tokenizer = tokenizer_of(model)
    return Encoder(tokenizer, open_chat(tokenizer, model.tokenizer.model) if chat else None, LENGTH)


def log_probs(ids: list[int]) -> np.ndarray[Any, Any]:
    """[t - 1] of each token but the first, in float64 over transformers' logits."""
    with torch.no_grad():
        logits = tiny("qwen3_moe").model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).numpy()


def greedy_text(prompt: str, new_tokens: int) -> str:
    """What transformers writes behind a prompt, without tokens that stand for no text."""
    ids = torch.tensor([ids_of(prompt)])
    with torch.no_grad():
        found = tiny("qwen3_moe").model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )
    names = {3: "<unknown>", **{4 + number: letter for number, letter in enumerate(LETTERS)}}
    return "".join(names.get(token, "") for token in found[0, ids.size(1) :].tolist())


def scored(asked: Any, folder: Path, layout: list[str] | None = None) -> Result:
    layout = layout or []
    found = ranks(2 if layout else 1).run(evaluation_on_ranks.answers, folder, layout, [asked.questions])
    result: Result = asked.score(found[0][0])
    return result


def task_in(path: Path, records: list[dict[str, Any]], **keys: Any) -> Path:
    (path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in {"file": "records.jsonl", **keys}.items()]
    (path / "task.yaml").write_text("".join(lines))
    return path / "task.yaml"


def asked_in(path: Path, encoder: Encoder, records: list[dict[str, Any]], **keys: Any) -> Any:
    (task,) = read_tasks([task_in(path, records, **keys)], Choices())
    return asked_of(task, encoder, Choices())


@pytest.mark.parametrize("length", [2, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 23, 64])
def test_each_token_but_the_first_is_scored_once_after_as_many_as_fit(length: int, count: int) -> None:
    ids = list(range(count))
    for stride in range(1, length):
        cut = list(windows(ids, length, stride))
        assert [token for window in cut for token in window.ids[window.start :]] == ids[1:]
        for number, window in enumerate(cut):
            assert len(window.ids) == min(length, count)
            assert number == 0 or len(window.ids) - window.start <= stride


@pytest.mark.second_pair
@pytest.mark.parametrize("layout", [[], TP2, ["parallel.pipeline_model_parallel_size=2"]])
def test_loss_on_text_is_that_of_transformers_on_the_same_windows(
    folder: Path, tmp_path: Path, layout: list[str]
) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    asked = AskedText("text", [str(file)], "body", encoder_of(folder), 20, 6, None)
    losses, tokens = [], []
    for text in TEXTS:
        ids, total, scored_to = ids_of(text), 0.0, 1
        while scored_to < len(ids):
            end = min(len(ids), 20 if scored_to == 1 else scored_to + 6)
            total -= log_probs(ids[max(0, end - 20) : end])[scored_to - end :].sum()
            scored_to = end
        losses.append(total)
        tokens.append(len(ids) - 1)
    metrics = scored(asked, folder, layout).metrics
    loss = sum(losses) / sum(tokens)
    assert metrics["loss"].value == pytest.approx(loss, abs=1e-5)
    assert metrics["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
    # Every letter is a byte and a token: the first of each document is not scored.
    assert metrics["bits_per_byte"].value == pytest.approx(loss / math.log(2), abs=1e-5)


def test_a_tokenizers_beginning_makes_the_first_token_of_a_text_a_scored_one(tmp_path: Path) -> None:
    encoder = encoder_of(write_model(tmp_path / "model", "llama", with_beginning=True))
    assert encoder.text("To be") == [2, *ids_of("To be")]
    assert encoder.text("<begin>To be") == [2, *ids_of("To be")]
    assert encoder.pair("", "be") == ([2, *ids_of("be")], 1)
    (tmp_path / "a.txt").write_text("To be or not")
    asked = AskedText("a", [str(tmp_path / "a.txt")], "text", encoder, 20, 6, None)
    assert asked.questions.endings == [([2, *ids_of("To be or not")], 1)]


def test_pairs_are_cut_as_in_lm_evaluation_harness(folder: Path) -> None:
    encoder = encoder_of(folder)
    assert encoder.pair("To be ", "or") == (ids_of("To be or"), 5)
    assert encoder.pair("", "or") == ([0, *ids_of("or")], 1)
    whole = encoder.pair("x" * 70, "yz")
    assert whole == (ids_of("x" * 62 + "yz"), 62)
    assert encoder.cut == 1


def test_choices_are_scored_by_their_likelihood_and_by_their_length(folder: Path, tmp_path: Path) -> None:
    records = [
        {"q": "What light", "c": ["a", "through yonder", "window breaks?"], "a": 1},
        {"q": "It is the east", "c": ["and", "Juliet is the sun", "x"], "a": "C"},
        {"q": "O Romeo", "c": ["wherefore", "art"], "a": "art"},
    ]
    keys = {"kind": "multiple_choice", "prompt": "{{ q }}:", "choices": "c", "answer": "a"}
    result = scored(asked_in(tmp_path, encoder_of(folder), records, **keys), folder, TP2)
    right, hits = [1, 2, 1], {"acc": [], "acc_norm": []}  # type: ignore[var-annotated]
    for record, number, found in zip(records, right, result.records, strict=True):
        prompt = ids_of(f"{record['q']}:")
        texts = [str(choice) for choice in record["c"]]
        logs = [log_probs([*prompt, *ids_of(f" {text}")])[len(prompt) - 1 :].sum() for text in texts]
        np.testing.assert_allclose(found["log_likelihoods"], logs, atol=1e-4)
        hits["acc"].append(int(np.argmax(logs)) == number)
        hits["acc_norm"].append(int(np.argmax(np.array(logs) / [len(text) for text in texts])) == number)
    for name, values in hits.items():
        assert result.metrics[name].value == pytest.approx(np.mean(values))
        assert result.metrics[name].error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))


def test_examples_are_shown_before_questions_and_not_asked(folder: Path, tmp_path: Path) -> None:
    records = [{"q": "1+1", "a": "2"}, {"q": "2+2", "a": "4"}, {"q": "3+3", "a": "6"}]
    keys = {"kind": "loss_of_answer", "prompt": "{{q}}=", "answer": "a", "few_shot": 2, "separator": ""}
    asked = asked_in(tmp_path, encoder_of(folder), records, **keys, example_separator=";", description="Add")
    assert asked.questions.endings == [(ids_of("Add;1+1=2;2+2=4;3+3=6"), 20)]
    loss = -log_probs(ids_of("Add;1+1=2;2+2=4;3+3=6"))[-1]
    assert scored(asked, folder).metrics["loss"].value == pytest.approx(loss, abs=1e-4)


def test_a_chat_is_asked_in_its_template(folder: Path) -> None:
    encoder = encoder_of(folder, chat=True)
    prompt = Prompt("Be brief.", [("1+1", "2")], "2+2", " ", "\n\n")
    whole = [1, *ids_of("Be brief."), 1, *ids_of("1+1"), 1, *ids_of("2"), 1, *ids_of("2+2"), 1]
    assert encoder.prompt(prompt, room=1) == whole
    assert encoder.ending(prompt, "4") == ([*whole, *ids_of("4")], len(whole))


def test_generated_answers_are_found_and_compared(folder: Path, tmp_path: Path) -> None:
    """Two records are given the answer that transformers would generate, spelled in another way. The first
    one ends at a stop while the others go on."""
    prompts, encoder = ["To be, or", "It is the east, and", "O Romeo"], encoder_of(folder)
    stop = greedy_text(prompts[0], 6)[3]
    answers = [greedy_text(prompt, 6).partition(stop)[0] for prompt in prompts]
    assert len(answers[0]) == 3 < len(answers[1])
    records = [
        {"q": prompt, "a": f"?{answer.upper()}?"} for prompt, answer in zip(prompts, answers, strict=True)
    ]
    records[2]["a"] = "wrong"
    keys = {"prompt": "q", "answer": "a", "ignore_case": True, "ignore": [r"\?"], "stop": [stop]}
    asked = asked_in(tmp_path, encoder, records, kind="exact_match", max_new_tokens=6, **keys)
    result = scored(asked, folder)
    assert [record["text"] for record in result.records] == answers
    assert [record["exact_match"] for record in result.records] == [True, True, False]


def test_standard_errors_and_pass_at_k_are_the_published_formulas() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean(values).error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert mean([1.0]).error is None
    alike = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert alike.value == pytest.approx(2.0)
    assert alike.error == pytest.approx(0.0)
    assert ratio([1.0, 3.0], [1.0, 1.0]).error == pytest.approx(mean([1.0, 3.0]).error)
    for samples, passed, k in ((10, 3, 1), (10, 3, 5), (20, 0, 10), (5, 5, 2), (6, 4, 5)):
        left = samples - passed
        product = np.prod(1.0 - k / np.arange(left + 1, samples + 1)) if left >= k else 0.0
        assert pass_at_k(samples, passed, k) == pytest.approx(1.0 - product)


@pytest.mark.second_pair
@pytest.mark.parametrize("layout", [[], TP2])
def test_the_bridge_answers_as_lm_evaluation_harness_asks(folder: Path, layout: list[str]) -> None:
    pairs = [("To be, or", " not"), ("", "that is"), ("It is ", "the east")]
    texts = ["Speak, speak.", TEXTS[0]]
    settings = {"until": ["zzz"], "max_gen_toks": 4, "do_sample": False}
    asked = pairs, texts, [("To be", settings), ("O", settings)]
    found, *others = ranks(2 if layout else 1).run(evaluation_on_ranks.of_bridge, folder, layout, *asked)
    assert all(other == found for other in others)
    likelihoods, rolling, generated, chat = found
    exact = [
        log_probs(ids_of("To be, or not"))[-4:].sum(),
        log_probs([1, *ids_of("that is")]).sum(),
        log_probs(ids_of("It is the east"))[-9:].sum(),
    ]
    assert [log for log, _ in likelihoods] == pytest.approx(exact, abs=1e-4)
    ids = [1, *ids_of(TEXTS[0])]
    shared = 2 * LENGTH - len(ids)
    parts = [log_probs(ids[:LENGTH]).sum(), log_probs(ids[-LENGTH:])[shared - 1 :].sum()]
    assert rolling == pytest.approx([log_probs([1, *ids_of(texts[0])]).sum(), sum(parts)], abs=1e-3)
    assert generated == [greedy_text("To be", 4), greedy_text("O", 4)]
    assert chat == "<user>Hi<user>"


def test_logits_of_a_layout_are_those_of_transformers(folder: Path) -> None:
    ids = ids_of(TEXTS[0][:40])
    with torch.no_grad():
        exact = tiny("qwen3_moe").model(torch.tensor([ids])).logits[0]
    for found in ranks(2).run(evaluation_on_ranks.logits, folder, TP2, ids):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_questions_survive_the_way_to_the_ranks(folder: Path, tmp_path: Path) -> None:
    keys = {"kind": "exact_match", "prompt": "q", "answer": "a", "stop": ["."]}
    asked = asked_in(tmp_path, encoder_of(folder), [{"q": "To be", "a": "or"}], **keys).questions
    assert Questions.from_json(json.loads(json.dumps(asked.to_json()))) == asked
