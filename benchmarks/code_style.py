"""Figures about the style of the package's code, now and at an earlier commit.

Usage: python benchmarks/code_style.py [--before COMMIT] [--by-package] [--list KIND] [--save]
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "code_style.md"
PACKAGE = "flora_train"
BEFORE = "5f6c18d"
LINE_LENGTH = 110
POSITIONAL_PARAMETERS = 3
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping"}
TORCH_PROTOCOL = {"state_dict", "load_state_dict"}
"""Methods whose mapping is torch's own convention: they may take and return `dict[str, Any]`."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A module of the package: its path relative to the repository, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def package(self) -> str:
        """The first name below flora_train: a package, or a module loose in the root."""
        return self.path.split("/")[1].removesuffix(".py")

    @property
    def name(self) -> str:
        """The dotted name by which the module is imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def is_loose(self) -> bool:
        return self.path.count("/") == 1


@dataclass(frozen=True)
class Place:
    """Where something was counted."""

    module: Module
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.module.path}:{self.line}: {self.text}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", default=BEFORE, metavar="COMMIT", help=f"the commit to compare with ({BEFORE})"
    )
    parser.add_argument("--by-package", action="store_true", help="figures of each package, as it is now")
    parser.add_argument(
        "--list", choices=sorted(COUNTED), metavar="KIND", help=f"list places: {', '.join(COUNTED)}"
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    now = read_modules(working_tree())
    if options.list:
        print("\n".join(str(place) for place in COUNTED[options.list](now)))
        return
    if options.by_package:
        print(package_table(now))
        return
    before = committed_files(options.before)
    text = comparison_table(options.before, figures(before), figures(working_tree()))
    print(text)
    if options.save:
        RESULT.write_text(f"{text}\n", encoding="utf-8")


def working_tree(root: Path = ROOT) -> dict[str, str]:
    """Text of README.md and of every module of the package, by path."""
    paths = [root / "README.md", *sorted((root / PACKAGE).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def committed_files(commit: str, root: Path = ROOT) -> dict[str, str]:
    """The same files as they were in a commit."""
    command = ["git", "archive", "--format=tar", commit, "README.md", PACKAGE]
    archive = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member)
            if content is not None and member.name.endswith((".py", ".md")):
                files[member.name] = content.read().decode()
    return files


def read_modules(files: dict[str, str]) -> list[Module]:
    """The modules among these files."""
    return [Module(path, text, ast.parse(text)) for path, text in files.items() if path.endswith(".py")]


def walk(modules: Iterable[Module]) -> Iterator[tuple[Module, ast.AST]]:
    for module in modules:
        for node in ast.walk(module.tree):
            yield module, node


def functions(modules: Iterable[Module]) -> Iterator[tuple[Module, Function]]:
    for module, node in walk(modules):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield module, node


def place(module: Module, node: ast.expr | ast.stmt) -> Place:
    return Place(module, node.lineno, module.lines[node.lineno - 1].strip())


def inline_conditionals(modules: Iterable[Module]) -> list[Place]:
    """Conditional expressions, `a if condition else b`."""
    return [place(module, node) for module, node in walk(modules) if isinstance(node, ast.IfExp)]


def nested_comprehensions(modules: Iterable[Module]) -> list[Place]:
    """Comprehensions with more than one `for`, or that contain another comprehension."""
    return [
        place(module, node)
        for module, node in walk(modules)
        if isinstance(node, COMPREHENSIONS) and _loops(node) > 1
    ]


def _loops(node: ast.AST) -> int:
    return sum(isinstance(inner, ast.comprehension) for inner in ast.walk(node))


def question_docstrings(modules: Iterable[Module]) -> list[Place]:
    """Modules whose docstring asks a question in its first paragraph."""
    questions = []
    for module in modules:
        first_paragraph = (ast.get_docstring(module.tree) or "").split("\n\n")[0]
        if "?" in first_paragraph:
            questions.append(Place(module, 1, first_paragraph.splitlines()[0]))
    return questions


def untyped_mappings(modules: Iterable[Module]) -> list[Place]:
    """Annotations with `dict[str, Any]`, `Mapping[str, Any]` and the like, or with plain `dict` or
    `Mapping`."""
    untyped = []
    for module in modules:
        for annotation in _annotations(module.tree):
            if contains_untyped_mapping(annotation):
                untyped.append(place(module, annotation))
    return untyped


def _annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


def _is_untyped_subscript(node: ast.AST) -> bool:
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
        return False
    is_mapping = isinstance(node.value, ast.Name) and node.value.id in MAPPINGS
    values = node.slice.elts[-1]
    return is_mapping and isinstance(values, ast.Name) and values.id == "Any"


def _is_bare_mapping(node: ast.AST, annotations: Iterable[ast.AST]) -> bool:
    if not isinstance(node, ast.Name) or node.id not in MAPPINGS:
        return False
    return not any(isinstance(other, ast.Subscript) and other.value is node for other in annotations)


def contains_untyped_mapping(annotation: ast.expr | None, aliases: frozenset[str] = frozenset()) -> bool:
    """Whether an annotation is, or contains, a mapping whose values have no type; aliases: names that stand
    for one."""
    if annotation is None:
        return False
    nodes = list(ast.walk(annotation))
    named = any(isinstance(node, ast.Name) and node.id in aliases for node in nodes)
    return named or any(_is_untyped_subscript(node) or _is_bare_mapping(node, nodes) for node in nodes)


def mappings_across_borders(modules: Iterable[Module]) -> list[Place]:
    """Public functions, methods and fields with an untyped mapping that another package uses."""
    modules = list(modules)
    imports = {module.name: imported_names(module) for module in modules}
    aliases = untyped_aliases(modules)
    functions_used = used_functions(modules, imports)
    members_used = used_members(modules, imports)
    places = []
    for module in modules:
        imported = {name for name, origin in imports[module.name].items() if origin in aliases}
        defined = {name for owner, name in aliases if owner == module.name}
        for owner, statement in _public_statements(module.tree):
            name = _defined_name(statement)
            if name in TORCH_PROTOCOL or not _mentions_untyped(statement, frozenset(imported | defined)):
                continue
            users = functions_used[module.name, name]
            if owner:
                users = members_used[module.package, name]
            if users - {module.package}:
                places.append(place(module, statement))
    return places


def untyped_aliases(modules: Iterable[Module]) -> set[tuple[str, str]]:
    """(module, name) of aliases of a type with an untyped mapping: `Rows = list[dict[str, Any]]`."""
    aliases = set()
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                target, value = node.target, node.value
            else:
                continue
            is_untyped = any(_is_untyped_subscript(part) for part in ast.walk(value))
            if isinstance(target, ast.Name) and is_untyped:
                aliases.add((module.name, target.id))
    return aliases


def imported_names(module: Module) -> dict[str, tuple[str, str]]:
    """(module, name) of what a module imports from the package, by the name that it has here."""
    names = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            for alias in node.names:
                names[alias.asname or alias.name] = (node.module or "", alias.name)
    return names


def used_functions(
    modules: Iterable[Module], imports: Mapping[str, Mapping[str, tuple[str, str]]]
) -> defaultdict[tuple[str, str], set[str]]:
    """The packages that use a function, by its module and name: `from module import name`, or
    `module.name`."""
    users: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for module in modules:
        imported = imports[module.name]
        for origin in imported.values():
            users[origin].add(module.package)
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in imported
            ):
                users[".".join(imported[node.value.id]), node.attr].add(module.package)
    return users


def used_members(
    modules: Iterable[Module], imports: Mapping[str, Mapping[str, tuple[str, str]]]
) -> defaultdict[tuple[str, str], set[str]]:
    """The packages that read a method or field, by the package that defines it and its name.

    Types are not inferred: an attribute of that name counts where the module imports anything from the
    package.
    """
    users: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for module in modules:
        owners = {origin.split(".")[1] for origin, _ in imports[module.name].values() if "." in origin}
        attributes = {node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
        for owner in owners:
            for attribute in attributes:
                users[owner, attribute].add(module.package)
    return users


def _public_statements(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """(name of the class or "", function or annotated field) of everything public."""
    for node in tree.body:
        if _defined_name(node).startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "", node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                is_member = isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef | ast.AnnAssign)
                if is_member and not _defined_name(member).startswith("_"):
                    yield node.name, member


def _defined_name(statement: ast.stmt) -> str:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return statement.name
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id
    return ""


def _mentions_untyped(statement: ast.stmt, aliases: frozenset[str]) -> bool:
    if isinstance(statement, ast.AnnAssign):
        return contains_untyped_mapping(statement.annotation, aliases)
    assert isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
    annotations = [argument.annotation for argument in _arguments(statement)]
    return any(
        contains_untyped_mapping(annotation, aliases) for annotation in [*annotations, statement.returns]
    )


def _arguments(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def keyword_only_functions(modules: Iterable[Module]) -> list[Place]:
    """Functions with arguments that can only be passed by name."""
    return [place(module, function) for module, function in functions(modules) if function.args.kwonlyargs]


def many_positional_parameters(modules: Iterable[Module]) -> list[Place]:
    """Functions with more than three positional parameters; `self` and `cls` do not count."""
    places = []
    for module, function in functions(modules):
        names = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
        if len([name for name in names if name not in {"self", "cls"}]) > POSITIONAL_PARAMETERS:
            places.append(place(module, function))
    return places


def loose_modules(modules: Iterable[Module]) -> list[Place]:
    """Modules that lie in no package below the root."""
    return [Place(module, 1, module.name) for module in modules if module.is_loose]


def long_lines(modules: Iterable[Module]) -> list[Place]:
    """Lines longer than 110 characters."""
    places = []
    for module in modules:
        for number, line in enumerate(module.lines, start=1):
            if len(line) > LINE_LENGTH:
                places.append(Place(module, number, f"{len(line)} characters"))
    return places


def typer_imports(modules: Iterable[Module]) -> list[Place]:
    """Imports of typer or click outside of cli and commands."""
    places = []
    for module, node in walk(modules):
        if module.package in {"cli", "commands"}:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        if any(name.split(".")[0] in {"typer", "click"} for name in names):
            places.append(place(module, node))
    return places


def function_lengths(modules: Iterable[Module]) -> list[int]:
    """Lines of every function, its signature included."""
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for _, node in functions(modules)]


def lines_of_code(modules: Iterable[Module]) -> int:
    """All lines of the modules, comments, docstrings and empty ones included."""
    return sum(len(module.lines) for module in modules)


def per_100_lines(places: list[Place], modules: Iterable[Module]) -> float:
    return 100 * len(places) / lines_of_code(modules)


COUNTED: dict[str, Callable[[Iterable[Module]], list[Place]]] = {
    "conditionals": inline_conditionals,
    "comprehensions": nested_comprehensions,
    "questions": question_docstrings,
    "mappings": untyped_mappings,
    "borders": mappings_across_borders,
    "keyword-only": keyword_only_functions,
    "positional": many_positional_parameters,
    "loose": loose_modules,
    "long-lines": long_lines,
    "typer": typer_imports,
}


def figures(files: dict[str, str]) -> dict[str, str]:
    """Every figure of a state of the package, by what it measures."""
    modules = read_modules(files)
    lengths = function_lengths(modules)
    number = len(lengths)
    conditionals = per_100_lines(inline_conditionals(modules), modules)
    comprehensions = per_100_lines(nested_comprehensions(modules), modules)
    return {
        "Modules": f"{len(modules)}",
        "Lines": f"{lines_of_code(modules):,}",
        "Inline conditionals per 100 lines": f"{conditionals:.2f}",
        "Nested comprehensions per 100 lines": f"{comprehensions:.2f}",
        "Modules whose docstring asks a question": f"{len(question_docstrings(modules))}",
        "Untyped mappings in annotations": f"{len(untyped_mappings(modules))}",
        "Untyped mappings across a package's border": f"{len(mappings_across_borders(modules))}",
        "Functions": f"{number:,}",
        "Functions with keyword-only arguments": f"{len(keyword_only_functions(modules))}",
        "Functions with more than three positional parameters": f"{len(many_positional_parameters(modules))}",
        "Median lines of a function": f"{statistics.median(lengths):g}",
        "Lines of the longest function": f"{max(lengths)}",
        "Lines over 110 characters": f"{len(long_lines(modules))}",
        "Modules loose in the root": f"{len(loose_modules(modules))}",
        "Lines of README.md": f"{len(files['README.md'].splitlines())}",
    }


def comparison_table(commit: str, before: dict[str, str], after: dict[str, str]) -> str:
    """The figures of two states as Markdown."""
    rows = [f"| {name} | {value} | {after[name]} |" for name, value in before.items()]
    return "\n".join(
        [
            "# Style of the package's code",
            "",
            (
                f"`python benchmarks/code_style.py --before {commit} --save` counts these in `{PACKAGE}/`. "
                "All lines of a"
            ),
            (
                "module count, comments, docstrings and empty lines included. "
                "A nested comprehension has more than one `for`,"
            ),
            (
                "or contains another comprehension. "
                "A mapping crosses a package's border where a public function, method or"
            ),
            (
                "field has it in its signature, and a module of another package uses that function, "
                "method or field."
            ),
            "",
            f"| | before ({commit}) | after |",
            "|---|--:|--:|",
            *rows,
        ]
    )


def package_table(modules: list[Module]) -> str:
    """What is counted, for each package and module loose in the root, as Markdown."""
    by_package: defaultdict[str, list[Module]] = defaultdict(list)
    for module in modules:
        by_package[module.package].append(module)
    places = {kind: count(modules) for kind, count in COUNTED.items()}
    rows = []
    for package, members in sorted(by_package.items()):
        numbers = [str(sum(one.module.package == package for one in found)) for found in places.values()]
        conditionals = per_100_lines(inline_conditionals(members), members)
        comprehensions = per_100_lines(nested_comprehensions(members), members)
        cells = [
            package,
            str(lines_of_code(members)),
            f"{conditionals:.2f}",
            f"{comprehensions:.2f}",
            *numbers,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    header = ["package", "lines", "conditionals per 100", "comprehensions per 100", *COUNTED]
    rule = "|---" + "|--:" * (len(header) - 1) + "|"
    return "\n".join([f"| {' | '.join(header)} |", rule, *rows])


if __name__ == "__main__":
    main()
