"""The section `data.instruction`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.schema.section import InputPath, Section

RecordFiles = Annotated[list[InputPath], Field(min_length=1)]
RecordKey = Annotated[str, Field(min_length=1)]


class Instruction(Section):
    """Conversations, or prompts with their answers, to finetune on under `data.kind: instruction`."""

    train: RecordFiles
    """Records: jsonl (also .jsonl.gz, .jsonl.zst) or parquet files; folders, of which all such files are
    taken, and globs."""
    validation: RecordFiles | None = None
    """Records to evaluate on, of the same form. Default: the validation part of data.split of the training
    records, in their order."""
    messages_key: RecordKey | None = None
    """The key that holds a conversation, a list of messages with role and content, or with from and value.
    Default: messages or conversations, where a record has one of them."""
    prompt_key: RecordKey | None = None
    """The key that holds a prompt, where records are no conversations. Default: what a record has of
    question and answer, instruction (input) and output, prompt and response, prompt and completion."""
    input_key: RecordKey | None = None
    """Beside prompt_key: the key of a text that is put behind the prompt, an empty line between them, where
    it is not empty."""
    answer_key: RecordKey | None = None
    """Beside prompt_key: the key that holds the answer."""
    chat_template: InputPath | None = None
    """A jinja template that makes text of a conversation. Default: the one beside the tokenizer.json; without
    one a plain form (see docs/finetuning.md)."""
    answers: Literal["all", "last"] = "all"
    """Which answers of a conversation are learned."""
    packing: bool = True
    """Put as many records into a sequence as have room, without seeing each other and with positions of
    their own. False: one record a sequence, filled up with padding."""
    weighting: Literal["token", "sample"] = "token"
    """What weighs the same in a step: every target `token`, or every `sample`, whose own mean counts."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a record of more than seq_length + 1 tokens: leave it out, cut its end off, or stop and
    name it. What is left out and cut off is counted."""
    bad_records: Literal["error", "skip"] = "error"
    """What happens to a record that cannot be read, or has no answer: stop and name it, or leave it out;
    skipped ones are counted and the first ones named."""
