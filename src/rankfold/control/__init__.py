"""What moves during training: controllers around the optimiser's step, and the callback that attaches them."""

from rankfold.control.attach import Attached, attach
from rankfold.control.callback import AdapterCallback
from rankfold.control.controller import Controller

__all__ = ["AdapterCallback", "Attached", "Controller", "attach"]
