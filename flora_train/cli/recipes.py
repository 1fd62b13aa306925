"""`flora-train recipes`."""

from __future__ import annotations

from flora_train.cli.app import command


@command("")
def recipes() -> None:
    """List the recipes.

    \b
    Example: flora-train recipes
    """
    from flora_train.config.load import shipped
    from flora_train.config.terminal_text import print_plain

    for name, path in sorted(shipped("recipes").items()):
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        print_plain(f"{name:20} {first_line.lstrip('# ')}")
