"""Pages from templates: self-contained HTML in one style, readable without its script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flora_train.config.terminal_text import plain

OF_REPORTS = "flora_train.evaluation.report"
"""The package with the templates, style and script that all pages share."""
SCRIPT = Path(__file__).with_name("report.js")
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def render_page(
    template: str,
    filters: Sequence[Callable[..., Any]],
    *,
    package: str = OF_REPORTS,
    **content: object,
) -> str:
    """The text of a page.

    Args:
        template: File name of the template, which begins with `head.html.j2` and ends with the script.
        filters: Functions that the template may use as filters, under their names.
        package: Where the template is.
        content: What the template shows. All of it is escaped, unless it is Markup.

    Returns:
        HTML that loads nothing.
    """
    loaders = [PackageLoader(name, "") for name in dict.fromkeys((package, OF_REPORTS))]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in filters}
    script = SCRIPT.read_text(encoding="utf-8")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(**content, script=Markup(script), script_hash=digest)
    return plain(page)


def visible(text: str) -> str:
    """A text without blank lines around it, whose control characters can be seen."""
    return text.translate(CONTROL_PICTURES).strip("\n").rstrip()
