"""One table of seeds: every stage draws from a stream of its own, and no two streams of a run meet.

A generator of torch on the CPU takes the low 32 bits of its seed and nothing else (`manual_seed(2**32)` gives the
numbers of `manual_seed(0)`), so all seeds here lie below `2**32`, and what a report names can be typed in again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_SPACE = 2**32
# The streams of samples fit into so many seeds. The first 64 runs have such a block each; others are hashed.
_BLOCK = 2**25
_EXACT = 64
# Those of an evaluation do not depend on the run, so that runs are compared on the same noise.
_FIXED = ("evaluation", "attack", "neighbour")


@dataclass(frozen=True)
class Stream:
    """Seeds `first` to `first + length - 1` of the run with seed 0; those of another run are shifted."""

    first: int
    length: int


STREAMS = {
    # What samples are drawn from, one seed each.
    "surrogate": Stream(0, 500_000),
    "validation": Stream(500_000, 500_000),
    "evaluation": Stream(1_000_000, 9_000_000),
    "replay": Stream(10_000_000, 10_000_000),
    "concept": Stream(20_000_000, 10_000_000),
    # Probes; of neighbours from the third eighth on, what a training looks at from the middle on, and noise as a
    # surrogate in the last quarter.
    "probe": Stream(30_000_000, 2_000_000),
    # What an evaluation samples for no row of its report: to choose names, and for an attack.
    "neighbour": Stream(32_000_000, 1_000_000),
    "attack": Stream(33_000_000, 500_000),
    # Noise of the training, a seed a step; orders of its samples, a seed an epoch.
    "training": Stream(975_588_761, 100_000_000),
    "surrogate order": Stream(1_756_852_019, 10_000_000),
    "replay order": Stream(3_513_704_038, 10_000_000),
    # Timesteps and noise of the Fisher information, a seed a sample.
    "fisher": Stream(2_500_000_000, 10_000_000),
    # Signs of the Fisher information's predictions, a seed a sample.
    "fisher signs": Stream(2_510_000_000, 10_000_000),
    # Timesteps and noise of the probes, a seed a set.
    "probe noise": Stream(2_600_000_000, 1_000_000),
    # What an adapter starts from.
    "adapter": Stream(2_610_000_000, 1),
    # Dropout inside the network.
    "dropout": Stream(2_700_000_000, 500_000_000),
}


def first_seed(stream: str, seed: int = 0) -> int:
    """The first seed of a stream in the run with a seed.

    Args:
        stream: One of `STREAMS`.
        seed: The run's, at least 0; those of an evaluation do not depend on it.
    """
    first = STREAMS[stream].first
    return first if stream in _FIXED else (first + _shift(seed)) % _SPACE


def met(first: int, length: int, seed: int, counts: Mapping[str, int]) -> tuple[str, int] | None:
    """The first stream of which samples have seeds of a range, and the first seed of that stream.

    Args:
        first: The range's first seed.
        length: Its length.
        seed: Of the run with the streams.
        counts: Stream -> samples that are drawn from it.
    """
    for stream, samples in counts.items():
        if meet(first, length, other := first_seed(stream, seed), samples):
            return stream, other
    return None


def seed_of(stream: str, seed: int, index: int) -> int:
    """The seed of an element of a stream; an index beyond its length starts over."""
    return (first_seed(stream, seed) + index % STREAMS[stream].length) % _SPACE


def generator_of(stream: str, seed: int, index: int) -> torch.Generator:
    """A generator on the CPU for an element of a stream."""
    return torch.Generator().manual_seed(seed_of(stream, seed, index))


def _shift(seed: int) -> int:
    if seed < _EXACT:
        return seed * _BLOCK
    attempt = 0
    while True:
        digest = hashlib.blake2b(f"{seed} {attempt}".encode(), digest_size=8).digest()
        shift = _EXACT * _BLOCK + int.from_bytes(digest, "big") % (_SPACE - (_EXACT + 1) * _BLOCK)
        if not any(_meets_fixed(name, shift) for name in STREAMS if name not in _FIXED):
            return shift
        attempt += 1


def _meets_fixed(stream: str, shift: int) -> bool:
    mine, fixed = STREAMS[stream], [STREAMS[name] for name in _FIXED]
    return any(meet(other.first, other.length, mine.first + shift, mine.length) for other in fixed)


def meet(first: int, length: int, other: int, other_length: int) -> bool:
    """Whether two ranges of seeds, by their first ones and lengths, share one; either may run over the end of the
    space, or lie beyond it."""
    return (other - first) % _SPACE < length or (first - other) % _SPACE < other_length
