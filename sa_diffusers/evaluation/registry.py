"""What an evaluation can be made of, by name: measures, protocols, attacks. Each is one file, imported when it is used.

A script adds its own by importing one file that registers it, before it calls the package's commands.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from ..configuration.evaluation import add_protocol
from ..messages import did_you_mean, shown

if TYPE_CHECKING:
    from .attacks import Attack
    from .protocols import Protocol
    from .scoring import Measure

Kind = TypeVar("Kind")
Decorated = TypeVar("Decorated", bound=type)


class Registry(Generic[Kind]):
    """Classes by name, those of the package first.

    Args:
        what: What they are, for messages.
        own: Name -> the module of this room that registers it.
    """

    def __init__(self, what: str, own: dict[str, str]) -> None:
        self.what = what
        self._own = own
        self._classes: dict[str, type[Kind]] = {}

    def add(self, name: str, kind: type) -> None:
        self._classes[name] = kind

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._own, *self._classes]))

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._classes

    def __getitem__(self, name: str) -> type[Kind]:
        """The class of a name.

        Raises:
            ValueError: Nothing is registered under it.
        """
        if name not in self:
            near = did_you_mean(name, list(self)) or f": give one of {', '.join(self)}"
            raise ValueError(f'unknown {self.what} "{shown(name)}"{near}')
        if name not in self._classes:
            importlib.import_module(f"{__package__}.{self._own[name]}")
        return self._classes[name]


MEASURES: "Registry[Measure]" = Registry(
    "measure", {"clip": "measures.clip", "celebrity": "measures.faces", "nudity": "measures.nudity"}
)
PROTOCOLS: "Registry[Protocol]" = Registry(
    "protocol", {name: f"protocols.{name}" for name in ("class", "concept", "robustness", "celebrity", "nudity")}
    | {"class": "protocols.classes"},
)  # fmt: skip
ATTACKS: "Registry[Attack]" = Registry(
    "attack",
    {
        "its name": "attacks.name",
        "paraphrases": "attacks.paraphrases",
        "misspellings": "attacks.misspellings",
        "other languages": "attacks.translations",
        "textual inversion": "attacks.inversion",
    },
)


def register_measure(name: str) -> Callable[[Decorated], Decorated]:
    """Class decorator: `--measures NAME` scores every image with this class too; see `Measure`.

    It is made by its class method `from_request(request)`, or without arguments if it has none.
    """

    def decorate(measure: Decorated) -> Decorated:
        MEASURES.add(name, measure)
        return measure

    return decorate


def register_protocol(name: str, images: int | None = None) -> Callable[[Decorated], Decorated]:
    """Class decorator: `--protocol NAME` runs this subclass of `Protocol`.

    Args:
        name: Of the protocol, in reports too.
        images: Images a row where the user gives no number (default: 50).
    """

    def decorate(protocol: Decorated) -> Decorated:
        add_protocol(name, images)
        PROTOCOLS.add(name, protocol)
        return protocol

    return decorate


def register_attack(name: str) -> Callable[[Decorated], Decorated]:
    """Class decorator: the robustness protocol tries this subclass of `Attack` too, under this name in reports."""

    def decorate(attack: Decorated) -> Decorated:
        attack.name = name  # type: ignore[attr-defined]
        ATTACKS.add(name, attack)
        return attack

    return decorate
