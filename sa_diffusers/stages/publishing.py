"""The model card, and the upload."""

from typing import Any

from ..configuration import SelectiveAmnesiaConfig
from ..hub import repository_name
from ..identity import Identity
from ..output_folder import OutputFolder
from ..publish import push_pipeline, write_model_card
from .base import Stage
from .evaluation import ReportStage


class CardStage(Stage):
    """The model card beside the erased pipeline, unless the user's own is there.

    Args:
        output: The folder.
        report: What it tells of.
    """

    title = "card"
    depends_on = ReportStage.depends_on

    def __init__(self, output: OutputFolder, report: ReportStage) -> None:
        self.output = output
        self._report = report

    def identity(self) -> Identity:
        return Identity("card", self._report.identity().facts)

    def run(self, *inputs: Any) -> bool:
        """Whether the card is ours, and written."""
        return write_model_card(self.output.path)


class PushStage(Stage):
    """The upload to the Hub.

    Args:
        config: Where it goes.
        output: The folder that is uploaded.
        card: Its card.

    Raises:
        ValueError: The Hub allows no such name.
    """

    title = "push"
    depends_on = CardStage.depends_on | {"push_to_hub", "hub_model_id", "hub_private_repo"}

    def __init__(self, config: SelectiveAmnesiaConfig, output: OutputFolder, card: CardStage) -> None:
        self.config = config
        self.output = output
        self._card = card
        # A name that the Hub refuses should not come to light after hours.
        self.name = repository_name(output.path, config.hub_model_id) if config.push_to_hub else None

    def identity(self) -> Identity:
        return Identity("push", {**self._card.identity().facts, "repository": self.name})

    def plan(self) -> list[str]:
        return [f"publish   {self.name} on the Hub"] if self.name else []

    def run(self, *inputs: Any) -> str | None:
        """The repository's address; None where nothing is uploaded."""
        if self.name is None:
            return None
        return push_pipeline(self.output.path, self.config.hub_model_id, self.config.hub_private_repo)
