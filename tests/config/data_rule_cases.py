"""Experiments that break the rules about sources and documents; see test_rules."""

from __future__ import annotations

from experiment_files import DENSE

MOCK = "data: {kind: mock, tokenizer: {kind: bytes}}"
FILES = DENSE.replace(MOCK, "data: {path: x, tokenizer: {kind: bytes}}")
TEXT = DENSE.replace(MOCK, "data: {prepare: {input: [x.txt]}, tokenizer: {kind: bytes}}")
BLEND = DENSE.replace(
    MOCK, "data: {blend: {web: {path: w}, books: {prepare: {input: [b.txt]}}}, tokenizer: {kind: bytes}}"
)
WEB, BOOKS, ROPE = "data.blend.web", "data.blend.books", "model.position_embedding_type"

DATA_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "data_said_once",
        BLEND,
        ["data.path=x"],
        ["data.path=null"],
        "data.path",
        "and data.blend (experiment.yaml:3) are both set; keep one of the two",
    ),
    (
        "data_said_once",
        BLEND,
        ["data.kind=mock"],
        ["data.kind=pretraining"],
        "data.blend",
        "is not read under data.kind",
    ),
    (
        "source_said_once",
        BLEND,
        [f"{WEB}.prepare.input=[x]"],
        [f"{WEB}.path=null"],
        f"{WEB}.path",
        f"and {WEB}.prepare.input",
    ),
    (
        "source_said_once",
        BLEND,
        ["data.blend.book.epochs=2"],
        ["data.blend.book.path=x"],
        "data.blend.book.path",
        f"is not set, and neither is data.blend.book.prepare; set one of the two, or did you mean {BOOKS}?",
    ),
    (
        "weights_or_epochs",
        BLEND,
        [f"{WEB}.weight=1", f"{BOOKS}.epochs=2"],
        [f"{BOOKS}.epochs=null", f"{BOOKS}.weight=2"],
        f"{WEB}.weight",
        f"and {BOOKS}.epochs (2.0, override) don't go together",
    ),
    (
        "weights_or_epochs",
        BLEND,
        [f"{WEB}.weight=1"],
        [f"{BOOKS}.weight=2"],
        f"{BOOKS}.weight",
        "give every source a weight, or none",
    ),
    (
        "sources_are_read",
        BLEND,
        [f"{WEB}.weight=1", f"{BOOKS}.weight=[0, 0]"],
        [f"{BOOKS}.weight=[0, 1]"],
        f"{BOOKS}.weight",
        "leaves the source out of every part",
    ),
    (
        "sources_are_read",
        BLEND,
        [f"{WEB}.split=[0, 0]"],
        [f"{WEB}.split=[0, 1]"],
        f"{WEB}.split",
        "leaves the source no part",
    ),
    (
        "sources_are_read",
        BLEND,
        [f"{WEB}.weight=1", f"{BOOKS}.weight=[1, 1, 1]"],
        [f"{BOOKS}.split=[90, 5, 5]"],
        f"{BOOKS}.weight",
        "a share of the test part, where data.split ([95.0, 5.0], default) leaves it no documents",
    ),
    (
        "split_has_training_part",
        BLEND,
        [f"{WEB}.split=[0, 1]", f"{BOOKS}.split=[0, 1]"],
        [f"{WEB}.split=[1, 0]"],
        "data.blend",
        "has no source with a weight in the training part",
    ),
    (
        "evaluation_has_data",
        BLEND,
        ["training.eval_interval=5", f"{WEB}.weight=[1, 0]", f"{BOOKS}.weight=[1, 0]"],
        [f"{BOOKS}.weight=1"],
        "training.eval_interval",
        "no source of data.blend (experiment.yaml:3) has a weight in one",
    ),
    (
        "ends_of_documents",
        DENSE,
        ["data.eod_mask_loss=true"],
        ["data.eod_mask_loss=false"],
        "data.eod_mask_loss",
        "needs documents, and data.kind",
    ),
    (
        "ends_of_documents",
        BLEND,
        ["data.reset_attention_mask=true", f"{BOOKS}.prepare.append_eod=false"],
        [f"{BOOKS}.prepare.append_eod=true"],
        "data.reset_attention_mask",
        f"which {BOOKS}.prepare.append_eod (false, override) leaves out",
    ),
    (
        "positions_can_be_reset",
        FILES,
        ["data.reset_position_ids=true"],
        ["data.reset_attention_mask=true"],
        "data.reset_position_ids",
        f'cannot be computed with {ROPE} ("rope", default) while data.reset_attention_mask',
    ),
    (
        "positions_can_be_reset",
        TEXT,
        ["data.reset_position_ids=true", f"{ROPE}=none"],
        [f"{ROPE}=learned_absolute"],
        "data.reset_position_ids",
        "has no effect",
    ),
    (
        "attention_can_be_reset",
        FILES,
        ["data.reset_attention_mask=true", "model.spec=transformer_engine"],
        ["model.spec=native"],
        "data.reset_attention_mask",
        "its attention is not told where documents end",
    ),
    (
        "tokenizer_said_once",
        BLEND,
        ["data.tokenizer={kind: sentencepiece, vocab_size: 300}"],
        [f"{WEB}.path=null", f"{WEB}.prepare.input=[w.txt]"],
        "data.tokenizer.model",
        f"is not set, but {WEB}.path",
    ),
]
