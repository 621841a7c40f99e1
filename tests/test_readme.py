"""README.md is run: every line of its shell blocks, every Python block.

`make ...` lines are left out, since they run these tests. A block after the comment
`<!-- needs a checkpoint -->` is not run: its lines are checked against the verb's own help.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from retinue.cli.verbs import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MARK = "<!-- needs a checkpoint -->"
LIMIT_S = 240


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `line` is where its fence opens."""

    language: str
    line: int
    text: str
    needs_checkpoint: bool

    @property
    def commands(self) -> list[str]:
        """The command lines without remarks; a backslash joins a line with the next."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        bare = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.splitlines()]
        return [line for line in bare if line]


def read_blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order."""
    blocks: list[Block] = []
    inside: list[str] | None = None
    language, opened, before, marked = "", 0, "", False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
            elif line.strip():
                before = line.strip()
        elif inside is None:
            language, opened, inside = line[3:].strip(), number, []
            marked, before = before == MARK, ""
        else:
            blocks.append(Block(language, opened, "\n".join(inside), marked))
            inside = None
    assert inside is None, f"the block that line {opened} opens has no end"
    return blocks


BLOCKS = read_blocks(README.read_text(encoding="utf-8")) if README.is_file() else []
SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def name(block: Block) -> str:
    return f"line-{block.line}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all blocks run, in order, so that one may use what an earlier one wrote."""
    return tmp_path_factory.mktemp("readme")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    output = f"{done.stdout}{done.stderr}"
    assert done.returncode == 0, f"{shlex.join(command)} ended with {done.returncode}\n{output}"
    return done


def test_the_readme_has_examples() -> None:
    assert README.is_file(), "README.md is missing"
    assert SHELL, "README.md has no ```sh block: show how it is installed and used"
    assert PYTHON, "README.md has no ```python block: show the offline API"
    commands = [command for block in SHELL for command in block.commands]
    assert {"make demo", "make test"} <= set(commands), "README.md must show both commands"
    run_here = [c for block in SHELL if not block.needs_checkpoint for c in block.commands]
    assert any(c.startswith("retinue run sample ") for c in run_here), (
        "README.md must show a `retinue run sample` that anyone can repeat"
    )


def test_every_block_has_a_language() -> None:
    known = ("sh", "python", "text", "json", "yaml")
    wrong = [f"line {b.line}: `{b.language}`" for b in BLOCKS if b.language not in known]
    assert not wrong, f"blocks must be one of {known}: {wrong}"


@pytest.mark.parametrize("block", SHELL, ids=name)
def test_shell_block(block: Block, folder: Path) -> None:
    commands = [c for c in block.commands if shlex.split(c)[0] != "make"]
    for command in commands:
        if block.needs_checkpoint:
            check_options(command, folder)
        else:
            run(["bash", "-euo", "pipefail", "-c", command], folder)


def check_options(command: str, folder: Path) -> None:
    """Every option of `retinue VERB ...` must be one that the verb's help names."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables before the command
        words.pop(0)
    assert words[0] == "retinue", f"only lines of `retinue` can need a checkpoint: `{command}`"
    shown = run(["retinue", words[1], "--help"], folder).stdout
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown))
    used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    assert used <= known, f"`{command}` uses {sorted(used - known)}, which the verb does not have"


@pytest.mark.parametrize("block", PYTHON, ids=name)
def test_python_block(block: Block, folder: Path) -> None:
    compile(block.text, f"README.md:{block.line}", "exec")
    if not block.needs_checkpoint:
        run([sys.executable, "-c", block.text], folder)


def commands_of_the_docs() -> list[str]:
    """Every line of `retinue` in a block of docs/, but for the log, which tells of old ones."""
    files = [file for file in sorted((ROOT / "docs").glob("*.md")) if file.name != "LOG.md"]
    blocks = [block for file in files for block in read_blocks(file.read_text(encoding="utf-8"))]
    lines = [line for block in blocks if block.language == "sh" for line in block.commands]
    return [line for line in lines if line.startswith("retinue ")]


@pytest.mark.parametrize("command", commands_of_the_docs())
def test_commands_of_the_docs_are_understood(command: str) -> None:
    build_parser().parse_args(shlex.split(command)[1:])


# --- the reader itself


def test_reads_blocks() -> None:
    text = f"""# Title
```sh
make demo  # sets up
a \\
  --flag 1
```
{MARK}

```sh
# a remark
retinue run FOLDER
```
```python
x = 1
```
"""
    first, second, third = read_blocks(text)
    assert first.commands == ["make demo", "a --flag 1"]
    assert (second.commands, second.needs_checkpoint) == (["retinue run FOLDER"], True)
    assert (third.language, third.line, third.needs_checkpoint) == ("python", 13, False)


def test_unknown_option_is_found(folder: Path) -> None:
    check_options("RETINUE_THREADS=2 retinue run ./FOLDER --memory=4GiB --json", folder)
    with pytest.raises(AssertionError, match="--memry"):
        check_options("retinue run ./FOLDER --memry 4GiB", folder)
