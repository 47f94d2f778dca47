"""What an erasure cost: seconds, and rows that passed through the network, stage by stage."""

from ..passes import Passes, together
from ..results.figures import MISSING
from ..results.schema import Report
from .document import Block, Table

_ROW = "one image or latent under one condition"


def spent(report: Report) -> Passes:
    """What all stages took of the network in this run."""
    return Passes(*(sum(getattr(stage, name) for stage in report.cost.values()) for name in ("forward", "backward")))


def made(report: Report) -> Passes | None:
    """What all products took when they were made; None where one does not say."""
    return together(stage.made for stage in report.cost.values())


def cost_table(report: Report) -> list[Block]:
    """Each stage's seconds and passes; where an earlier run made a part, what that part took is beside it."""
    titles = list(dict.fromkeys([*report.cost, *report.seconds]))
    if not titles:
        return []
    header, caption = ["stage", "seconds"], "Wall-clock time of each stage, in seconds"
    lines = [[title, f"{report.seconds[title]:,.1f}" if title in report.seconds else MISSING] for title in titles]
    lines.append(["in all", f"{sum(report.seconds.values()):,.1f}"])
    if report.cost:
        header += ["forward", "backward"]
        caption += f", and how many rows passed through the network, forward and backward: {_ROW} each"
        for line in lines[:-1]:
            stage = report.cost.get(line[0])
            line += _figures(stage and Passes(stage.forward, stage.backward))
        lines[-1] += _figures(spent(report))
    if reuses(report):
        header += ["forward, when made", "backward, when made"]
        caption += (
            ". What an earlier run had made cost this one nothing; what it took then stands under “when made”, or "
            f"{MISSING} where that is not on record"
        )
        for line in lines[:-1]:
            line += _figures(getattr(report.cost.get(line[0]), "made", None))
        lines[-1] += _figures(made(report))
    return [Table(f"{caption}.", header, lines)]


def reuses(report: Report) -> bool:
    """Whether a stage's product took something else than the stage did in this run."""
    return any(stage.made != Passes(stage.forward, stage.backward) for stage in report.cost.values())


def cost_sentence(report: Report) -> str:
    """What the run cost, in a sentence or two; empty where nothing is on record."""
    if not report.seconds and not report.cost:
        return ""
    told = f"The run took {sum(report.seconds.values()):.0f} seconds on {report.device or 'a device'}"
    if not report.cost:
        return f"{told}."
    told += f", and {_in_words(spent(report))} through the network ({_ROW} each)."
    whole = made(report)
    if whole and reuses(report):
        told += f" With what earlier runs had made for it, it comes to {_in_words(whole)}."
    return told


def _in_words(passes: Passes) -> str:
    return f"{passes.forward:,} forward and {passes.backward:,} backward passes"


def _figures(passes: Passes | None) -> list[str]:
    return [f"{passes.forward:,}", f"{passes.backward:,}"] if passes else [MISSING] * 2
