"""Writes docs/compatibility.md from the tests: one row for each, its first line of documentation and its name.

python tests/compatibility/page.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
_ON_THE_CPU = (
    *("convert", "kinds", "kept", "huggingface", "state", "hooks", "ambient", "compile", "autograd"),
    *("training_recipe", "recipe_state", "fp8_recipe", "distributed", "serving"),
)
MODULES = (
    *(f"tests/compatibility/test_{name}.py" for name in _ON_THE_CPU),
    "tests/gpu/test_modules.py",
    "tests/gpu/test_recipes.py",
)
HEAD = """# Compatibility

What srelu24 works with: each line says what holds, and which test shows it. All tests run without a GPU, where the
CPU reference stands in for the kernels, except those of `tests/gpu`. This page is written from the tests by
`make docs-page`.

Training is dense PyTorch, with one warning, unless a recipe of [training](training.md) is given.
"""


def page() -> str:
    """The page that the tests call for."""
    return HEAD + "".join(_section(ROOT / module) for module in MODULES)


def _section(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rows = [
        f"| {_first_line(node)} | `{node.name}` |"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    head = f"\n## {_first_line(tree)}\n\n`{path.relative_to(ROOT)}`\n\n| what holds | test |\n| --- | --- |\n"
    return head + "\n".join(rows) + "\n"


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    text = ast.get_docstring(node)
    if not text:
        raise SystemExit(f"{getattr(node, 'name', 'a module')} has no documentation for the page")
    return text.splitlines()[0].replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
