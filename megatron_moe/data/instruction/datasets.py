"""Training and validation sequences of an experiment's records, and what is said of them."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment
from megatron_moe.data.instruction.packing import one_each, packed
from megatron_moe.data.instruction.prepare import PreparedInstruction
from megatron_moe.data.instruction.samples import InstructionSamples
from megatron_moe.data.instruction.selection import select
from megatron_moe.data.instruction.token_records import TokenRecords
from megatron_moe.data.tokenizers import Tokenizer


def build_samples(
    experiment: Experiment, prepared: PreparedInstruction, tokenizer: Tokenizer
) -> dict[str, InstructionSamples]:
    """The training part and, if the experiment evaluates, the validation part."""
    parts = {"training": prepared.train}
    if experiment.training.eval_interval is not None:
        parts["validation"] = prepared.validation
    return {part: _samples(experiment, part, records, tokenizer) for part, records in parts.items()}


def _samples(
    experiment: Experiment, part: str, records: TokenRecords, tokenizer: Tokenizer
) -> InstructionSamples:
    section, training = experiment.data.instruction, experiment.training
    assert section is not None
    selection = select(experiment, part, records)
    sequences = one_each(len(selection.places))
    if section.packing:
        sequences = packed(selection.places, training.seq_length, training.seed)
    return InstructionSamples(selection, sequences, training.seq_length, tokenizer.eod, section.packing)


def description(part: str, samples: InstructionSamples) -> str:
    """One line about the records of a part: how many, what was left out, how full the sequences are."""
    selection, manifest = samples.selection, samples.selection.records.manifest
    records, sequences = _count(len(selection.places), "record"), _count(len(samples), "sequence")
    text = f"{part.capitalize()}: {records} in {sequences}, {samples.padding():.1%} padding"
    left_out = {
        "too long and left out": selection.dropped,
        "too long and cut off": selection.truncated,
        "of the files unreadable and skipped": manifest.skipped_records,
    }
    for what, count in left_out.items():
        if count:
            text += f"; {count:,} {what}"
    return text


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
