"""The pages in docs/ build without a warning, and say what is true: every block of commands is run as it is written, in
the order of the pages, or says on the page that it is not; what is shown of its output is what came out; and every
command and setting in the pages and the README exists.

How a page says it: a fenced block is ```bash, ```python, ```text (what the block above it printed, "…" for anything,
figures that depend on time and machine left free) or, below a paragraph that ends with a name like "`tasks.toml`:", a
file's content. The paragraph above a block may be "*Not run in CI: REASON.*" or "*Ends with exit code 75.*".
"""

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

from brainscale.cli import app
from brainscale.config import Config
from brainscale.settings import load

DOCS = ROOT / "docs"
TREE = ("README.md", "brainscale", "configs", "data_prep", "docs", "kernels", "slurm")
"""What a reader finds in the checkout."""
NOT_RUN = re.compile(r"\*Not run in CI(?: as written)?: (.{10,})\.\*")
EXIT_CODE = re.compile(r"\*Ends with exit code (\d+)\.\*")
FILE = re.compile(r"`([\w/]+\.\w+)`:$")
SCRIPTS = {
    "data_prep/to_zarr.py": "to-zarr", "slurm/to_zarr.sh": "to-zarr", "slurm/evaluate.sh": "evaluate",
    "slurm/pretrain_mae.sh": "pretrain", "slurm/pretrain_jepa.sh": "pretrain",
}  # fmt: skip
"""Other ways to say a command."""
UNIT = r"(?:s|ms|[kMGT]?B|[kMGT]FLOP/s)\b"
FIGURE = re.compile(rf"\d[\d,]*\.\d+(?:e[+-]?\d+)?(?: {UNIT})?|\d+(?=\s?%)|\d[\d,]* {UNIT}")
"""What depends on the machine, the moment or the last bit; other whole numbers are as they are written."""


class Block(NamedTuple):
    """A fenced block of a page. file: what it is written to; not_run: why it is not; code: what it exits with."""

    page: str
    line: int
    language: str
    text: str
    file: str
    not_run: str
    code: int

    @property
    def where(self) -> str:
        return f"docs/{self.page}.md, line {self.line}"


def pages() -> list[str]:
    """The names in the index's table of contents, in order, the index first."""
    toctree = re.search(r"```\{toctree\}\n(?::.*\n)*\n?((?:.+\n)+)```", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert toctree, "docs/index.md has no table of contents"
    return ["index", *re.findall(r"(?:<|^)([\w-]+)>?$", toctree[1], re.M)]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    tokens = MarkdownIt().parse((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    found, above = [], ""
    for token in tokens:
        if token.type == "fence" and not token.info.startswith("{"):
            says = (NOT_RUN.fullmatch(above), EXIT_CODE.fullmatch(above), FILE.search(above))
            not_run, code, file = (match[1] if match else "" for match in says)
            file = "" if token.info in ("bash", "python") else file
            line = (token.map or [0])[0] + 1
            found.append(Block(page, line, token.info, token.content, file, not_run, int(code or 0)))
        if token.type == "inline":
            above = token.content
        elif token.type == "fence":
            above = ""
    return found


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours in lines of shell, the program's own left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not any(name in line.split() for name in ("brainscale", *SCRIPTS)):
            continue
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not word or set(word) - set("&|;()<>"):
                command.append(word)
            else:
                found += words_of(command)
                command = []
    return found


def words_of(command: list[str]) -> list[list[str]]:
    """What follows the program in a command, if it is ours."""
    for at, word in enumerate(command):
        if word in SCRIPTS:
            return [[SCRIPTS[word], *command[at + 1 :]]]
        if word == "brainscale" and command[at - 1 : at] in ([], ["-m"]):
            return [command[at + 1 :]]
    return []


def shell_texts() -> dict[str, str]:
    """Where → lines of shell, of the pages and of the README, whose blocks of shell have no language."""
    texts = {block.where: block.text for page in pages() for block in blocks(page) if block.language == "bash"}
    readme = MarkdownIt().parse((ROOT / "README.md").read_text(encoding="utf-8"))
    for token in readme:
        if token.type == "fence" and not token.info:
            texts[f"README.md, line {(token.map or [0])[0] + 1}"] = token.content
    return texts


def test_every_block_is_run_or_says_why_not():
    for page in pages():
        before = None
        for block in blocks(page):
            assert block.language in {"bash", "python", "text"} or block.file or block.not_run, (
                f"{block.where}: a {block.language or 'plain'} block that is neither run, a file's nor marked"
            )
            assert block.language != "bash" or not re.search(r"^\s*\$ ", block.text, re.M), f"{block.where}: a prompt"
            if block.language == "text" and not block.not_run:
                assert before and before.language in {"bash", "python"} and not before.not_run, (
                    f"{block.where}: output of a block that is not run"
                )
            before = before if block.language == "text" else block


def test_every_page_is_in_the_contents():
    assert set(pages()) == {path.stem for path in DOCS.glob("*.md")}


def test_every_command_is_on_a_page():
    text = " ".join(" ".join((DOCS / f"{page}.md").read_text(encoding="utf-8").split()) for page in pages())
    names = {" ".join(name) for name in command_names(app)} - {"to-zarr"}
    assert {"pretrain", "checkpoint verify", "bench kernels"} < names
    assert not {name for name in names if not re.search(rf"\bbrainscale {name}\b", text)}
    assert "python data_prep/to_zarr.py" in text  # as which to-zarr is called


def command_names(parent, prefix=()):
    """Every command that can be called, as its words."""
    for name in parent:
        if name.startswith("-"):
            continue
        inner = list(command_names(parent[name], (*prefix, name)))
        yield from inner or [(*prefix, name)]


def test_every_command_in_the_pages_and_the_readme_is_understood():
    """Commands, options and settings exist, and configurations lie where they are said to."""
    seen = 0
    for where, text in shell_texts().items():
        for words in commands(text):
            seen += 1
            command, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
            values = bound.arguments
            assert callable(command), f"{where}: {words}"
            if "CONFIG" not in words and values.get("overrides") and isinstance(values.get("config"), Path):
                plain = [re.sub(r"=([^\[\]\"',]+),.*", r"=\1", value) for value in values["overrides"]]  # of a sweep
                load(Config, ROOT / values["config"], tuple(plain))
            for path in filter(None, (values.get("config"), values.get("tasks"), values.get("prep"))):
                assert (ROOT / path).exists() or str(path) == "CONFIG" or f"`{path}`" in page_text(where), (
                    f"{where}: there is no {path}"
                )
    assert seen > 40


def page_text(where: str) -> str:
    """All of the file that a block lies in."""
    return (ROOT / where.split(",")[0]).read_text(encoding="utf-8")


def test_links_resolve():
    """Files; places within them are for the build to find."""
    for page in pages():
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (DOCS / f"{page}.md").read_text(encoding="utf-8")):
            assert (DOCS / link).exists(), f"docs/{page}.md links to {link}"
    for link in re.findall(r"\]\((docs/[^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / link.split("#")[0]).exists(), f"README.md links to {link}"


class Loads(HTMLParser):
    """What a page loads, besides where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"script": "src", "img": "src", "link": "href", "iframe": "src"}.get(tag)
        self.found += [value for name, value in attrs if name == wanted and value]


@pytest.mark.slow
def test_pages_build_without_a_warning_and_load_nothing_from_elsewhere(tmp_path: Path):
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run(
        [sys.executable, *command, DOCS, tmp_path / "html"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for page in pages():
        loads = Loads()
        loads.feed((tmp_path / "html" / f"{page}.html").read_text(encoding="utf-8"))
        assert len(loads.found) > 3
        for address in loads.found:
            assert not re.match(r"(?:https?:)?//", address), f"{page} loads {address}"
            assert (tmp_path / "html" / re.split(r"[?#]", address)[0]).exists(), f"{page} loads {address}"


class Reader:
    """Someone who goes through the pages in order, in a fresh checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ahead, self.reading = folder, pages(), ""
        for name in TREE:
            (folder / name).symlink_to(ROOT / name)
        bin_folder = str(Path(sys.executable).parent)
        self.environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}

    def read(self, page: str) -> None:
        """Do what the pages say up to the end of this one."""
        if self.reading:
            pytest.fail(f"not reached: docs/{self.reading}.md failed", pytrace=False)
        while page in self.ahead:
            self.reading, printed = self.ahead.pop(0), ""
            for block in blocks(self.reading):
                if block.not_run:
                    continue
                if block.file:
                    (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / block.file).write_text(block.text, encoding="utf-8")
                elif block.language == "text":
                    compare(block, printed)
                else:
                    printed = self.run(block)
            self.reading = ""

    def run(self, block: Block) -> str:
        """Run a block; what it printed."""
        program = ("bash", "-e", "-o", "pipefail") if block.language == "bash" else (sys.executable,)
        done = subprocess.run(
            [*program, "-c", block.text], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=self.folder, env=self.environment, timeout=500, check=False,
        )  # fmt: skip
        printed = done.stdout
        assert done.returncode == block.code, f"{block.where}: exit code {done.returncode}\n{printed[-3000:]}"
        assert block.language == "python" or "Traceback" not in printed, f"{block.where}\n{printed[-3000:]}"
        return printed


def compare(block: Block, printed: str) -> None:
    """Every line of the block was printed, in this order."""
    lines = [plain(line) for line in printed.splitlines()]
    at = 0
    for line in filter(None, map(str.strip, block.text.splitlines())):
        if line == "…":
            continue
        pattern = re.compile(".*".join(re.escape(plain(part)) for part in line.split("…")))
        here = next((i for i in range(at, len(lines)) if pattern.fullmatch(lines[i])), None)
        assert here is not None, f"{block.where}: {line!r} was not printed\n{printed[-3000:]}"
        at = here + 1


def plain(line: str) -> str:
    """A line without what differs from one run to the next: figures, bars, spaces."""
    return " ".join(FIGURE.sub("0.0", line).replace("█", " ").split())


def test_a_shown_output_that_is_not_what_was_printed_is_told():
    block = Block("a", 1, "text", "took 3.1 s\n…\n 12 of 12 …, 4 %\n", "", "", 0)
    compare(block, "first\ntook 4.25 s\n\nmore\n12 of 12 done, 5 %\n")
    for other in ("took 4 s\n12 of 13 done, 5 %\n", "12 of 12 done, 5 %\ntook 4.25 s\n", "took 4.25 s\n"):
        with pytest.raises(AssertionError, match="was not printed"):
            compare(block, other)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.slow
@pytest.mark.parametrize("page", pages())
def test_a_page_can_be_followed_as_it_is_written(reader: Reader, page: str):
    reader.read(page)
