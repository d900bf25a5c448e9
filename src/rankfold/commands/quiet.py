"""Keeps library messages and loading bars off the terminal."""

from __future__ import annotations

import logging
import warnings

from rankfold.after_import import after_import

#: Loggers that warn at import: of kernels built for other machines, and of one library's ways to another.
_AT_IMPORT = ("torchao", "torch.utils._pytree")


def quiet() -> None:
    """Silences libraries, for the whole process: those that are imported now and those that will be."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in _AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    after_import("transformers", _quiet_transformers)
    after_import("datasets", _quiet_datasets)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _quiet_datasets() -> None:
    import datasets

    datasets.disable_progress_bars()
