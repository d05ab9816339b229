"""The kernel stays small enough to be read, and no file or function outgrows its cap."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import sizes

_PACKAGE = Path(__file__).resolve().parents[2] / "hf_lipschitz"

_COUNTED = [
    ("", 0),
    ('"""Module docstring\nof two lines."""\n\n# a comment\nx = 1  # beside code\n', 1),
    ('def f():\n    """Docstring."""\n    return (\n        1,\n    )\n', 4),
    ('class A:\n    """Docstring."""\n\n    text = """no\n    docstring"""\n', 3),
    ("x = [\n\n    1,\n    # why\n    2,\n]\n", 4),
]


@pytest.mark.parametrize(("text", "lines"), _COUNTED)
def test_code_lines(text: str, lines: int) -> None:
    assert sizes.code_lines(text) == lines


def test_the_kernel_is_within_its_budget() -> None:
    found = sizes.over_kernel_budget(_PACKAGE)
    assert not found, "\n".join(found)


def test_files_and_functions_are_within_their_caps() -> None:
    found = sizes.over_house_caps(_PACKAGE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({f"bounds/a{i}.py": "x = 1\n" * 231 for i in range(5)}, "kernel core: 1155 code lines"),
        ({f"bounds/rules/a{i}.py": "x = 1\n" * 201 for i in range(9)}, "kernel rules: 1809 code lines"),
        ({"bounds/a.py": "# a comment\n" * 301}, "a.py: 301 lines (cap 300 in the kernel)"),
        ({"bounds/a.py": "x = 1\ny = " + "1" * 120}, "a.py:2: 124 characters"),
        ({"nn/a.py": "x = 1\n" * 401}, "nn/a.py: 401 lines (cap 400)"),
        ({"nn/a.py": "class A:\n    def f(self):\n" + "        pass\n" * 60}, "nn/a.py:2: f has 61 lines"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = sizes.over_kernel_budget(tmp_path) + sizes.over_house_caps(tmp_path)
    assert len(found) == 1
    assert message in found[0]


def test_what_just_fits_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "bounds" / "rules").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "bounds" / f"a{i}.py").write_text("x = 1\n" * 250)
        (tmp_path / "bounds" / "rules" / f"a{i}.py").write_text("x = 1\n" * 250)
    (tmp_path / "a.py").write_text("def f():\n" + "    pass\n" * 59 + "x = 1\n" * 340)
    assert sizes.over_kernel_budget(tmp_path) + sizes.over_house_caps(tmp_path) == []
