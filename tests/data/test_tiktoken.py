"""Ranks in tiktoken's form, against byte-pair merging written out, and tiktoken's own expressions."""

from __future__ import annotations

import base64
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from data_samples import ODD_TEXTS, SHAKESPEARE, write_text
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tiktoken_ext import openai_public

from megatron_moe.config.errors import InputError
from megatron_moe.config.tokenizer_files import vocab_size
from megatron_moe.data import inputs as input_files
from megatron_moe.data import tiktoken_ranks
from megatron_moe.data.cutting import parts
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.tokenizers import load_tokenizer
from megatron_moe.data.word_patterns import TIKTOKEN

MERGED = ["th", "he", " t", " th", "the", " the", "an", "and", "\n\n", "  ", " \n", "12", "'s", ".\n", "é"]
RANKS = {bytes([byte]): byte for byte in range(256)}
RANKS |= {token.encode(): 256 + number for number, token in enumerate(MERGED)}
TEXT = SHAKESPEARE.read_text()[:20_000]


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    return write_ranks(tmp_path / "x.tiktoken", RANKS)


def merged(word: bytes) -> list[int]:
    """The ids of one word: always the two neighbours next whose token has the lowest rank."""
    tokens = [word[at : at + 1] for at in range(len(word))]
    while len(tokens) > 1:
        found = [(RANKS.get(a + b, len(RANKS)), at) for at, (a, b) in enumerate(pairwise(tokens))]
        rank, at = min(found)
        if rank == len(RANKS):
            break
        tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
    return [RANKS[token] for token in tokens]


@pytest.mark.parametrize("pattern", [*TIKTOKEN, r"\w+|\W"])
def test_ids_are_merged_by_rank_inside_words(ranks: Path, pattern: str) -> None:
    tokenizer = load_tokenizer("tiktoken", ranks, pattern=pattern)
    for text in [TEXT, *ODD_TEXTS]:
        words = regex.findall(TIKTOKEN.get(pattern, pattern), text)
        assert "".join(words) == text
        expected = [token for word in words for token in merged(word.encode())]
        assert tokenizer.encode(text) == tokenizer.encode_many([text])[0].tolist() == expected
        assert tokenizer.decode([*expected, tokenizer.eod]) == text


def published(name: str) -> str:
    """tiktoken's own expression."""
    with pytest.MonkeyPatch.context() as patch:
        for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, load, lambda *_, **__: RANKS)
        return str(getattr(openai_public, name)()["pat_str"])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, tiktoken.Encoding]]:
    """By name of the expression: our tokenizer, and tiktoken with its own expression."""
    path = write_ranks(tmp_path_factory.mktemp("ranks") / "x.tiktoken", RANKS)
    return {
        name: (
            load_tokenizer("tiktoken", path, pattern=name),
            tiktoken.Encoding("test", pat_str=published(name), mergeable_ranks=RANKS, special_tokens={}),
        )
        for name in TIKTOKEN
    }


@pytest.mark.parametrize("name", TIKTOKEN)
@given(
    text=st.text(max_size=40)
    | st.text(alphabet="abthe12 \n\r\t.,'S/_é\u0301日\u00a0\u2028ʰǅ", max_size=60)
    | st.lists(st.sampled_from(["don't ", "IT'LL", "x\n\n", " \n y", "//\n/a ", "1234 "])).map("".join)
)
def test_named_expressions_are_tiktokens_and_end_words_at_blanks(
    name: str, text: str, pairs: dict[str, tuple[object, tiktoken.Encoding]]
) -> None:
    tokenizer, reference = pairs[name]
    whole = reference.encode_ordinary(text)
    assert tokenizer.encode(text) == whole  # type: ignore[attr-defined]
    assert tokenizer.cuts == "behind words"  # type: ignore[attr-defined]
    cut = list(parts(text, "behind words", 1))
    assert [token for part in cut for token in reference.encode_ordinary(part)] == whole


def test_the_end_of_document_stands_behind_the_ranks_and_no_text_has_it(ranks: Path) -> None:
    tokenizer = load_tokenizer("tiktoken", ranks)
    assert tokenizer.eod == len(RANKS) == tokenizer.vocab_size - 1 == vocab_size("tiktoken", ranks) - 1
    spelled = tokenizer.encode("a<|endoftext|>")
    assert tokenizer.eod not in spelled and tokenizer.decode(spelled) == "a<|endoftext|>"
    assert load_tokenizer("tiktoken", ranks, eod="</s>").eod == len(RANKS)


def test_an_end_of_document_among_the_ranks_is_taken(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "x.tiktoken", RANKS | {b"<|endoftext|>": 900, b"last": 901})
    tokenizer = load_tokenizer("tiktoken", path)
    assert (tokenizer.eod, tokenizer.vocab_size, vocab_size("tiktoken", path)) == (900, 902, 902)
    assert load_tokenizer("tiktoken", path, eod="last").eod == 901


def test_gaps_in_the_ranks_count_as_ids(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "x.tiktoken", {token: 3 * rank for token, rank in RANKS.items()})
    tokenizer = load_tokenizer("tiktoken", path)
    assert tokenizer.vocab_size == vocab_size("tiktoken", path) == 3 * (len(RANKS) - 1) + 2
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_the_hash_is_of_all_that_decides_the_ids(ranks: Path, tmp_path: Path) -> None:
    copy = write_ranks(tmp_path / "copy", RANKS)
    default = load_tokenizer("tiktoken", ranks)
    assert load_tokenizer("tiktoken", copy, pattern="cl100k_base").sha256 == default.sha256
    others = [
        load_tokenizer("tiktoken", ranks, pattern="gpt2"),
        load_tokenizer("tiktoken", ranks, eod="the"),
        load_tokenizer("tiktoken", write_ranks(copy, RANKS | {b"more": 999})),
    ]
    assert len({default.sha256, *(other.sha256 for other in others)}) == 4


def test_a_long_text_in_parts_and_in_workers_has_the_ids_of_the_whole(
    ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(tiktoken_ranks, "_PART_CHARACTERS", 300)
    reference = tiktoken.Encoding("test", pat_str=TIKTOKEN["gpt2"], mergeable_ranks=RANKS, special_tokens={})
    tokenizer = load_tokenizer("tiktoken", ranks, pattern="gpt2")
    assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXT) == reference.encode_ordinary(TEXT)
    preprocess([write_text(tmp_path / "x.txt", TEXT)], tmp_path / "out", tokenizer, workers=2)
    found = [ids.tolist() for ids in IndexedDataset(str(tmp_path / "out"))]
    assert found == [[*reference.encode_ordinary(TEXT), tokenizer.eod]]


def test_an_expression_of_ones_own_is_given_whole_documents(ranks: Path) -> None:
    assert load_tokenizer("tiktoken", ranks, pattern=r"\w+\s*|\W").cuts == "nowhere"


LINES = [base64.b64encode(token) + b" %d" % rank for token, rank in RANKS.items()]
WRONG = {
    "garbage": (b"some text\n", r"x\.tiktoken:1: not ranks in tiktoken's form"),
    "json": (b'{"a": 1}', r"x\.tiktoken:1: not ranks"),
    "no id": (b"\n".join([*LINES, b"bW9yZQ=="]), rf"x\.tiktoken:{len(LINES) + 1}: not ranks"),
    "id twice": (b"\n".join([*LINES, b"bW9yZQ== 7"]), r"holds an id twice"),
    "absurd id": (b"\n".join([*LINES, b"bW9yZQ== 99999999999"]), r"one that cannot be: 99999999999"),
    "negative id": (b"\n".join([*LINES, b"bW9yZQ== -7"]), r"one that cannot be: -7"),
    "token twice": (b"\n".join([*LINES, LINES[3]]), r"holds a token twice"),
    "bytes missing": (
        b"\n".join(LINES[:65] + LINES[66:200]),
        r"no id for 57 of the 256 bytes, first for 0x41",
    ),
    "empty": (b"", r"no id for 256 of the 256 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_are_no_ranks_is_named(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    (tmp_path / "x.tiktoken").write_bytes(content)
    for load in (load_tokenizer, vocab_size):
        with pytest.raises(InputError, match=message):
            load("tiktoken", tmp_path / "x.tiktoken")


def test_wrong_expressions_paths_and_packages_are_named(
    ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match=r"^pattern: 'cl100k\(' is none of gpt2, cl100k_base, o200k_base, and no"
    ):
        load_tokenizer("tiktoken", ranks, pattern="cl100k(")
    with pytest.raises(InputError, match=r"^pattern: '\[a-z\]\+' leaves out 'A' in a text; it has to match"):
        load_tokenizer("tiktoken", ranks, pattern="[a-z]+")
    with pytest.raises(InputError, match=r"^pattern: 'x\*' cannot be matched to a text"):
        load_tokenizer("tiktoken", ranks, pattern="x*")
    never_ends = load_tokenizer("tiktoken", ranks, pattern=r"(aa|a)+(?!.)(?<=!)|(?s:.)")
    with pytest.raises(InputError, match=r"^pattern: .* cannot be matched to a text: .*backtracking"):
        never_ends.encode("a" * 100 + "!")
    with pytest.raises(InputError, match=r"leaves out 'É'"):
        load_tokenizer("tiktoken", ranks, pattern=r"[^\u00c9]").encode("cafÉ")
    with pytest.raises(InputError, match=r"is a folder; name the file of tiktoken's ranks .*x\.tiktoken"):
        load_tokenizer("tiktoken", tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert vocab_size("tiktoken", ranks) == len(RANKS) + 1, "a plan does without"
    with pytest.raises(InputError, match=r"pip install 'megatron-moe\[tiktoken\]'"):
        load_tokenizer("tiktoken", ranks)
