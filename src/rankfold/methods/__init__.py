"""One file per method. Importing this package registers them all."""

from rankfold.methods.adalora import AdaSvdConfig
from rankfold.methods.cora import CoraConfig
from rankfold.methods.dynamic_dora import DynamicDoraConfig
from rankfold.methods.lora import PlainLoraConfig
from rankfold.methods.rasa import RasaConfig
from rankfold.methods.sora import SoraConfig

__all__ = ["AdaSvdConfig", "CoraConfig", "DynamicDoraConfig", "PlainLoraConfig", "RasaConfig", "SoraConfig"]
