"""Rules about finetuning on conversations: `data.kind: instruction`."""

from __future__ import annotations

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Data, Experiment

_SECTION, _KIND = "data.instruction", "data.kind"


def instruction_said_once(e: Experiment) -> Problems:
    """Records are named where they are read, and nowhere else."""
    if e.data.kind == "instruction" and e.data.instruction is None:
        text = f"is not set, which {_KIND} reads"
        yield Problem((f"{_SECTION}.train", _KIND), text, "name jsonl or parquet files of records")
    elif e.data.kind != "instruction" and e.data.instruction is not None:
        text = f"is not read under {_KIND}"
        yield Problem(
            (f"{_SECTION}.train", _KIND), text, f"set {_KIND} to instruction, or {_SECTION} to null"
        )


def keys_of_records(e: Experiment) -> Problems:
    """Records are conversations or pairs, and a pair has both parts."""
    i = e.data.instruction
    if i is None:
        return
    prompt, answer, messages = (f"{_SECTION}.{name}_key" for name in ("prompt", "answer", "messages"))
    if i.prompt_key is not None and i.answer_key is None:
        yield Problem((answer, prompt), f"is not set, but {prompt} is", "name the key that holds the answer")
    if i.prompt_key is None and i.answer_key is not None:
        yield Problem((prompt, answer), f"is not set, but {answer} is", "name the key that holds the prompt")
    if i.prompt_key is None and i.input_key is not None:
        keys = (f"{_SECTION}.input_key", prompt)
        yield Problem(keys, f"has no effect without {prompt}", f"set {prompt} too, or leave it out")
    if i.answer_key is not None and i.answer_key in (i.prompt_key, i.input_key):
        text = "is the key of what is asked, too"
        yield Problem((answer, prompt), text, "name the key that holds the answer")
    if i.messages_key is not None and i.prompt_key is not None:
        text = f"and {prompt} are both set, and a record is one of the two"
        yield Problem((messages, prompt), text, "keep one of the two")


def template_of_tokenizer(e: Experiment) -> Problems:
    """Templates write control tokens as text, which only tokenizers of Hugging Face read back."""
    key, kind = f"{_SECTION}.chat_template", "data.tokenizer.kind"
    if e.data.instruction is None or e.data.instruction.chat_template is None:
        return
    if e.data.tokenizer.kind != "huggingface":
        text = (
            f"cannot be used with {kind}: control tokens that a template writes would be ordinary text to it"
        )
        remedy = f"leave it out, and the plain form is used, or set {kind} to huggingface"
        yield Problem((key, kind), text, remedy)


def weighting_said_once(e: Experiment) -> Problems:
    """What a target weighs is said by the section."""
    i, per_token = e.data.instruction, e.training.calculate_per_token_loss
    if i is None:
        return
    keys = ("training.calculate_per_token_loss", f"{_SECTION}.weighting")
    if per_token != (i.weighting == "token"):
        yield Problem(keys, f"says something else than {keys[1]}", "leave it out")
    mtp = "model.mtp_num_layers"
    if i.weighting == "sample" and e.model.mtp_num_layers:
        text = f"does not go with {mtp}, whose losses are means over all targets"
        yield Problem((keys[1], mtp), text, "set it to token")


def packing_can_be(e: Experiment) -> Problems:
    """Only our own attention is told where records end."""
    i, keys = e.data.instruction, (f"{_SECTION}.packing", "model.spec")
    if i is not None and i.packing and e.model.spec != "native":
        text = f"does not work with {keys[1]}: its attention is not told where records end"
        yield Problem(keys, text, f"set {keys[1]} to native, or it to false")


def routers_see_prompts(e: Experiment) -> Problems:
    """Routers must be told what is no target."""
    key = "moe.overlap_moe_expert_parallel_comm"
    if e.data.instruction is not None and e.moe is not None and e.moe.overlap_moe_expert_parallel_comm:
        text = f"does not go with {_KIND}: Megatron-Core does not tell its routers what is prompt or padding"
        yield Problem((key, _KIND), text, "leave it out")


def validation_said_once(e: Experiment) -> Problems:
    """Held-out records are files of their own, or a part of the others."""
    i, default = e.data.instruction, Data.model_fields["split"].default
    if i is not None and i.validation is not None and e.data.split != default:
        keys = ("data.split", f"{_SECTION}.validation")
        yield Problem(keys, f"is not read where {keys[1]} is set", "leave one of the two out")
