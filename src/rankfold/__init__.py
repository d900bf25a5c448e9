"""Low-rank adaptation beyond LoRA: PEFT methods that fold exactly into a plain LoRA.

from rankfold import RasaConfig
model = peft.get_peft_model(model, RasaConfig(r=8, target_modules="all-linear"))
"""

from rankfold.host.peft_api import check_peft

check_peft()

from rankfold.kernel.factors import Factors  # noqa: E402
from rankfold.methods import (  # noqa: E402
    AdaSvdConfig,
    CoraConfig,
    DynamicDoraConfig,
    PlainLoraConfig,
    RasaConfig,
    SoraConfig,
)

from rankfold.control import AdapterCallback, attach  # noqa: E402  isort: skip
from rankfold.host.registry import discover  # noqa: E402  isort: skip

discover()  # at the end: what an entry point names may import everything from here

__version__ = "0.1.0"
__all__ = [
    "AdaSvdConfig",
    "AdapterCallback",
    "CoraConfig",
    "DynamicDoraConfig",
    "Factors",
    "PlainLoraConfig",
    "RasaConfig",
    "SoraConfig",
    "attach",
]
