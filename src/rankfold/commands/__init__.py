"""One file per command: its options as a dataclass, and what it does with them. Nothing heavy is imported before it runs."""
