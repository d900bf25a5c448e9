"""What each method costs on a model, before any weight is loaded."""

from rankfold.gelora import gelora_plan, gelora_ranks

__all__ = ["gelora_plan", "gelora_ranks"]
