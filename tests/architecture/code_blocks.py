"""Finds the code blocks of the documentation and checks what they ask a reader to type.

Python blocks are run by test_readme.py. Command lines are not run but read: the program, the make target, the
subcommand, the option and the extra that they name must exist.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

PYTHON = {"python", "py"}
COMMANDS = {"bash", "sh", "console"}
# Blocks that nobody types: shown output, formulas, file listings, citations, and data (json and yaml must parse).
SHOWN = {"text", "json", "yaml", "bibtex", "math"}


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, the first word after its fence, and what is in it."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def blocks(path: Path) -> list[Block]:
    """The fenced code blocks of a Markdown file, in order; a block's line is that of its first line of code."""
    fences = (token for token in MarkdownIt("commonmark").parse(path.read_text()) if token.type == "fence")
    return [
        Block(path, (fence.map or [0])[0] + 2, (fence.info.split() or [""])[0].lower(), fence.content)
        for fence in fences
    ]


def command_lines(block: Block) -> Iterator[tuple[int, str]]:
    """The commands of a block with their lines: of a console block, what stands after "$ "; no comments."""
    number, waiting = block.line, ""
    for offset, raw in enumerate(block.text.splitlines()):
        line = raw.strip()
        if block.language == "console" and not waiting:
            line = line.removeprefix("$ ") if line.startswith("$ ") else ""
        if not waiting:
            number = block.line + offset
        waiting += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if waiting and not waiting.startswith("#"):
            yield number, waiting
        waiting = ""


class Reader:
    """Knows what there is to type: make's targets, the command line's subcommands and options, and pip's extras."""

    def __init__(self, root: Path, command_line: Any) -> None:
        """`command_line` is the click-like command behind `hf-lipschitz`."""
        self._root = root
        self._command_line = command_line
        self._targets = set(re.findall(r"^([a-z][a-z-]*):", (root / "Makefile").read_text(), re.MULTILINE))
        self._project = tomllib.loads((root / "pyproject.toml").read_text())["project"]

    def objections(self, line: str) -> list[str]:
        """What is wrong with a command line, if anything."""
        found = []
        for command in re.split(r"&&|\|\||;|\|", line):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value before the program
                words = words[1:]
            if words:
                found += self._objections_to(words[0], words[1:])
        return found

    def _objections_to(self, program: str, words: list[str]) -> list[str]:
        if program in {"cd", "ls", "cat"}:
            return []
        if "/" in program and (self._root / program).is_file() and not program.startswith(".venv/"):
            return []
        if program == "git":
            return [] if words[:1] == ["clone"] else [f"git {' '.join(words)} is not for readers"]
        if program == "make":
            return [f"no make target {word!r}" for word in words if word not in self._targets and "=" not in word]
        if program == "pip" or words[:2] == ["-m", "pip"]:
            return self._pip([word for word in words if word not in {"-m", "pip"}])
        if program in {"python", ".venv/bin/python"}:
            return self._python(words)
        if program in {"hf-lipschitz", ".venv/bin/hf-lipschitz"}:
            return self._subcommand(words)
        return [f"no rule knows the program {program!r}"]

    def _python(self, words: list[str]) -> list[str]:
        if words[:2] == ["-m", "pytest"]:
            return [f"no path {word}" for word in words[2:] if "/" in word and not (self._root / word).exists()]
        scripts = [word for word in words if word.endswith(".py")][:1]
        return [f"no script {word}" for word in scripts or ["at all"] if not (self._root / word).exists()]

    def _pip(self, words: list[str]) -> list[str]:
        found = [] if words[:1] == ["install"] else [f"pip {' '.join(words)} is not for readers"]
        for word in words[1:]:
            match = re.fullmatch(r"(\.|[A-Za-z0-9_.-]+)(?:\[([a-z,]+)\])?(?:[<>=!~].*)?", word)
            if word.startswith("-"):
                continue
            if match is None or match[1] not in {".", self._project["name"]}:
                found.append(f"pip install {word}: not this project")
            elif match[2]:
                extras = set(match[2].split(",")) - set(self._project["optional-dependencies"])
                found += [f"no extra {extra!r}" for extra in sorted(extras)]
        return found

    def _subcommand(self, words: list[str]) -> list[str]:
        command = self._command_line
        while words and not words[0].startswith("-") and getattr(command, "commands", None) is not None:
            if words[0] not in command.commands:
                return [f"no subcommand {words[0]!r}"]
            command, words = command.commands[words[0]], words[1:]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        overrides = (command.context_settings or {}).get("ignore_unknown_options", False)  # --data.path of a recipe
        used = {word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)} - {"--help"}
        return [
            f"{command.name}: no option {word}" for word in sorted(used - options) if not (overrides and "." in word)
        ]
