"""Hugging Face tokenizers: the library's own ids, an end of document from its files, and cuts that change
nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import ODD_TEXTS, SHAKESPEARE, write_jsonl, write_text
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from megatron_moe.config.errors import InputError
from megatron_moe.config.tokenizer_files import vocab_size
from megatron_moe.data import huggingface
from megatron_moe.data import inputs as input_files
from megatron_moe.data.cutting import last_cut, parts
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.tokenizers import load_tokenizer
from megatron_moe.data.word_patterns import CL100K, DEEPSEEK_V3, O200K, QWEN2

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<pad>"]
TEXT = SHAKESPEARE.read_text()[:60_000]


def isolated(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Text cut by these expressions, one after the other, as Llama 3, Qwen, gpt-oss and DeepSeek have it."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


WORDS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": lambda: isolated(CL100K),
    "qwen2": lambda: isolated(QWEN2),
    "o200k": lambda: isolated(O200K),
    "deepseek": lambda: isolated(*DEEPSEEK_V3),
}


def trained(words: pre_tokenizers.PreTokenizer, normalizer: Any = None) -> Library:
    """A byte-level BPE on Shakespeare, with merges over newlines and blanks where its words have them."""
    library = Library(models.BPE())
    library.normalizer = normalizer
    library.pre_tokenizer = words
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blanks = ["x\n\n\ny  \n", "a \n\n b\t\t\r\n\r\n", ".\n\n;\n/\n//"] * 200
    library.train_from_iterator([*TEXT.split("\n\n"), *blanks], trainer)
    return library


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tokenizer.json for each way of cutting words."""
    folders = {}
    for name, words in WORDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        library = trained(words(), normalizers.NFC() if name == "qwen2" else None)
        library.save(str(folders[name] / "tokenizer.json"))
        (folders[name] / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folders


@pytest.fixture
def folder(files: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the first one, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((files["gpt2"] / name).read_bytes())
    return tmp_path


def changed(folder: Path, **keys: Any) -> Path:
    """The folder with these keys of its tokenizer.json replaced."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


@pytest.mark.parametrize("name", WORDS)
def test_ids_are_those_of_the_library(files: dict[str, Path], name: str) -> None:
    library = Library.from_file(str(files[name] / "tokenizer.json"))
    tokenizer = load_tokenizer("huggingface", files[name])
    texts = [TEXT, *ODD_TEXTS, "<|endoftext|> in a text<pad>"]
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == expected
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eod]) == TEXT


def test_the_file_and_its_folder_are_the_same_tokenizer(folder: Path) -> None:
    by_folder, by_file = (load_tokenizer("huggingface", path) for path in (folder, folder / "tokenizer.json"))
    assert (by_folder.sha256, by_folder.eod, by_folder.vocab_size) == (
        by_file.sha256,
        by_file.eod,
        by_file.vocab_size,
    )


@pytest.mark.parametrize("text", ["two words", TEXT[:200]])
def test_nothing_is_added_cut_off_or_filled_up(folder: Path, text: str) -> None:
    library = Library.from_file(str(folder / "tokenizer.json"))
    plain = library.encode(text).ids
    ends = [("<pad>", 2), ("<|endoftext|>", 0)]
    library.post_processor = processors.TemplateProcessing("<pad> $A <|endoftext|>", None, ends)
    library.enable_truncation(16)
    library.enable_padding(length=16)
    library.save(str(folder / "tokenizer.json"))
    assert len(library.encode(text).ids) == 16 != len(plain)
    assert load_tokenizer("huggingface", folder).encode(text) == plain


def test_a_special_token_that_a_text_spells_is_that_token(folder: Path) -> None:
    tokenizer = load_tokenizer("huggingface", folder)
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eod]


@pytest.mark.parametrize(
    ("beside", "eod"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, "<|im_end|>"),
        ({"special_tokens_map.json": {"eos_token": "<pad>"}}, "<pad>"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<pad>"}}}, "<pad>"),
        ({"generation_config.json": {"eos_token_id": 1}}, "<|im_end|>"),
        ({"generation_config.json": {"eos_token_id": [2, 1]}}, "<pad>"),
        (
            {"tokenizer_config.json": {"eos_token": None}, "generation_config.json": {"eos_token_id": 0}},
            "<|endoftext|>",
        ),
        (
            {"tokenizer_config.json": {"eos_token": "<pad>"}, "generation_config.json": {"eos_token_id": 0}},
            "<pad>",
        ),
    ],
)
def test_the_end_of_document_is_what_the_files_call_end_of_text(
    folder: Path, beside: dict[str, Any], eod: str
) -> None:
    (folder / "tokenizer_config.json").unlink()
    for name, content in beside.items():
        (folder / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer("huggingface", folder)
    assert tokenizer.eod == SPECIAL.index(eod)
    assert load_tokenizer("huggingface", folder, eod=eod).sha256 == tokenizer.sha256


def test_an_end_of_document_that_is_said_wins_and_counts_in_the_hash(folder: Path) -> None:
    said = load_tokenizer("huggingface", folder, eod="<pad>")
    assert said.eod == 2
    assert said.sha256 != load_tokenizer("huggingface", folder).sha256
    with pytest.raises(
        InputError, match=r"^eod: .*no token '</s>'; special tokens that it has: <\|endoftext\|>, <\|im_end"
    ):
        load_tokenizer("huggingface", folder, eod="</s>")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(InputError, match="'</s>', which a file beside it calls the end of text"):
        load_tokenizer("huggingface", folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(
        InputError, match=r"^eod: needed, as nothing beside .*special tokens.*<\|endoftext\|>"
    ):
        load_tokenizer("huggingface", folder)


def test_the_size_counts_added_tokens_and_gaps(folder: Path) -> None:
    library = Library.from_file(str(folder / "tokenizer.json"))
    before = vocab_size("huggingface", folder)
    assert before == library.get_vocab_size() == load_tokenizer("huggingface", folder).vocab_size
    library.add_tokens(["one more", "and more"])
    library.save(str(folder / "tokenizer.json"))
    assert vocab_size("huggingface", folder) == load_tokenizer("huggingface", folder).vocab_size == before + 2
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["vocab"]["far"] = before + 900
    changed(folder, model=description["model"], added_tokens=description["added_tokens"][:-2])
    assert (
        vocab_size("huggingface", folder) == load_tokenizer("huggingface", folder).vocab_size == before + 901
    )


@pytest.mark.parametrize("name", WORDS)
@given(
    text=st.text(alphabet="abAB 12²\n\r\t.,'/s_é\u0301日ーⅧ\u00a0\u2028\u3000", max_size=60)
    | st.lists(st.sampled_from(["don't ", "x\n\n", " \n y", "<|endoftext|> ", "//\n/a ", "12345 "])).map(
        "".join
    )
)
def test_documents_may_be_cut_behind_words(files: dict[str, Path], name: str, text: str) -> None:
    tokenizer, library = cached(files[name])
    assert tokenizer.cuts == "behind words"
    whole = library.encode(text, add_special_tokens=False).ids
    cut = list(parts(text, "behind words", 1))
    assert "".join(cut) == text
    assert [token for part in cut for token in tokenizer.encode(part)] == whole
    content = text.encode()
    for end in range(len(content)):  # also inside characters
        at = last_cut(content[:end], "behind words")
        halves = content[:at].decode(), content[at:].decode()
        assert tokenizer.encode(halves[0]) + tokenizer.encode(halves[1]) == whole


_CACHE: dict[Path, Any] = {}


def cached(folder: Path) -> Any:
    """Ours and the library's: examples are many."""
    if folder not in _CACHE:
        _CACHE[folder] = (
            load_tokenizer("huggingface", folder),
            Library.from_file(str(folder / "tokenizer.json")),
        )
    return _CACHE[folder]


def with_token(library: Library, **options: Any) -> None:
    library.add_special_tokens([AddedToken("<mask>", **options)])


def with_blank(library: Library) -> None:
    library.add_tokens(["of the"])


def like_llama2(library: Library) -> None:
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.pre_tokenizer = None


def with_prefix(library: Library) -> None:
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def own_words(library: Library) -> None:
    library.pre_tokenizer = isolated(r"[a-z]+\n?")


def merged_words(library: Library) -> None:
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "merged_with_next"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    "change",
    [lambda lib: with_token(lib, rstrip=True), with_blank, like_llama2, with_prefix, own_words, merged_words],
)
def test_other_tokenizers_get_their_documents_whole(folder: Path, change: Callable[[Library], None]) -> None:
    library = Library.from_file(str(folder / "tokenizer.json"))
    change(library)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer("huggingface", folder)
    assert tokenizer.cuts == "nowhere"
    assert tokenizer.encode(TEXT) == library.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["gpt2", "deepseek"])
def test_a_long_text_read_and_encoded_in_parts_has_the_ids_of_the_whole(
    files: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(huggingface, "_PART_CHARACTERS", 300)
    text = TEXT[:30_000] + "Grüße\n\n日本語 \n" * 300
    library = Library.from_file(str(files[name] / "tokenizer.json"))
    whole = library.encode(text, add_special_tokens=False).ids
    tokenizer = load_tokenizer("huggingface", files[name])
    inputs = [write_text(tmp_path / "x.txt", text), write_jsonl(tmp_path / "y.jsonl", [text])]
    preprocess(inputs, tmp_path / "out", tokenizer, workers=2)
    assert [ids.tolist() for ids in IndexedDataset(str(tmp_path / "out"))] == [[*whole, tokenizer.eod]] * 2


@pytest.mark.parametrize(
    "content", [b"garbage", b"\xff\xfe", b"[]", b"{}", b'{"model": {}}', b'{"model": {"vocab": {}}}']
)
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    for load in (load_tokenizer, vocab_size):
        with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json"):
            load("huggingface", tmp_path)


def test_wrong_paths_are_named(tmp_path: Path) -> None:
    for load in (load_tokenizer, vocab_size):
        with pytest.raises(InputError, match=r"there is no tokenizer\.json in this folder"):
            load("huggingface", tmp_path)
        with pytest.raises(InputError, match=r"none\.json: cannot read the tokenizer\.json: No such file"):
            load("huggingface", tmp_path / "none.json")


@pytest.mark.parametrize("number", ["x", -1, 10**12])
def test_ids_that_cannot_be_are_named(folder: Path, number: object) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"]["far"] = number
    changed(folder, model=model)
    for load in (vocab_size, lambda *where: load_tokenizer(*where, eod="far")):
        with pytest.raises(InputError, match=rf"tokenizer\.json: (not|.*cannot).*{number}"):
            load("huggingface", folder)


def test_an_added_token_that_the_library_numbers_anew_is_named(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    changed(folder, added_tokens=[*added, added[0] | {"content": "<far>", "id": 5000}])
    with pytest.raises(InputError, match=r"added token '<far>' the id 5,000, of which tokenizers makes \d"):
        load_tokenizer("huggingface", folder)


def test_a_text_without_ids_is_named(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"</s>": 0, "known": 1}}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    path = write_text(tmp_path / "x.txt", "known\n\nunheard of\n")
    tokenizer = load_tokenizer("huggingface", tmp_path, eod="</s>")
    with pytest.raises(InputError, match=r"x\.txt: from line or row 1 on: .*tokenizer\.json: has no ids"):
        preprocess([path], tmp_path / "out", tokenizer)


def test_an_expression_that_never_ends_is_named(folder: Path) -> None:
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.pre_tokenizer = isolated(r"(a+)+$")
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match=r"has no ids for a text: .*retry-limit"):
        load_tokenizer("huggingface", folder).encode("a" * 40 + "!")


def test_merges_left_out_at_random_are_refused(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    changed(folder, model=model | {"dropout": 0.1})
    with pytest.raises(InputError, match=r"at random \(model\.dropout\)"):
        load_tokenizer("huggingface", folder)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert vocab_size("huggingface", folder) > 256, "a plan does without"
    with pytest.raises(InputError, match=r"needs tokenizers, .*pip install 'megatron-moe\[huggingface\]'"):
        load_tokenizer("huggingface", folder)
