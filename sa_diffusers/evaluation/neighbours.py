"""What lies near a concept, where collateral damage comes first, and what lies far from it."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from ..families import Objective
from ..names import names_concept
from .classification import ImageClassifier
from .groups import PromptGroup
from .scoring import score_groups
from .subject import NEIGHBOUR_SEEDS, Subject, stream_seeds

NEAREST, FARTHEST = 5, 5
_DATA = Path(__file__).parent.parent / "data"
_PICTURES = 16


def near_and_far(
    concepts: Sequence[str],
    surrogates: Sequence[str],
    embed: Callable[[Sequence[str]], torch.Tensor],
    candidates: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """The candidates that lie nearest to the concepts (a third of them, at most 5), and others spread over the rest.

    Args:
        concepts: What was erased.
        surrogates: What it turned into.
        embed: Names -> `[n, d]`; near is what has a high cosine. See `text_embeddings` and `picture_embeddings`.
        candidates: Names to choose from. Default: a built-in list of people, styles, bodies and things.
    """
    if not candidates:
        known = json.loads((_DATA / "neighbours.json").read_text(encoding="utf-8"))
        candidates = [name for names in known.values() for name in names]
    taken = [*concepts, *surrogates]
    candidates = [
        name
        for name in candidates
        if not any(names_concept(name, other) or names_concept(other, name) for other in taken)
    ]
    if not candidates:
        return [], []
    embedded = normalize(embed([*concepts, *candidates]).double(), dim=-1)
    closeness = (embedded[len(concepts) :] @ embedded[: len(concepts)].T).max(-1).values
    order = [candidates[index] for index in torch.argsort(closeness, descending=True, stable=True).tolist()]
    near = min(NEAREST, math.ceil(len(order) / 3))
    rest = order[near:]
    return order[:near], rest[:: -max(1, len(rest) // FARTHEST)][:FARTHEST]


def text_embeddings(objective: Objective) -> Callable[[Sequence[str]], torch.Tensor]:
    """The base model's own embeddings of names, averaged over their tokens."""
    return lambda names: objective.encode_prompts(names)["encoder_hidden_states"].mean(1).cpu()


def picture_embeddings(subject: Subject, classifier: ImageClassifier) -> Callable[[Sequence[str]], torch.Tensor]:
    """What the classifier sees in the base model's images of names: mean features, less their mean over all names.

    All processes sample and the main one looks: in the others it gives zeros.
    """

    def embed(names: Sequence[str]) -> torch.Tensor:
        seeds = stream_seeds(NEIGHBOUR_SEEDS, subject.first_seed, _PICTURES)
        groups = [PromptGroup(name, "remembered", (name,) * _PICTURES, seeds) for name in names]
        kept = subject.sample(subject.base, groups)
        if not subject.accelerator.is_main_process:
            return torch.zeros(len(names), 1)
        drawn = score_groups(subject.base, groups, kept, classifier)
        means = torch.stack([seen.features[classifier.name].double().mean(0) for seen in drawn])
        return means - means.mean(0)

    return embed
