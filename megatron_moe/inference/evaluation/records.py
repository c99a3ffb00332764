"""Records of a task's file, and what its keys and templates make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.text_files import suffix_of
from megatron_moe.data.documents import BadRecord, check_unicode, json_object
from megatron_moe.data.inputs import open_input

_KEYS_SHOWN = 200


@dataclass(frozen=True)
class Record:
    """One line of a file.

    Attributes:
        place: file and line.
    """

    place: str
    values: Mapping[str, Any]


def read_records(path: str, most: int | None = None) -> list[Record]:
    """The records of a .jsonl file, at most so many. Raises InputError, with the line, for what is none, and
    for a file without any."""
    if not suffix_of(path).startswith(".jsonl"):
        raise InputError(f"{path}: is not a .jsonl file (.gz or .zst behind it); tasks are read from such")
    file = open_input(path, "")
    records: list[Record] = []
    try:
        for chunk in file.chunks("line", "nowhere"):
            for number, line in enumerate(chunk.payload.split(b"\n"), chunk.first):
                if most is not None and len(records) == most:
                    return records
                if line.strip():
                    place = f"{path}:{number}"
                    try:
                        values = json_object(line, '{"question": "...", "answer": "..."}')
                    except BadRecord as error:
                        raise InputError(f"{place}: {error}") from None
                    records.append(Record(place, values))
    finally:
        file.close()
    if not records:
        raise InputError(f"{path}: has no records; write one JSON object a line")
    return records


class Expression:
    """What a key of a task says about a record: the name of a key of it, or a template over its keys.

    Args:
        key: of the task, as errors name it.
        text: what the task says there.
    """

    def __init__(self, key: str, text: str) -> None:
        self.key, self.text = key, text
        self._template = _compiled(key, text) if "{{" in text or "{%" in text else None

    def value(self, record: Record, **more: str) -> Any:
        """What lies under the key, or the text of the template. InputError, with the record's place, where
        that is not there.

        Args:
            more: names that a template may use besides.
        """
        if self._template is not None:
            return self._rendered(record, more)
        found: Any = record.values
        for part in self.text.split("."):
            if not isinstance(found, Mapping) or part not in found:
                keys = ", ".join(record.values)[:_KEYS_SHOWN] or "none"
                raise InputError(
                    f"{record.place}: has no key '{self.text}', which {self.key} names; its keys: {keys}"
                )
            found = found[part]
        return found

    def string(self, record: Record, **more: str) -> str:
        """The value, as a text. Numbers become text."""
        found = self.value(record, **more)
        if isinstance(found, int | float) and not isinstance(found, bool):
            found = str(found)
        if not isinstance(found, str):
            raise InputError(f"{record.place}: '{self.text}' ({self.key}) is {_kind(found)}, not a text")
        try:
            check_unicode(found)
        except BadRecord as error:
            raise InputError(f"{record.place}: {self.key}: {error}") from None
        return found

    def _rendered(self, record: Record, more: Mapping[str, str]) -> str:
        assert self._template is not None
        try:
            return str(self._template.render({**record.values, **more}))
        except Exception as error:  # what a template does may raise anything
            keys = ", ".join(record.values)[:_KEYS_SHOWN] or "none"
            raise InputError(f"{record.place}: {self.key}: {error}; keys of this record: {keys}") from None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


@cache
def _compiled(key: str, text: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{key}: is no jinja template: {error}") from None
