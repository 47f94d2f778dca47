"""What is sampled and measured to show that a concept is gone: one file a protocol."""

from typing import TYPE_CHECKING, Any

from ...moved import forward

if TYPE_CHECKING:
    from .base import Protocol

__all__ = ["Protocol"]

_earlier = forward(__name__, "evaluation.subject", "evaluation.protocols.classes")


def __getattr__(name: str) -> Any:
    if name == "Protocol":
        from .base import Protocol

        return Protocol
    return _earlier(name)
