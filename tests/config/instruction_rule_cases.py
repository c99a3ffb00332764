"""Experiments that break the rules about finetuning on records; see test_rules."""

from __future__ import annotations

from experiment_files import DENSE, MOE

MOCK = "data: {kind: mock, tokenizer: {kind: bytes}}"
RECORDS = "data: {kind: instruction, instruction: {train: [x.jsonl]}, tokenizer: {kind: bytes}}"
CHAT, CHAT_MOE = DENSE.replace(MOCK, RECORDS), MOE.replace(MOCK, RECORDS)
SECTION, PER_TOKEN = "data.instruction", "training.calculate_per_token_loss"
SPEC, MTP = "model.spec", "model.mtp_num_layers"

INSTRUCTION_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "instruction_said_once",
        CHAT,
        [f"{SECTION}=null"],
        [f"{SECTION}.train=[x.jsonl]"],
        f"{SECTION}.train",
        'is not set, which data.kind ("instruction", experiment.yaml:3) reads; name jsonl or parquet files',
    ),
    (
        "instruction_said_once",
        CHAT,
        ["data.kind=mock"],
        ["data.kind=instruction"],
        f"{SECTION}.train",
        'is not read under data.kind ("mock", override); set data.kind',
    ),
    (
        "data_said_once",
        CHAT,
        ["data.path=x"],
        ["data.path=null"],
        "data.path",
        'is not read under data.kind ("instruction", experiment.yaml:3)',
    ),
    (
        "ends_of_documents",
        CHAT,
        ["data.reset_attention_mask=true"],
        ["data.reset_attention_mask=false"],
        "data.reset_attention_mask",
        "where data.instruction.packing keeps records apart",
    ),
    (
        "keys_of_records",
        CHAT,
        [f"{SECTION}.prompt_key=q"],
        [f"{SECTION}.answer_key=a"],
        f"{SECTION}.answer_key",
        "but data.instruction.prompt_key",
    ),
    (
        "keys_of_records",
        CHAT,
        [f"{SECTION}.prompt_key=q", f"{SECTION}.answer_key=q"],
        [f"{SECTION}.answer_key=a"],
        f"{SECTION}.answer_key",
        "is the key of what is asked, too",
    ),
    (
        "keys_of_records",
        CHAT,
        [f"{SECTION}.input_key=given"],
        [f"{SECTION}.input_key=null"],
        f"{SECTION}.input_key",
        "has no effect without data.instruction.prompt_key",
    ),
    (
        "keys_of_records",
        CHAT,
        [f"{SECTION}.messages_key=m", f"{SECTION}.prompt_key=q", f"{SECTION}.answer_key=a"],
        [f"{SECTION}.messages_key=null"],
        f"{SECTION}.messages_key",
        "are both set, and a record is one of the two",
    ),
    (
        "template_of_tokenizer",
        CHAT,
        [f"{SECTION}.chat_template=x.jinja"],
        [f"{SECTION}.chat_template=null"],
        f"{SECTION}.chat_template",
        'cannot be used with data.tokenizer.kind ("bytes", experiment.yaml:3): control tokens',
    ),
    (
        "weighting_said_once",
        CHAT,
        [f"{SECTION}.weighting=sample", f"{PER_TOKEN}=true"],
        [f"{PER_TOKEN}=null"],
        PER_TOKEN,
        'says something else than data.instruction.weighting ("sample", override); leave it out',
    ),
    (
        "weighting_said_once",
        CHAT,
        [f"{SECTION}.weighting=sample", f"{MTP}=1"],
        [f"{SECTION}.weighting=token"],
        f"{SECTION}.weighting",
        "does not go with model.mtp_num_layers (1, override)",
    ),
    (
        "packing_can_be",
        CHAT,
        [f"{SPEC}=transformer_engine"],
        [f"{SECTION}.packing=false"],
        f"{SECTION}.packing",
        "its attention is not told where records end",
    ),
    (
        "routers_see_prompts",
        CHAT_MOE,
        ["moe.overlap_moe_expert_parallel_comm=true", "parallel.expert_model_parallel_size=2"],
        ["moe.overlap_moe_expert_parallel_comm=false"],
        "moe.overlap_moe_expert_parallel_comm",
        "does not tell its routers what is prompt or padding",
    ),
    (
        "validation_said_once",
        CHAT,
        [f"{SECTION}.validation=[y.jsonl]", "data.split=[90, 10]"],
        ["data.split=[95, 5]"],
        "data.split",
        "is not read where data.instruction.validation",
    ),
    (
        "tokenizer_said_once",
        CHAT,
        ["data.tokenizer.kind=sentencepiece"],
        ["data.tokenizer.model=x.model", "model.vocab_size=300"],
        "data.tokenizer.model",
        "records are read with the tokenizer that the model was trained with",
    ),
]
