"""Parted into `concepts`, `classes`, `phrasings`, `captions`, `replay` and `prompt_files`."""

from ..moved import forward

_ROOMS = ("concepts", "classes", "phrasings", "captions", "replay", "prompt_files")
__getattr__ = forward(__name__, *(f"data.{room}" for room in _ROOMS), "names")
