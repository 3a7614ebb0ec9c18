"""Comments, docstrings and documents name files, modules, names and headings; every one of them has to exist.

A changelog and a log of experiments speak of what was, so only their links are followed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("generator", "python", "templates", "tests", "examples", "docs", "tuning_db", "build", ".ci")
PAGES_AT_THE_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "mkdocs.yml")
SUFFIXES = {".py", ".cuh", ".jinja", ".md", ".h", ".cpp", ".cu"}
OF_THE_PAST = {"CHANGELOG.md", "docs/performance-log.md"}
"""Pages that may name files and functions that no longer exist."""
PACKAGES = {"srelu24_gen": ROOT / "generator" / "srelu24_gen", "srelu24": ROOT / "python" / "srelu24"}

_FILE = re.compile(r"(?<![\w/.$:~-])((?:[\w<>*.-]+/)*[\w<>*-]+\.(?:py|cuh|md|cu\.jinja))\b(?!\.\w)(?:::(\w+))?")
_MEASUREMENT = re.compile(r"(?<![\w/.])(docs/[\w/<>*.-]+\.(?:json|svg))\b")
_ROLE = re.compile(r":(?:mod|func|class|data|attr|meth|exc):`~?([\w.]+)`")
_DOTTED = re.compile(r"(?<![\w.@/:-])(srelu24(?:_gen)?(?:\.[A-Za-z_]\w*)+)\b(?!\.\w)(?![/*-])")
_CODE = re.compile(r"``?([A-Za-z_]\w*)\.([A-Za-z_]\w*)(?:\([^`]*\))?``?")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_SECTION = re.compile(r"([\w/.-]+\.md)[`)\]]*,\s+\"([^\"]+)\"")
_FENCE = re.compile(r"^(?:```[\s\S]*?^```|(?: {4}.*\n)+)", re.MULTILINE)


class Text(NamedTuple):
    """Prose of a file: a comment, a docstring, or a whole page."""

    path: str
    line: int
    text: str


# ------------------------------------------------------------------------------------------------ what there is


@functools.cache
def files() -> frozenset[str]:
    """Every file of the checkout that is written by hand or shipped, relative to its root."""
    listed = {name for name in (*PAGES_AT_THE_TOP, "constraints.txt") if (ROOT / name).exists()}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            built = parts[0] == "build" and path.suffix != ".md"
            if path.is_file() and not built and "__pycache__" not in parts:
                listed.add(path.relative_to(ROOT).as_posix())
    return frozenset(listed)


def found(name: str, source: str) -> list[str]:
    """The files that ``name`` can mean in ``source``: a path, or the end of one."""
    pattern = re.sub(r"<[^>]*>", "*", name)
    beside = (Path(source).parent / name).as_posix()
    near = Path(*[part for part in Path(beside).parts if part != "."])
    resolved = (ROOT / near).resolve()
    if resolved.is_file() and resolved.is_relative_to(ROOT):
        return [resolved.relative_to(ROOT).as_posix()]
    if "*" in pattern:
        return [path for path in files() if fnmatch(path, pattern) or fnmatch(path, f"*/{pattern}")]
    return [path for path in files() if path == name or path.endswith(f"/{name}")]


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """What a source file defines: in Python also methods and fields, ``Class.method`` and plain ``method``."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".py"):
        return frozenset(re.findall(r"\w+", text))
    names: set[str] = set()

    def add(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            new: list[str] = []
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                new = [child.name]
            elif isinstance(child, ast.Assign):
                new = [leaf.id for target in child.targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                new = [child.target.id]
            elif isinstance(child, ast.Import | ast.ImportFrom):
                new = [(alias.asname or alias.name).split(".")[0] for alias in child.names]
            names.update(new)
            names.update(f"{owner}{name}" for name in new if owner)
            if isinstance(child, ast.ClassDef):
                add(child, f"{child.name}.")
            elif isinstance(child, ast.If | ast.Try | ast.With):
                add(child, owner)
            elif isinstance(child, ast.FunctionDef) and owner:  # fields that a constructor sets
                for leaf in ast.walk(child):
                    if isinstance(leaf, ast.Attribute) and isinstance(leaf.ctx, ast.Store):
                        names.update((leaf.attr, f"{owner}{leaf.attr}"))

    add(ast.parse(text), "")
    return frozenset(names)


@functools.cache
def public_names() -> frozenset[str]:
    """What ``import srelu24`` gives, by name and without importing it."""
    tree = ast.parse((PACKAGES["srelu24"] / "__init__.py").read_text(encoding="utf-8"))
    homes = next(n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "_HOME")
    return frozenset(ast.literal_eval(homes))


@functools.cache
def resolves(dotted: str) -> bool:
    """Whether ``srelu24.room.module.Class.method`` exists, or is a public name of ``srelu24``."""
    package, *rest = dotted.split(".")
    folder = PACKAGES[package]
    for index, part in enumerate(rest):
        if (folder / part).is_dir():
            folder /= part
            continue
        module = folder / f"{part}.py"
        if module.exists():
            left = rest[index + 1 :]
        else:
            module, left = folder / "__init__.py", rest[index:]
            if package == "srelu24" and index == 0 and part in public_names():
                return len(left) == 1 or _member_of_public(left)
        return not left or ".".join(left[:2]) in names_in(module.relative_to(ROOT).as_posix())
    return True


def _member_of_public(names: list[str]) -> bool:
    return any(".".join(names[:2]) in names_in(path) for path in files() if path.startswith("python/srelu24/"))


@functools.cache
def headings(path: str) -> dict[str, str]:
    """Anchor to title of a page, as the site makes them."""
    text = _FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    titles = [re.sub(r"[`*]", "", title).strip() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()): title for title in titles}


# --------------------------------------------------------------------------------------------- what is written


def _of_python(path: str, text: str) -> Iterator[Text]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Text(path, token.start[0], token.string)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Text(path, node.lineno, node.value.value)


def _of_cpp(path: str, text: str) -> Iterator[Text]:
    for comment in re.finditer(r"(?:^[ \t]*//[^\n]*\n)+|//[^\n]*|/\*.*?\*/|\{#.*?#\}", text, re.DOTALL | re.MULTILINE):
        yield Text(path, text.count("\n", 0, comment.start()) + 1, re.sub(r"\n\s*//", "\n", comment[0]))


@functools.cache
def texts() -> list[Text]:
    """All prose of the checkout."""
    found_texts: list[Text] = []
    for path in sorted(files()):
        if Path(path).suffix not in SUFFIXES or path == Path(__file__).relative_to(ROOT).as_posix():
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".md"):
            found_texts.append(Text(path, 1, text))
        else:
            found_texts.extend(_of_python(path, text) if path.endswith(".py") else _of_cpp(path, text))
    return found_texts


def _at(source: Text, match: re.Match[str], what: str) -> str:
    return f"{source.path}:{source.line + source.text.count(chr(10), 0, match.start())}: {what}"


# -------------------------------------------------------------------------------------------- what has no target


def missing_files(source: Text) -> Iterator[str]:
    """Files that do not exist, and ``file::name`` that the file does not define."""
    for match in _FILE.finditer(source.text):
        name, inner = match[1], match[2]
        candidates = found(name, source.path)
        if not candidates:
            yield _at(source, match, f"no file {name}")
        elif inner and not any(inner in names_in(path) for path in candidates):
            yield _at(source, match, f"{name} defines no {inner}")
    for match in _MEASUREMENT.finditer(source.text):
        if not found(match[1], source.path):
            yield _at(source, match, f"no file {match[1]}")


def missing_names(source: Text) -> Iterator[str]:
    """Roles, dotted names of our packages, and ```module.name`` whose module does not define it."""
    for match in _ROLE.finditer(source.text):
        if not _role_resolves(match[1], source.path):
            yield _at(source, match, f"no {match[1]}")
    for match in _DOTTED.finditer(source.text):
        if not resolves(match[1]):
            yield _at(source, match, f"no {match[1]}")
    for match in _CODE.finditer(source.text):
        stem, name = match[1], match[2]
        modules = [
            path for path in files() if path.endswith(f"/{stem}.py") and path.startswith(("python", "generator"))
        ]
        if (
            modules
            and stem not in VARIABLES
            and name not in ENDINGS
            and not any(name in names_in(path) for path in modules)
        ):
            yield _at(source, match, f"no {stem}.{name}")


VARIABLES = {"model", "recipe", "metrics", "reference", "target", "results", "machine"}
"""Names of modules that examples give to variables too: ``model.to()`` is no function of a module."""
ENDINGS = {"py", "cuh", "md", "json", "sqlite", "zip", "svg"}
"""``tuning.json`` is a file, not a name in a module."""


def _role_resolves(name: str, source: str) -> bool:
    package, _, rest = name.partition(".")
    if package in PACKAGES:
        return not rest or resolves(name)
    own = names_in(source)
    if name in own or (package in own and rest and _imported(source, package, rest)):
        return True
    return bool(rest) and package not in own and importlib.util.find_spec(package) is not None


def _imported(source: str, name: str, rest: str) -> bool:
    """Whether ``name``, which ``source`` defines or imports, has ``rest``."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return resolves(f"{node.module}.{alias.name}.{rest}")
        if isinstance(node, ast.Import) and any((alias.asname or alias.name) == name for alias in node.names):
            return True
    return f"{name}.{rest}" in names_in(source)


def missing_headings(source: Text) -> Iterator[str]:
    """Links and quoted titles of sections that lead nowhere."""
    for match in _LINK.finditer(_FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), source.text)):
        if not source.path.endswith(".md") or "://" in match[1]:
            continue
        page, _, anchor = match[1].partition("#")
        target = (ROOT / source.path).parent / page if page else ROOT / source.path
        if not target.exists():
            yield _at(source, match, f"no page {page}")
        elif anchor and anchor not in headings(target.resolve().relative_to(ROOT).as_posix()):
            yield _at(source, match, f"no heading #{anchor} in {page or 'this page'}")
    for match in _SECTION.finditer(source.text):
        title = " ".join(match[2].split())
        pages = found(match[1], source.path)
        if pages and not any(title in headings(page).values() for page in pages):
            yield _at(source, match, f'{match[1]} has no section "{title}"')


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_what_is_named_exists(folder: str) -> None:
    faults = []
    for source in texts():
        if (source.path.split("/")[0] if "/" in source.path else ".") != folder:
            continue
        if source.path not in OF_THE_PAST:
            faults += [*missing_files(source), *missing_names(source)]
        faults += missing_headings(source)
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see `templates/include/srelu24/sm80/launch_sm80.cuh`", "no file"),
        ("as packed by srelu24/launch_of_old.py: keep in step", "no file"),
        ("`work.cuh::no_such_function`", "defines no"),
        (":func:`srelu24.runtime.launch.no_such_function`", "no srelu24.runtime"),
        (":class:`NoSuchClass`", "no NoSuchClass"),
        ("`bindings.no_such_name`", "no bindings.no_such_name"),
        ("[there](kernels.md#no-such-heading)", "no heading"),
        ('(docs/kernels.md, "No such section")', "no section"),
        ("docs/measurements/no_such_file.json", "no file"),
    ],
)
def test_a_reference_to_nothing_is_found(text: str, fault: str) -> None:
    source = Text("docs/index.md", 1, text)
    by_role = Text("python/srelu24/ops/functions.py", 1, text)
    faults = [*missing_files(source), *missing_headings(source), *missing_names(by_role if ":`" in text else source)]
    assert faults, "the fault was not found"
    assert fault in faults[0]


# ---------------------------------------------------------------------------------------- the tree of the folders


def tree_of(page: str) -> dict[str, str]:
    """Path to description of every line of the first code block that is a tree; folders end with a slash."""
    block = re.search(r"^```text\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert block is not None
    listed: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        name, _, description = line.strip().partition(" ")
        depth = len(line) - len(line.lstrip())
        above = [(indent, folder) for indent, folder in above if indent < depth]
        path = (above[-1][1] if above else "") + name
        assert path not in listed, f"{path} stands twice"
        listed[path] = description.strip()
        if name.endswith("/"):
            above.append((depth, path))
    return listed


def test_the_tree_has_every_module_and_header() -> None:
    listed = tree_of("docs/architecture.md")
    sources = {
        path
        for path in files()
        if path.startswith(("generator/", "python/", "templates/include/"))
        and path.endswith((".py", ".cuh"))
        and not path.endswith("__init__.py")
    }
    named = {path for path in listed if path.endswith((".py", ".cuh"))}
    assert sorted(sources - named) == [], "docs/architecture.md lacks them"
    assert sorted(named - sources) == [], "docs/architecture.md names them, and they do not exist"
    assert all((ROOT / path).is_dir() for path in listed if path.endswith("/"))
    assert all(listed.values()), "a line without a description"
