"""What an adapter has become: rank, norm and spectrum by layer and module; and, for a run, its ranks over the steps.

`inspect.terminal` and `inspect.pictures` show both.
"""

from rankfold.inspect.adapter import inspect_adapter
from rankfold.inspect.history import inspect_run
from rankfold.inspect.inspection import Inspection, ModuleUpdate, RankHistory

__all__ = ["Inspection", "ModuleUpdate", "RankHistory", "inspect_adapter", "inspect_run"]
