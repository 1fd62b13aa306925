"""The languages and the module that extracts the functions of each."""

from __future__ import annotations

from types import ModuleType

from . import d, go, js, lua, perl, php, python, ruby, rust

SYNTAX: dict[str, ModuleType] = {
    "lua": lua,
    "perl": perl,
    "ruby": ruby,
    "php": php,
    "js": js,
    "go": go,
    "rust": rust,
    "d": d,
    "python": python,
}
SHIPPED = ("lua", "perl", "ruby")
