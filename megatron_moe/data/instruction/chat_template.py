"""Chat templates: jinja that makes text of a conversation, rendered as `transformers` does, without it."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron_moe.config.errors import InputError
from megatron_moe.config.huggingface_files import read_json_beside, tokenizer_json
from megatron_moe.data.documents import BadRecord
from megatron_moe.data.instruction.messages import Message
from megatron_moe.data.instruction.time_limit import at_most

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_SECONDS = 60.0
"""Of computing, which a conversation may take: long ones take a thousandth of one."""
Span = tuple[int, int]
"""First character and the one behind the last."""


class ChatTemplate:
    """A template and the special tokens that it may name.

    What a template may do is what jinja's sandbox allows: it comes from others.

    Attributes:
        marks_answers: it says itself, by `{% generation %}`, what an assistant writes.
        sha256: of all that decides what it renders, the date apart.
    """

    def __init__(self, source: str, text: str, special_tokens: Mapping[str, str]) -> None:
        """`source` says in errors where it comes from. InputError where it is no template."""
        self.source, self.text, self.special_tokens = source, text, dict(special_tokens)
        self.marks_answers = _GENERATION.search(text) is not None
        self.sha256 = hashlib.sha256(json.dumps([text, self.special_tokens]).encode()).hexdigest()
        # One moment for all, or texts that are compared would differ at midnight.
        self._now = datetime.datetime.now()
        _ = self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; `add_generation_prompt`: up to where an assistant would go on.
        BadRecord where the template refuses it."""
        return self._rendered(messages, add_generation_prompt)[0]

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and where in it the template says that an assistant writes."""
        text, spans, written = self._rendered(messages, add_generation_prompt=False)
        if [text[begin:end] for begin, end in spans] != written:
            raise BadRecord("the chat template has {% generation %} where it cannot be followed, in a macro")
        return text, spans

    def _rendered(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, list[Span], list[str]]:
        environment: Any = self._compiled.environment
        parts: list[str] = []
        environment.answers = []
        environment.parts = parts
        try:
            given = {"messages": messages, "tools": None, "documents": None, **self.special_tokens}
            with at_most(_SECONDS):
                for part in self._compiled.generate(add_generation_prompt=add_generation_prompt, **given):
                    parts.append(part)
        except Exception as error:  # what a template does may raise anything
            why = str(error) or type(error).__name__
            raise BadRecord(f"the chat template ({self.source}) refuses it: {why}") from None
        spans = [(begin, begin + len(text)) for begin, text in environment.answers]
        return "".join(parts), spans, [text for _, text in environment.answers]

    @cached_property
    def _compiled(self) -> Any:
        try:
            return _environment(self._now).from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{self.source}: no jinja template: line {error.lineno}: {error}") from None


def find_template(tokenizer: str | Path, file: str | Path | None) -> ChatTemplate | None:
    """The template in `file`, or else the one that lies beside a tokenizer.json; None where there is none.

    InputError for what is no template.
    """
    beside = tokenizer_json(tokenizer)
    config = read_json_beside(beside, "tokenizer_config.json")
    special = {**read_json_beside(beside, "special_tokens_map.json"), **config}
    tokens: dict[str, str] = {}
    for name in (f"{name}_token" for name in _SPECIAL):
        token = special.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    own = Path(file) if file is not None else beside.with_name("chat_template.jinja")
    if file is not None or own.is_file():
        try:
            return ChatTemplate(str(own), own.read_text(encoding="utf-8"), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{own}: cannot read the chat template: {error}") from None
    text = config.get("chat_template")
    if isinstance(text, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        return None
    return ChatTemplate(str(beside.with_name("tokenizer_config.json")), text, tokens)


def _environment(now: datetime.datetime) -> Any:
    """What transformers gives templates: its filters, globals and the tag `generation`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = now.strftime
    environment.globals["dict"] = _PlainDict()
    environment.globals["namespace"] = _PlainNamespace
    return environment


class _Generation(Extension):
    """Notes in `environment.answers` where each block `generation` begins and what it is."""

    tags = {"generation"}  # noqa: RUF012 (as jinja has it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        environment: Any = self.environment
        text = str(caller())
        environment.answers.append((sum(map(len, environment.parts)), text))
        return text


class _PlainDict:
    """`dict` without its attributes, by which a template could get out of the sandbox."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _PlainNamespace(Namespace):
    """`namespace` without names that Python reserves."""

    def __init__(*arguments: Any, **named: Any) -> None:
        for name in dict(*arguments[1:], **named):
            _PlainNamespace.check(name)
        Namespace.__init__(*arguments, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _PlainNamespace.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own would write characters of HTML in another way."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
