"""Old names of rooms, for one version: they forward to the new ones with a warning."""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any


def forward(old: str, *rooms: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that looks its names up in other modules of this package.

    Args:
        old: The module's name.
        rooms: Names of those that its content moved to, such as `"training.trainer"`.
    """

    def find(name: str) -> Any:
        if not name.startswith("__"):
            for room in rooms:
                module = importlib.import_module(f"{__package__}.{room}")
                if hasattr(module, name):
                    new = f"{__package__}.{room}"
                    warnings.warn(f"{old}.{name} is now {new}.{name}: import it from there", DeprecationWarning, 2)
                    return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


def renamed(**names: str) -> Callable[[Callable], Callable]:
    """Decorator: arguments are taken by their old names too, with a warning.

    Args:
        **names: Old name and new one.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            for old in names.keys() & named.keys():
                warnings.warn(f"the argument {old} is now {names[old]}", DeprecationWarning, 2)
                named[names[old]] = named.pop(old)
            return function(*arguments, **named)

        return call

    return decorate


def forward_parts(old: str, parts: dict[str, tuple[str, ...]]) -> dict[str, ModuleType]:
    """Modules of an old package, by name, that forward; importing them works as it did."""
    modules = {}
    for part, rooms in parts.items():
        modules[part] = ModuleType(f"{old}.{part}", f"Moved to {', '.join(rooms)}.")
        modules[part].__getattr__ = forward(f"{old}.{part}", *rooms)  # type: ignore[method-assign]
        sys.modules[f"{old}.{part}"] = modules[part]
    return modules
