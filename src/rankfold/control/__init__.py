"""Schedules: controllers that act around the optimiser's step, and the callback that attaches them.

PEFT comes first, for the reason that `rankfold.host` gives.
"""

import peft as peft

from rankfold.control.attach import Attached, attach
from rankfold.control.callback import AdapterCallback
from rankfold.control.controller import Controller

__all__ = ["AdapterCallback", "Attached", "Controller", "attach"]
