"""Which records stand in a sequence, and what a sequence holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instruction_cases import RECORDS, instruction_experiment

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.data.instruction.datasets import build_samples, description
from megatron_moe.data.instruction.packing import packed
from megatron_moe.data.instruction.samples import InstructionSamples
from megatron_moe.data.prepare import prepare

PROMPT, ANSWER = "### User:\n{}\n\n### Assistant:\n", "{}"
EOD = 256


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(0, 3))
def test_packing_puts_each_record_into_one_sequence_and_few_are_needed(sizes: list[int], seed: int) -> None:
    places = np.array(sizes)
    sequences = packed(places, 40, seed)
    assert sorted(sequences.members.tolist()) == list(range(len(sizes)))
    filled = [int(places[sequences.of(index)].sum()) for index in range(len(sequences))]
    assert max(filled) <= 40 and min(filled) > 0
    # Best-fit decreasing needs at most 11/9 of the fewest, and 1 more, whatever the sizes.
    assert len(sequences) <= 11 / 9 * len(sizes) and len(sequences) <= 2 * -(-sum(sizes) // 40)
    again = packed(places, 40, seed)
    assert np.array_equal(again.members, sequences.members) and np.array_equal(again.begins, sequences.begins)


def test_sequences_with_many_short_records_are_not_all_at_the_end() -> None:
    places = np.array([100] * 50 + [10] * 500)
    sequences = packed(places, 100, 0)
    counts = np.diff(sequences.begins)
    assert len(sequences) == 100 and 15 < (counts[:50] == 1).sum() < 35


def samples(made: Experiment) -> dict[str, InstructionSamples]:
    found = prepare(made, Path(made.logging.root))
    assert found.instruction is not None and found.tokenizer is not None
    return build_samples(made, found.instruction, found.tokenizer)


def expected(records: list[tuple[str, str]], length: int) -> dict[str, list[Any]]:
    """A sequence by hand: bytes, one record after the other, then what fills it up."""
    row: dict[str, list[Any]] = {
        name: [] for name in ("tokens", "labels", "places", "mask", "weights", "starts")
    }
    for prompt, answer in records:
        before, said = PROMPT.format(prompt).encode(), [*answer.encode(), EOD]
        ids = [*before, *said]
        row["tokens"] += ids[:-1]
        row["labels"] += ids[1:]
        row["places"] += range(len(ids) - 1)
        row["mask"] += [0] * (len(before) - 1) + [1] * len(said)
        row["weights"] += [0] * (len(before) - 1) + [1 / len(said)] * len(said)
        row["starts"] += [1] + [0] * (len(ids) - 2)
    row["starts"] += [1] * (len(row["tokens"]) < length)
    return row


def test_a_packed_sequence_by_hand(tmp_path: Path) -> None:
    made = instruction_experiment(tmp_path, training={"seq_length": 128})
    train = samples(made)["training"]
    seen: list[tuple[str, str]] = []
    for index in range(len(train)):
        records = [RECORDS[number] for number in train.selection.numbers[train.sequences.of(index)].tolist()]
        seen += records
        sample, row = train[index], expected(records, 128)
        end = len(row["tokens"])
        assert sample["tokens"].tolist() == row["tokens"] + [EOD] * (128 - end)
        assert sample["labels"].tolist()[:end] == row["labels"]
        assert sample["position_ids"].tolist()[:end] == row["places"]
        assert sample["loss_mask"].tolist() == row["mask"] + [0.0] * (128 - end)
        assert sample["padding_mask"].tolist() == [not mask for mask in sample["loss_mask"].tolist()]
        assert sample["filled"].tolist() == [True] * end + [False] * (128 - end)
        assert np.allclose(sample["sample_weights"].tolist()[:end], row["weights"], rtol=1e-6)
        starts = row["starts"] + [0] * (128 - len(row["starts"]))
        assert sample["document_starts"].int().tolist() == starts
    assert sorted(seen) == sorted(RECORDS) and len(train) < len(RECORDS)
    alone = samples(instruction_experiment(tmp_path, training={"seq_length": 128}, packing=False))["training"]
    assert [alone[n]["tokens"].tolist()[:30] for n in range(3)] == [
        expected([RECORDS[n]], 128)["tokens"][:30] for n in range(3)
    ]
    assert "document_starts" not in alone[0]


def test_records_longer_than_a_sequence(tmp_path: Path) -> None:
    lengths = [len(PROMPT.format(prompt)) + len(answer.encode()) + 1 for prompt, answer in RECORDS]
    middle = sorted(lengths)[len(lengths) // 2]  # tokens; this record just fits
    seq_length, long = middle - 1, sum(length > middle for length in lengths)
    assert long > 0

    def under(policy: str) -> InstructionSamples:
        made = instruction_experiment(tmp_path, training={"seq_length": seq_length}, too_long=policy)
        return samples(made)["training"]

    dropped = under("drop")
    assert len(dropped.selection.numbers) == len(RECORDS) - long
    assert f"{long} too long and left out" in description("training", dropped)
    cut = under("truncate")
    # What has no answer within the sequence is left out all the same.
    unanswered = sum(len(PROMPT.format(prompt)) >= middle for prompt, _ in RECORDS)
    assert (cut.selection.truncated, cut.selection.dropped) == (long - unanswered, unanswered)
    assert int(cut.selection.places.max()) == seq_length
    first = next(n for n, length in enumerate(lengths) if length > middle)
    with pytest.raises(InputError, match=rf"too_long: .*:{first + 1} has {lengths[first]} tokens, more than"):
        under("error")
    with pytest.raises(
        InputError, match=f"none of the {len(RECORDS)} records .* the shortest has {min(lengths)}"
    ):
        samples(instruction_experiment(tmp_path, training={"seq_length": min(lengths) - 2}))


def test_held_out_records_are_a_part_or_files_of_their_own(tmp_path: Path) -> None:
    evaluated = {"seq_length": 128, "eval_interval": 1}
    parts = samples(instruction_experiment(tmp_path, training=evaluated, split=[75, 25]))
    numbers = {name: sorted(part.selection.numbers.tolist()) for name, part in parts.items()}
    assert numbers["training"] + numbers["validation"] == list(range(len(RECORDS)))
    assert len(numbers["validation"]) == len(RECORDS) // 4
    own = str(next(tmp_path.glob("*.jsonl")))
    parts = samples(instruction_experiment(tmp_path, training=evaluated, validation=[own]))
    assert {len(part.selection.numbers) for part in parts.values()} == {len(RECORDS)}
