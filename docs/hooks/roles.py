"""What the pages make of the sources: cross-references as links, functions that have the name of their file.

``:func:`explain``` in a docstring becomes the name, linked where it has a page. A room that exports the function
``explain`` of its file ``explain.py`` shows the function, as the import does.
"""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc|obj):`(?P<short>~?)(?P<target>[^`]+)`")


class Roles(griffe.Extension):
    """Changes a package once all of it is known."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Replace the roles; a name that leads nowhere stays as code. Then show functions in place of their files."""
        loader.resolve_aliases()
        rewrite(pkg, loader.modules_collection)
        show_functions(pkg)


def show_functions(module: griffe.Module) -> None:
    """Replace members that are files by the functions of the same name that the module imports from them."""
    for name, member in list(module.members.items()):
        if isinstance(member, griffe.Module):
            show_functions(member)
            if module.imports.get(name) == f"{member.path}.{name}":
                module.members[name] = griffe.Alias(name, member.members[name], parent=module)


def rewrite(obj: griffe.Object, collection: griffe.ModulesCollection) -> None:
    """Replace the roles of an object's docstring and of its members'."""
    if obj.docstring is not None:
        obj.docstring.value = _ROLE.sub(lambda match: _link(obj, match, collection), obj.docstring.value)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            rewrite(member, collection)


def _link(obj: griffe.Object, match: re.Match[str], collection: griffe.ModulesCollection) -> str:
    target = match["target"]
    text = target.rpartition(".")[2] if match["short"] else target
    return f'<autoref optional identifier="{_path(obj, target, collection)}"><code>{text}</code></autoref>'


def _path(obj: griffe.Object, name: str, collection: griffe.ModulesCollection) -> str:
    """The full path of ``name`` as the docstring's object sees it: a member, a sibling, or something imported."""
    scope: Any = obj
    while scope is not None:
        try:
            return collection[f"{scope.path}.{name}"].canonical_path
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            scope = scope.parent
    try:
        return collection[name].canonical_path
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return name
