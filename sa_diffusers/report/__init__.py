"""A report's results as people read them: page, Markdown, terminal."""

from .view import MARKDOWN_NAME, PAGE_NAME, view, write_report

__all__ = ["MARKDOWN_NAME", "PAGE_NAME", "view", "write_report"]
