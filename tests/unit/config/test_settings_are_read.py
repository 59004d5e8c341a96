"""Every setting is read by the product; otherwise a user's value would be accepted and ignored."""

import ast
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from moecluster.config import sections
from moecluster.config.fields import Section, setting
from moecluster.config.load import SECTIONS

ROOT = Path(__file__).resolve().parents[3]
DECLARATIONS = Path(sections.__file__).parent


def unread_settings(classes: Mapping[str, type[Section]], modules: Iterable[ast.Module]) -> list[str]:
    """The fields that no module reads from a record of their section, as "section.key", in order."""
    declared = [f"{name}.{each.name}" for name, cls in classes.items() for each in dataclasses.fields(cls)]
    read = {name for module in modules for name in _Reads(classes, module).found()}
    return [name for name in declared if name not in read]


class _Reads:
    """The fields that a module reads from expressions known to be a section.

    Known are `.section` of anything (config.train), parameters and fields annotated with the section's class, calls of
    that class, and names and attributes to which these are assigned. A name is known only within its function.
    """

    def __init__(self, classes: Mapping[str, type[Section]], module: ast.Module) -> None:
        self._module = module
        self._by_class = {cls.__name__: name for name, cls in classes.items()}
        self._by_attribute = {name: name for name in classes}
        for node in ast.walk(module):
            match node:
                case ast.AnnAssign(target=ast.Name(id=field), annotation=ast.Name(id=cls)) if cls in self._by_class:
                    self._by_attribute[field] = self._by_class[cls]
        for function in (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)):
            self._by_attribute |= self._assigned(function, ast.Attribute, self._names(function))

    def found(self) -> Iterator[str]:
        """ "section.key", repeated as it is read."""
        functions = [node for node in ast.walk(self._module) if isinstance(node, ast.FunctionDef)]
        scopes: list[ast.Module | ast.FunctionDef] = [self._module, *functions]
        for scope in scopes:
            names = self._names(scope)
            for node in ast.walk(scope):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    yield f"{self._section(node.value, names)}.{node.attr}"

    def _names(self, scope: ast.Module | ast.FunctionDef) -> dict[str, str]:
        """name -> section, of a function's annotated parameters and what it assigns."""
        names: dict[str, str] = {}
        if isinstance(scope, ast.FunctionDef):
            for parameter in (*scope.args.args, *scope.args.kwonlyargs):
                if isinstance(parameter.annotation, ast.Name) and parameter.annotation.id in self._by_class:
                    names[parameter.arg] = self._by_class[parameter.annotation.id]
        return names | self._assigned(scope, ast.Name, names)

    def _assigned(self, scope: ast.AST, kind: type[ast.expr], names: Mapping[str, str]) -> dict[str, str]:
        """name or attribute -> the section assigned to it."""
        found: dict[str, str] = {}
        for node in (node for node in ast.walk(scope) if isinstance(node, ast.Assign)):
            for target in node.targets:
                pairs: Iterable[tuple[ast.expr, ast.expr]] = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=True)
                for to, value in pairs:
                    section = self._section(value, names)
                    if section and isinstance(to, kind) and isinstance(to, ast.Name | ast.Attribute):
                        found[to.id if isinstance(to, ast.Name) else to.attr] = section
        return found

    def _section(self, node: ast.expr, names: Mapping[str, str]) -> str | None:
        match node:
            case ast.Attribute(attr=attribute):
                return self._by_attribute.get(attribute)
            case ast.Name(id=name):
                return names.get(name)
            case ast.Call(func=ast.Name(id=cls)):
                return self._by_class.get(cls)
        return None


def _product() -> Iterator[ast.Module]:
    for file in (file for folder in ("moecluster", "actors") for file in (ROOT / folder).rglob("*.py")):
        module = ast.parse(file.read_text())
        yield _derived_values(module) if file.parent == DECLARATIONS else module


def _derived_values(declarations: ast.Module) -> ast.Module:
    """The sections' own methods that others call, as functions of their section: checking a value does not use it."""
    functions: list[ast.stmt] = []
    for cls in (node for node in declarations.body if isinstance(node, ast.ClassDef)):
        for method in (node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name != "check"):
            method.args.args[0].annotation = ast.Name(id=cls.name)
            functions.append(method)
    return ast.Module(body=functions, type_ignores=[])


def test_every_setting_is_read() -> None:
    assert unread_settings(SECTIONS, _product()) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kiln(Section):
    section = "kiln"

    heat: int = setting(1, "")
    glaze: int = setting(1, "")


@pytest.mark.parametrize(
    ("source", "unread"),
    [
        ("config.kiln.heat = 1; request.heat; heat; kiln.glaze; config.oven.glaze", ["kiln.heat", "kiln.glaze"]),
        ("config.kiln.heat + self._config.kiln.glaze", []),
        ("def f(c):\n oven, kiln = c.oven, c.kiln\n return kiln.heat, oven.glaze", ["kiln.glaze"]),
        ("def f(kiln: Kiln): return kiln.heat\ndef g(kiln): return kiln.glaze", ["kiln.glaze"]),
        ("class A:\n def __init__(self, k: Kiln):\n  self._k = k\n def f(self): return self._k.heat", ["kiln.glaze"]),
        ("class A:\n of: Kiln\ndef f(a): return a.of.glaze, Kiln().heat", []),
    ],
)
def test_only_reads_off_the_section_count(source: str, unread: list[str]) -> None:
    assert unread_settings({"kiln": Kiln}, [ast.parse(source)]) == unread
