"""Digests of models: what tells one from another."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import nn

from ..quantization import dequantized, kind_of

_DIGESTED: ContextVar[dict[int, str] | None] = ContextVar("_DIGESTED", default=None)


@contextlib.contextmanager
def digested_once() -> Iterator[None]:
    """Each module is digested once meanwhile, however often it is asked for. Nothing may change weights in it."""
    token = _DIGESTED.set({})
    try:
        yield
    finally:
        _DIGESTED.reset(token)


def fingerprint_module(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers: names, shapes, types and bytes."""
    known = _DIGESTED.get()
    if known is None:
        return _digest(module)
    if id(module) not in known:
        known[id(module)] = _digest(module)
    return known[id(module)]


def digest_of(modules: Sequence[nn.Module], facts: Sequence[str]) -> str:
    """A digest of modules and of what else samples depend on, in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for value in (*map(fingerprint_module, modules), *facts):
        digest.update(value.encode())
    return digest.hexdigest()


def _digest(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if (kind := kind_of(tensor)) is not None:
            digest.update(kind.encode())
            tensor = dequantized(tensor)
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()
