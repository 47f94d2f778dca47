"""Digests of models: what tells one from another."""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..quantization import dequantized, kind_of

# What a configuration tells of the file, of the precision and of names; the digest of weights knows types.
_TOLD = ("architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config", "name_or_path")
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
    for value in (*map(fingerprint_module, modules), *map(_configured, modules), *facts):
        digest.update(value.encode())
    return digest.hexdigest()


def _configured(module: nn.Module) -> str:
    """What a module's configuration says otherwise than its class: heads, activations and the like show in no weight.

    Defaults are left out: a later version of the library may have more of them.
    """
    config = getattr(module, "config", None)
    if hasattr(config, "to_diff_dict"):
        values = _plain(config.to_diff_dict())
    else:
        parameters = inspect.signature(type(module).__init__).parameters
        defaults = _plain({name: each.default for name, each in parameters.items()})
        values = {name: value for name, value in _plain(dict(config or {})).items() if value != defaults.get(name)}
    return json.dumps(values, sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """Settings as files may have them, without what says where they came from and in which precision they were
    loaded."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()
                if not str(name).startswith("_") and name not in _TOLD}  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


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
