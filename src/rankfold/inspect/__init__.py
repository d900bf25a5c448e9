"""What an adapter has become: rank, norm and spectrum by layer and module; and, for a run, its ranks over the steps."""

from rankfold.inspect.adapter import Inspection, Update, inspect_adapter
from rankfold.inspect.history import RankHistory, inspect_run

__all__ = ["Inspection", "RankHistory", "Update", "inspect_adapter", "inspect_run"]
