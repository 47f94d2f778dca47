"""Model cards, and uploads to the Hub."""

from .card import build_model_card, push_pipeline, write_model_card

__all__ = ["build_model_card", "push_pipeline", "write_model_card"]
