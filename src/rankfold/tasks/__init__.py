"""What a model learns to do: one file per task, with its one row `TASK` (`task.py` says what a row knows)."""
