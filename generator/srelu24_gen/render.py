"""KernelSpec -> RenderedKernel: fills a kernel's template with the names its spec binds.

The Jinja dialect that C++ survives: ``${name}`` for values, ``//% if`` lines for logic, ``//%#`` for
comments that are not rendered. Templates hold no arithmetic; :mod:`srelu24_gen.bindings` has it.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.meta
import jinja2.nodes

from srelu24_gen.bindings import names_for, template_for
from srelu24_gen.errors import RenderError
from srelu24_gen.paths import templates_dir
from srelu24_gen.spec import KernelSpec


@dataclass(frozen=True, slots=True)
class RenderedKernel:
    """CUDA C++ of one kernel."""

    spec: KernelSpec
    template: str
    """Path below ``templates/``."""
    source: str


def render(spec: KernelSpec, templates: Path | None = None) -> RenderedKernel:
    """The source of ``spec``. Equal specs give equal text, on every machine.

    Args:
        templates: another folder of templates than the one that comes with srelu24.

    Raises:
        RenderError: the template is missing, malformed, or uses a name that the spec does not bind.
    """
    template = template_for(spec)
    return RenderedKernel(spec, template, fill(template, names_for(spec), templates or templates_dir()))


def fill(template: str, names: Mapping[str, str | int], templates: Path) -> str:
    """Text of a template with its names filled in.

    Names are checked before rendering, in branches not taken too.

    Raises:
        RenderError: names the template, the line and the variable.
    """
    environment = _environment(templates)
    try:
        _check_names(environment, template, names)
        return environment.get_template(template).render(names)
    except jinja2.TemplateNotFound as error:
        raise RenderError(f"there is no template {error.name} in {templates}") from error
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(f"{error.name or template}, line {error.lineno}: {error.message}") from error
    except UnicodeDecodeError as error:
        raise RenderError(f"{template} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
        raise RenderError(f"{template}, line {_line_of(error, templates)}: {error}") from error


@functools.cache
def _environment(templates: Path) -> jinja2.Environment:
    # The block and comment marks are replaced because "{%" and "{#" may occur in C++.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        variable_start_string="${",
        variable_end_string="}",
        line_statement_prefix="//%",
        line_comment_prefix="//%#",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<%#",
        comment_end_string="#%>",
    )


def _check_names(environment: jinja2.Environment, template: str, names: Mapping[str, str | int]) -> None:
    assert environment.loader is not None
    text, filename, _ = environment.loader.get_source(environment, template)
    tree = environment.parse(text, template, filename)
    unbound = jinja2.meta.find_undeclared_variables(tree) - set(names)
    for use in tree.find_all(jinja2.nodes.Name):  # in the order of the file
        if use.name in unbound:
            bound = ", ".join(sorted(names))
            raise RenderError(
                f"{template}, line {use.lineno}: the variable {use.name!r} is not bound; bound are {bound}"
            )


def _line_of(error: BaseException, templates: Path) -> int | str:
    """Jinja puts the template's own frames into the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).is_relative_to(templates)]
    return lines[-1] or "?" if lines else "?"
