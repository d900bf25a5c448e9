"""What PEFT sees: one layer, one tuner, one config for all methods.

PEFT comes first: it makes `rankfold` import the methods, and with them every module here, before one of these is half imported.
"""

import peft as peft
