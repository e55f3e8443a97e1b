"""Every code block of README and docs, run as a reader would, in a process of its own.

    python   as a script: each block is a whole program. `make test-frameworks` runs those that
             import a library which is not installed here.
    bash     in a folder where train.py is docs/examples/train.py, small and with few steps.
             `make` only shows what it would do: CI runs its targets.
    text     the output of the block before it: that one must print these lines, in which a version
             or a number with a point or an exponent stands for any such.
    toml     is parsed.

A block that cannot run here says why, on the line before it, and must still parse:

    <!-- not run in CI: it needs a GPU -->
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import ROOT, needs_library, run_forked

import lpln_autopatch
from lpln_autopatch._torch_compat import TORCH_VERSION

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = Path(sys.executable).parent
COMMAND = re.compile(r"^(?:\w+=\S*\s+)*([\w./-]+)", re.MULTILINE)  # behind its variables
BLOCK = re.compile(
    r"(?:^<!-- not run in CI: (?P<reason>(?:(?!-->).)+) -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TRAIN = f"""
import runpy, sys
sys.argv += "--steps 6 --layers 1 --context 32".split()
runpy.run_path({str(ROOT / "docs" / "examples" / "train.py")!r}, run_name="__main__")
"""


@dataclasses.dataclass
class Block:
    """A block, the line on which its code begins, and the text blocks that follow it."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None
    outputs: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page; a text block that follows another in its section belongs to that."""
    text, blocks, end = page.read_text(), [], 0
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        block = Block(page, line, match["language"], match["code"], match["reason"])
        follows = blocks and "\n#" not in text[end : match.start()]
        if block.language == "text" and block.reason is None and follows:
            blocks[-1].outputs.append(block.code)
        else:
            blocks.append(block)
        end = match.end()
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def run(command: list[str], folder: Path) -> str:
    """Run the command, which must succeed; return its output on stdout and stderr."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LPLN_", "AUTOWRAPT"))}
    environment |= {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "MAKEFLAGS": "n"}
    result = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        cwd=folder,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def libraries_of(block: Block) -> set[str]:
    """Return the names of the libraries that the block needs."""
    if block.language == "bash":
        return {"accelerate"} & programs_of(block)
    if block.language != "python":
        return set()
    nodes = list(ast.walk(ast.parse(block.code)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    libraries = {name.split(".")[0] for name in names}
    # transformers' Trainer imports accelerate when it is made.
    return libraries | ({"accelerate"} if "transformers" in libraries else set())


def programs_of(block: Block) -> set[str]:
    """The programs that a bash block runs."""
    return set(COMMAND.findall(block.code.replace("\\\n", " ")))


def run_python_block(block: Block, folder: Path) -> str:
    script = folder / f"{block.page.stem}_{block.line}.py"
    script.write_text("\n" * (block.line - 1) + block.code)  # a traceback gives the page's lines
    result = run_forked(str(script), check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


def run_bash_block(block: Block, folder: Path) -> str:
    programs = programs_of(block)
    unknown = programs - {"python", "lpln", "torchrun", "accelerate", "make"}
    assert not unknown, f"CI cannot run {', '.join(unknown)}: mark the block with the reason"
    if programs == {"make"}:
        return run(["bash", "-euo", "pipefail", "-c", block.code], ROOT)
    if TORCH_VERSION < (2, 5):
        pytest.skip("before torch 2.5 nothing reads LPLN_PRECISION by itself; CI has later ones")
    (folder / "train.py").write_text(TRAIN)
    return run(["bash", "-euo", "pipefail", "-c", block.code], folder)


def parse_toml(block: Block, folder: Path) -> str:
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11, which CI has")
    tomllib.loads(block.code)
    return ""


RUN = {"python": run_python_block, "bash": run_bash_block, "toml": parse_toml}


def words(text: str) -> str:
    """The text without what varies from machine to machine: spaces, versions, measured numbers."""
    return " ".join(re.sub(r"\b\d+(\.\d[\w.+-]*|e-?\d+)", "#", text).split())


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b, id=str(b), marks=[] if b.reason else needs_library(*libraries_of(b)))
        for b in BLOCKS
    ],
)
def test_block_runs_and_prints_what_follows_it(block, tmp_path):
    """A code block succeeds, and what the page gives as its output is what it prints."""
    if block.reason is not None:
        if block.language == "python":
            compile(block.code, str(block), "exec")
        elif block.language == "bash":
            run(["bash", "-n", "-c", block.code], tmp_path)
        return
    assert block.language in RUN, f"no rule for {block.language!r}; the rules are in {__file__}"
    printed = RUN[block.language](block, tmp_path)
    for output in block.outputs:
        assert words(output), "an output that shows nothing"
        assert words(output) in words(printed), printed


def test_every_fence_is_a_block_that_was_found():
    """No block hides from these tests in a list, or behind another kind of fence."""
    assert len(BLOCKS) > 15
    for page in PAGES:
        fences = [line for line in page.read_text().splitlines() if re.match(r"\s*(```|~~~)", line)]
        found = sum(1 + len(block.outputs) for block in blocks_of(page))
        assert len(fences) == 2 * found, page


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert 0\n```\n",
        "```bash\ngit status\n```\n",
        "```text\nof no block\n```\n",
        *(
            f"```python\nprint({printed!r})\n```\n```text\n{shown}```\n"
            for printed, shown in [
                ("no", "yes\n"),
                ("no", ""),
                ("torch.float32", "torch.bfloat16\n"),
                ("torch.float32", "torch.float16\n"),
                ("exit status 1", "exit status 0\n"),
                ("0 of 2", "2 of 2\n"),
            ]
        ),
    ],
)
def test_a_wrong_block_fails(tmp_path, text):
    """These tests can fail: a block that raises, an unknown program, an output that is not so."""
    page = tmp_path / "page.md"
    page.write_text(text)
    (block,) = blocks_of(page)
    with pytest.raises(AssertionError):
        test_block_runs_and_prints_what_follows_it(block, tmp_path)


def test_a_version_and_a_measured_number_stand_for_any(tmp_path):
    """Words that vary from machine to machine do not fail a block that is right."""
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint('torch 2.15.0.dev1+cu130, 7e-09 0.0018 (256, 8)')\n```\n"
        "```text\ntorch 2.13.0+cpu, 2.2e-07 0.0017 (256, 8)\n```\n"
    )
    (block,) = blocks_of(page)
    test_block_runs_and_prints_what_follows_it(block, tmp_path)


def test_readme_names_the_blocks_that_are_not_run():
    """Each block that is only parsed is of a kind that the README names, and each kind has one."""
    readme = (ROOT / "README.md").read_text()
    (sentence,) = re.findall(r"only\s+parses blocks with ([^;]+);", readme)
    kinds = re.findall(r"`([^`]+)`", sentence)
    parsed = [block for block in BLOCKS if block.reason is not None]
    for block in parsed:
        assert any(kind in block.code for kind in kinds), str(block)
    for kind in kinds:
        assert any(kind in block.code for block in parsed), kind


def test_readme_is_short():
    """The README has at most 180 lines; docs/ has the rest."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_text_says_where_it_leads(page):
    """No link is called "here", or by the bare name of a file or address."""
    says_nothing = re.compile(r"(click )?here|this( page)?|link|more|how|\S+\.\w+|\S+/\S*", re.I)
    for text in re.findall(r"(?<!!)\[([^]]+)\]\(", page.read_text()):
        assert not says_nothing.fullmatch(text)


def test_figure_can_be_read_on_a_phone():
    """The figure is no wider than its page, and its letters have 10 pixels on 358 of 390."""
    svg = ElementTree.parse(ROOT / "docs" / "how-it-works.svg").getroot()
    width = float(svg.attrib["viewBox"].split()[2])
    assert "height" not in svg.attrib
    assert 358 <= float(svg.attrib["width"]) <= 700
    sizes = re.findall(r"font-size[:=] *\"?(\d+)", ElementTree.tostring(svg, encoding="unicode"))
    assert min(map(float, sizes)) * 358 / width >= 10


def test_map_for_contributors_names_what_there_is():
    """The table in docs/contributing.md has every file and folder of the package, and no other."""
    page = (ROOT / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    names = re.findall(r"`([\w.]+(?:\.py|/))`", "".join(rows))
    package = ROOT / "lpln_autopatch"
    there = [path.name for path in package.glob("*.py")]
    there += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(names) == sorted(there)


def test_map_names_every_test_file():
    """The page for contributors places each file of tests, and names none that is not there."""
    page = (ROOT / "docs" / "contributing.md").read_text()
    there = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", page)) == there


@pytest.mark.parametrize("name", lpln_autopatch.__all__)
def test_docstring_names_every_argument_and_the_result(name):
    """The page of the API is made of docstrings: each says what a name takes and what it gives."""
    public = getattr(lpln_autopatch, name)
    assert public.__doc__
    if not inspect.isfunction(public):
        return
    signature = inspect.signature(public)
    for argument in signature.parameters:
        assert re.search(rf"^ +{argument}: ", public.__doc__, re.MULTILINE), argument
    assert ("Returns:" in public.__doc__) == (signature.return_annotation != "None")
