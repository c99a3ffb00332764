"""The regular expressions that cut text into words before a tokenizer merges bytes.

All of these read from left to right, look back at nothing, end a word no later than a blank behind a letter
or digit, and begin anew there: what `cutting` calls "behind words" holds for them.
"""

from __future__ import annotations

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _with_digits(digits: str) -> str:
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"(?i:{_CONTRACTIONS})|{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"


CL100K = _with_digits(r"\p{N}{1,3}")
"""GPT-4, Llama 3."""
QWEN2 = _with_digits(r"\p{N}")
O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+(?i:{_CONTRACTIONS})?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*(?i:{_CONTRACTIONS})?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _BLANKS,
    )
)
"""GPT-4o, gpt-oss."""
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n"
    + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
    + "[\r\n]*|"
    + r"\s*"
    + "[\r\n]+"
    + r"|\s+(?!\S)|\s+",
)
"""One after the other; a newline stands as itself in them."""

TIKTOKEN = {"gpt2": GPT2, "cl100k_base": CL100K, "o200k_base": O200K}
"""data.tokenizer.pattern by name."""
END_AT_BLANKS = frozenset({GPT2, CL100K, QWEN2, O200K, *DEEPSEEK_V3})
