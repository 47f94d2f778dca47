"""The earlier place of `sa_diffusers.commands.erase`, for one version."""

import warnings

from .commands.erase import build_parser, main, parse_config

__all__ = ["build_parser", "main", "parse_config"]

warnings.warn("sa_diffusers.command_line is sa_diffusers.commands.erase now", DeprecationWarning, stacklevel=2)
