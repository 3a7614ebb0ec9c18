"""C++ text without what the compiler never sees: comments, blank lines and the width of white space.

Keys of binaries are made of it, so that a comment can be mended without a kernel being built or tuned anew. It follows
the translation phases of the C++20 standard ([lex.phases]) as far as telling comments from code needs them.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""
      (?P<comment> //(?:\\\r?\n|[^\n])* | /\*.*?\*/ )
    | (?P<space> \s+ )
    | (?: u8 | [uUL] )?R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)"       # a raw string: nothing in it is a comment
    | (?: u8 | [uUL] )?"(?: \\. | [^"\\\n] )*"
    | (?: u8 | [uUL] )?'(?: \\. | [^'\\\n] )+'
    | \.?[0-9](?: '?[0-9A-Za-z_] | [eEpP][+-] | \. )*                     # a number, whose ' is no quote
    | \#[ \t]*include[ \t]*<[^>\n]*>                                     # a header's name may hold // and quotes
    | \w+
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


def without_comments(code: str) -> str:
    """``code`` with each comment gone, and white space as one line break where it held one, else as one blank.

    Two texts with the same result compile to the same binary, unless they ask for their line numbers (``__LINE__``).
    A text with a line that is continued inside a mark of a comment (a slash, a backslash and a line break) is returned
    as it is: it compiles, but nobody writes it.
    """
    if re.search(r"[/*]\\\r?\n", code):
        return code
    parts: list[str] = []
    gap = ""  # of the comments and white space since the last token
    for token in _TOKEN.finditer(code):
        if token["comment"]:
            gap = gap or " "
        elif token["space"]:
            gap = "\n" if "\n" in token["space"] else gap or " "
        else:
            parts += (gap if parts else "", token.group())
            gap = ""
    return "".join(parts)
