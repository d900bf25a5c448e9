"""One file a method. Importing this package registers them all."""

from rankfold.methods.lora import PlainLoraConfig
from rankfold.methods.rasa import RasaConfig

__all__ = ["PlainLoraConfig", "RasaConfig"]
