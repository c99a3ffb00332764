"""What README and docs name exists: commands, keys, files, headings, metrics."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from distributed import ranks
from steps_for_docs import written_keys

from megatron_moe.cli import build_parser
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.keys import schema_key
from megatron_moe.config.loading import load
from megatron_moe.config.schema import Experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "corpus").glob("*.md"))]
COMMAND = re.compile(r"(?:megatron-moe|-m megatron_moe) (.+)")
PLACEHOLDER = re.compile(r"[A-Z_]+")


def code_lines(page: Path) -> list[str]:
    """The lines of a page's code blocks, with those that they continue on, and its inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline


def commands() -> list[tuple[str, str]]:
    """(page, arguments) of every command of ours that a page names."""
    found = []
    for page in PAGES:
        for line in code_lines(page):
            if match := COMMAND.search(line):
                arguments = re.split(r" \|\| | && | \| |  # ", match[1])[0]
                found.append((str(page.relative_to(ROOT)), arguments.strip()))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "arguments"), commands())
def test_commands_are_accepted(page: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(arguments)
    names = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    if PLACEHOLDER.fullmatch(words[0]):
        return
    assert words[0] in names, f"{page} names the command {words[0]}"
    if len(words) == 1 or any(PLACEHOLDER.fullmatch(word) for word in words):
        return
    args, others = build_parser().parse_known_args(words)
    assert all("=" in other and not other.startswith("-") for other in others), others
    if not hasattr(args, "config") or not (ROOT / args.config).is_file():
        return
    monkeypatch.chdir(ROOT)
    # For serving and for a search the GPUs are not those of the experiment's layout.
    is_layout = not getattr(args, "inference", False) and not getattr(args, "search", False)
    gpus = getattr(args, "gpus", None) if is_layout else None
    try:
        load(args.config, [*args.overrides, *others], world_size=gpus)
    except ConfigError as error:
        # Files that the command before it makes.
        wrong = [problem for problem in error.problems if "no such file" not in problem.lower()]
        assert wrong == [], page


def test_pages_name_commands_at_all() -> None:
    assert {arguments.split()[0] for _, arguments in commands()} >= {"train", "verify", "plan", "validate"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.is_file(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {anchor(title) for title in titles}, f"{page.name}: {target}"


def anchor(title: str) -> str:
    """The name that a heading has in links."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_in_the_tree_exist(page: Path) -> None:
    """Files of ours that stand in inline code, and the lines of the README's tree."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:megatron_moe|configs|tests|tools|corpus|docs|constraints|scripts)/[\w./-]+)`", text
    ):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    for name in re.findall(r"`((?:cli|launch|training|model|data|engine|plan|config)[\w/]*\.py)`", text):
        assert (ROOT / "megatron_moe" / name).exists(), f"{page.name}: {name}"
    folder = ROOT
    for block in re.findall(r"^```\n(megatron_moe/\n.*?)^```", text, re.MULTILINE | re.DOTALL):
        for indent, name in re.findall(r"^( *)([\w./]+)", block, re.MULTILINE):
            folder = ROOT / "megatron_moe" if indent else ROOT
            assert (folder / name).exists(), f"{page.name}: {name} in the tree"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_exist(page: Path) -> None:
    sections = "|".join(Experiment.model_fields)
    for line in code_lines(page):
        for key in re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z_.]+(?![\w*/.(<-])", line):
            is_file = key.rpartition(".")[2] in ("py", "txt", "model")
            if not is_file and not key.startswith("model.megatron_core."):
                assert schema_key(key) is not None, f"{page.name}: {key}"


def test_every_room_stands_in_the_tree() -> None:
    rooms = {
        path.name for path in (ROOT / "megatron_moe").iterdir() if path.is_dir() and list(path.glob("*.py"))
    }
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rooms <= set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))


def test_metrics_are_those_that_a_run_writes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    (written,) = ranks(1).run(written_keys, tmp_path)
    # One rank sends no tokens: see training/test_exchange_overlap.py.
    of_several_ranks = {"moe/communication_ms", "moe/exposed_communication_ms", "moe/shadowed_experts"}
    assert documented == written | of_several_ranks
