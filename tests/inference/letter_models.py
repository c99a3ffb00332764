"""Tiny models as Hugging Face folders whose tokenizer knows letters: a token each."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tiny_families import tiny

END, USER, BEGIN = "<end>", "<user>", "<begin>"
LETTERS = string.printable + "".join(chr(0x4E00 + number) for number in range(96))
"""As many as the model has ids for."""
CHAT = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<user>{% endif %}"
)


def write_model(path: Path, name: str = "qwen3_moe", with_beginning: bool = False) -> Path:
    """A case of `tiny_families`; `with_beginning`: its tokenizer puts <begin> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tiny(name).model.save_pretrained(path)
    special = {token: number for number, token in enumerate((END, USER, BEGIN, "<unknown>"))}
    letters = {letter: 4 + number for number, letter in enumerate(LETTERS)}
    made = Tokenizer(models.WordLevel(vocab={**special, **letters}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([END, USER, BEGIN])
    if with_beginning:
        made.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, special[BEGIN])]
        )
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": CHAT}))
    return path


def ids_of(text: str) -> list[int]:
    return [4 + LETTERS.index(letter) for letter in text]
