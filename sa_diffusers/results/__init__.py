"""What an evaluation found: its schema, the statistics behind its figures, and the verdict that follows from them."""

from .schema import SCHEMA_VERSION, Report, Row, Share, Summary, Times
from .verdict import Verdict, decide

__all__ = ["SCHEMA_VERSION", "Report", "Row", "Share", "Summary", "Times", "Verdict", "decide"]
