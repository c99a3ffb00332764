"""The section `data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.schema.instruction import Instruction
from megatron_moe.config.schema.section import (
    InputPath,
    PositiveInt,
    Section,
)

_LARGEST_WEIGHT = 1e12
"""Beyond all purposes; sums of them stay finite."""
Weight = Annotated[float, Field(ge=0, le=_LARGEST_WEIGHT, allow_inf_nan=False)]


class Tokenizer(Section):
    """How text becomes token ids."""

    kind: Literal["sentencepiece", "huggingface", "tiktoken", "bytes"] = "sentencepiece"
    """`sentencepiece` BPE, a Hugging Face `tokenizer.json`, `tiktoken` ranks, or raw UTF-8 `bytes` (ids
    0-255, 256 ends a document)."""
    model: InputPath | None = None
    """The tokenizer's file: a sentencepiece model, a tokenizer.json or the folder it lies in, or ranks of
    tiktoken's form. Default: a sentencepiece model that is trained on the text that is prepared."""
    vocab_size: PositiveInt | None = None
    """Ids of a sentencepiece model that is trained here."""
    eod: Annotated[str, Field(min_length=1)] | None = None
    """The token that ends a document, as text. Default: the one that the tokenizer's files name as end of
    text; tiktoken's ranks name none, and `<|endoftext|>` gets the first id behind them."""
    pattern: Annotated[str, Field(min_length=1)] | None = None
    """Regular expression that cuts text before tiktoken's ranks merge bytes: gpt2, cl100k_base, o200k_base,
    or an expression. Default: cl100k_base."""


class Prepare(Section):
    """Raw text from which `train` and `verify` make the token files themselves, once, before any rank
    starts."""

    input: Annotated[list[InputPath], Field(min_length=1)]
    """Text (.txt), jsonl or parquet files, the first two also as .gz or .zst; folders, of which all such
    files are taken, and globs such as `web/*.jsonl.zst`."""
    json_key: str = "text"
    """The key of a jsonl record, or the column of a parquet file, that holds the text."""
    documents: Literal["file", "line", "paragraph"] = "file"
    """What one document is in a text file: the file, a line, or what stands between blank lines. A jsonl or
    parquet record is one document."""
    append_eod: bool = True
    """Put the end-of-document id behind each document."""
    bad_records: Literal["error", "skip"] = "error"
    """What happens at a record that cannot be read or has no text: stop and name it, or leave it out; skipped
    ones are counted and the first ones named."""


class Source(Section):
    """One source of a blend."""

    path: InputPath | None = None
    """Token files in Megatron's format, without .bin/.idx."""
    prepare: Prepare | None = None
    """Raw text to make the token files from, instead of path."""
    weight: Weight | Annotated[list[Weight], Field(min_length=2, max_length=3)] | None = None
    """Share of the samples that come from here, in proportion to the other sources: one number for every part
    that split gives documents to, or a list with one for each of the training, validation (and test) parts.
    Default: in proportion to the source's samples times epochs."""
    epochs: Annotated[float, Field(gt=0, le=_LARGEST_WEIGHT, allow_inf_nan=False)] | None = None
    """Instead of weight: how often this source is seen while one of epochs 1 is seen once. Default: 1, where
    no source has a weight."""
    split: Annotated[list[Weight], Field(min_length=2, max_length=3)] | None = None
    """Weights of the parts of this source: `[0, 100]` makes it a source of validation only. Default:
    data.split."""


SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Without dots, because it stands in dotted keys and in the names of metrics."""


class Data(Section):
    """What the model reads."""

    kind: Literal["pretraining", "instruction", "mock"] = "pretraining"
    """`pretraining` reads token files; `instruction` reads conversations and learns their answers; `mock`
    makes random tokens for benchmarks."""
    path: InputPath | None = None
    """Token files in Megatron's format, without .bin/.idx. Default: made from data.prepare."""
    prepare: Prepare | None = None
    """Raw text to make the token files from."""
    blend: Annotated[dict[SourceName, Source], Field(min_length=1)] | None = None
    """Several sources by name, instead of path and prepare. Give each of them a weight, or none of them, and
    then perhaps epochs."""
    instruction: Instruction | None = None
    """Conversations to finetune on, for kind instruction."""
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    """The tokenizer; its hash must be that of the token files."""
    split: Annotated[list[Weight], Field(min_length=2, max_length=3)] = Field(default=[95.0, 5.0])
    """Weights of the training, validation (and test) parts, by documents (or records) in file order."""
    eod_mask_loss: bool = False
    """Leave the first token of each document out of the loss, which only the end of another document stands
    before (the positions whose input is the end-of-document token, as in Megatron-LM). The end of a document
    itself is learned."""
    reset_position_ids: bool = False
    """Positions begin anew behind each end of a document inside a sample. For learned positions; rotary ones
    only know distances, and with reset_attention_mask none beyond a document."""
    reset_attention_mask: bool = False
    """No token sees past the end of a document before it: the documents packed into a sample don't see each
    other."""
