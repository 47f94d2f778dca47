"""Models that come with the package."""

from pathlib import Path

_EMBEDDED = Path(__file__).parent / "embedded"


def embedded_pipeline() -> Path:
    """Folder of the embedded text-to-image pipeline: ten garments, 32x32 pixels, trained on Fashion-MNIST."""
    return _EMBEDDED / "pipeline"


def embedded_classifier() -> Path:
    """Folder of the image classifier that scores the embedded pipeline's samples."""
    return _EMBEDDED / "classifier"
