"""Code without its comments: what looks like a comment inside a literal stays, what is one goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srelu24_gen.paths import templates_dir
from srelu24_gen.plain_code import without_comments

LITERALS = (
    '"a // b"',
    '"/* c */"',
    r'"\" // d"',
    r'"\\"',
    "'\"'",
    r"'\''",
    "'/'",
    'u8"x // y"',
    "L'\"'",
    'R"(a // b /* c */ " \n\n  )"',
    'u8R"mark(x)" // y)mark"',
    "1'000'000",
    "0x1'f.8p-3",
    "FOOR",
    "x",
    "/",
    "*",
    "#include <a//b>",
)
COMMENTS = (
    '// say "no", don\'t /* ',
    "/* one\n two // */",
    "/**/",
    "//",
    '// R"(',
    "// continued \\\n here",
    "/* ' */",
)


@pytest.mark.parametrize("literal", LITERALS)
def test_a_literal_survives(literal: str) -> None:
    assert without_comments(f"a = {literal} ; // b") == f"a = {literal} ;"
    assert without_comments(f"\n\na =\t{literal} /* b\n */ ;\n\n") == f"a = {literal} ;\n".rstrip()


@given(st.lists(st.tuples(st.sampled_from(LITERALS), st.sampled_from(COMMENTS)), max_size=8))
def test_comments_never_change_the_code(pieces: list[tuple[str, str]]) -> None:
    bare = " ;\n".join(literal for literal, _ in pieces)
    noted = " ;\n".join(f"{literal} {comment}" if "*/" in comment else literal for literal, comment in pieces)
    assert without_comments(noted) == without_comments(bare)
    lines = " ;\n\n".join(f"{comment}\n{literal}" for literal, comment in pieces)
    assert without_comments(lines) == without_comments(bare)


@given(st.lists(st.sampled_from((*LITERALS, *COMMENTS)), max_size=8))
def test_it_has_nothing_left_to_take(pieces: list[str]) -> None:
    once = without_comments("\n".join(pieces))
    assert without_comments(once) == once


def test_code_that_differs_stays_different() -> None:
    texts = ["a b", "ab", "a\nb", "a/b", "a//b", '"a  b"', '"a b"', "a+ +b", "a++b", "#define F(x)", "#define F (x)"]
    results = [without_comments(text) for text in texts]
    assert len(set(results)) == len(texts)


def test_an_unfinished_comment_is_left_to_the_compiler() -> None:
    assert without_comments("a; /* b") == "a; /* b"


def test_a_comment_mark_split_by_a_continued_line_is_left_as_it_is() -> None:
    text = 'a /\\\n/ "b /*\n c; /* d */'
    assert without_comments(text) == text


def test_no_header_asks_for_its_line_numbers() -> None:
    for file in templates_dir().rglob("*.*"):
        text = file.read_text()
        assert "__LINE__" not in text, file
        assert "assert(" not in text.replace("static_assert(", ""), f"{file}: assert() holds a line number"
