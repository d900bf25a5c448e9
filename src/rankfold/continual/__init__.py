"""Learning tasks in a row: one run of `train` per task, measured on all tasks seen so far."""
