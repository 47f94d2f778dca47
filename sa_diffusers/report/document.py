"""A report as a list of blocks, and the templates that show it.

Every figure is a string by the time it stands in a block: the two files cannot disagree.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..markup import markdown_code, markdown_fence, markdown_text, single_line, visible
from ..results.schema import Ending, Verdict

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN_PIXELS = 192
# Longer cells may be broken over lines.
LONG_CELL = 30
_NARROW, _FEW = 4, 3
# Longer cells than this are cut; report.json holds all.
_LONGEST_CELL = 2000


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of plain texts."""

    kind: ClassVar[str] = "items"
    texts: Sequence[str]


@dataclass(frozen=True)
class Command:
    """What is typed into a shell."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; its first column names the row.

    Attributes:
        caption: What it shows, in which units.
        header: A title for each column.
        rows: Cells of text, as many as there are titles.
        words: The columns that hold words, aligned left; the others hold figures, aligned right.
        folded: Shown on request only, where a page can do that.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})
    folded: bool = False

    @property
    def stacks(self) -> bool:
        """Whether a narrow page shows each row as a block: there are long texts, or few rows of many columns."""
        is_wide = len(self.header) > _NARROW and len(self.rows) <= _FEW
        return is_wide or any(len(cell) > LONG_CELL for row in self.rows for cell in row[1:])

    def __post_init__(self) -> None:
        cells = [[single_line(cell, _LONGEST_CELL) for cell in row] for row in self.rows]
        object.__setattr__(self, "rows", cells)


@dataclass(frozen=True)
class Chart:
    """A drawing and the figures in it.

    Attributes:
        caption: What it shows.
        svg: The drawing; it carries its own description.
        data: The figures.
        paired: Whether it shows before and after, and needs their legend.
    """

    caption: str
    svg: str
    data: Table
    paired: bool = False


@dataclass(frozen=True)
class Charts:
    """Drawings side by side."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Strip:
    """Pictures of one row of the report.

    Attributes:
        name: What was asked for.
        seeds: One for each pair.
        before: The base model's pictures.
        after: The erased model's, from the same seeds.
        role: What the row is, if it is known.
    """

    name: str
    seeds: Sequence[str]
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]
    role: str = ""

    @property
    def columns(self) -> int:
        return max(len(self.before), len(self.after))


@dataclass(frozen=True)
class Pictures:
    """Strips of pictures, and the file beside the report that holds them all."""

    kind: ClassVar[str] = "pictures"
    caption: str
    strips: Sequence[Strip]
    file: str
    blurred: bool = False


Block = Paragraph | Items | Command | Table | Charts | Pictures


@dataclass(frozen=True)
class Section:
    """Blocks under a title.

    Attributes:
        title: The title.
        anchor: What links to the section end with.
        blocks: What it holds.
    """

    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: Its title.
        verdict: What follows from it.
        facts: Names and values that stand under the title.
        sections: What it holds, in order.
        ending: How the training ended, if it measured itself.
    """

    title: str
    verdict: Verdict
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=list)
    ending: Ending | None = None

    def to_html(self) -> str:
        """One page that loads nothing: style, drawings and pictures are inside, and its own policy forbids the rest."""
        return render("report.html", document=self)

    def to_markdown(self) -> str:
        """GitHub's Markdown; a chart is its table, and pictures are the file beside it."""
        return render("report.md", document=self)


def render(template: str, longest_cell: int | None = None, **values: Any) -> str:
    """A template of this package, filled in. In `.html` every text is escaped; in `.md` the filters `md` and `code`
    take the meaning out of a text.

    Args:
        template: Name of its file.
        longest_cell: In Markdown, longer cells of tables are cut.
        values: What it shows.
    """
    environment = _environment(template.endswith(".html"), longest_cell)
    return environment.get_template(template).render(**values)


@cache
def _environment(is_page: bool, longest_cell: int | None) -> Environment:
    """Templates are compiled once for each."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=is_page,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=_shown if is_page else None,
    )
    environment.globals |= {"long_cell": LONG_CELL, "nbsp": "\N{NO-BREAK SPACE}"}
    environment.filters |= {"data_uri": data_uri, "md": lambda value: markdown_text(value, None),
                            "cell": lambda value: markdown_text(value, longest_cell),
                            "code": markdown_code, "fence": markdown_fence, "visible": visible}  # fmt: skip
    return environment


def data_uri(picture: Image.Image) -> str:
    """A picture as the address of itself: PNG, reduced to 192 pixels where it is larger."""
    picture = picture.convert("RGB")
    if max(picture.size) > _SHOWN_PIXELS:
        picture.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    picture.save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def _shown(value: object) -> object:
    """What a page shows of a text that is none of its own markup."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
