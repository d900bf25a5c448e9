"""One file per method. Importing this package imports them all, and so registers them; their configs are its names."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from rankfold.host.registry import METHODS

if TYPE_CHECKING:  # for type checkers alone, which cannot follow the loop below
    from rankfold.methods.adalora import AdaSvdConfig as AdaSvdConfig
    from rankfold.methods.cora import CoraConfig as CoraConfig
    from rankfold.methods.dynamic_dora import DynamicDoraConfig as DynamicDoraConfig
    from rankfold.methods.lora import PlainLoraConfig as PlainLoraConfig
    from rankfold.methods.rasa import RasaConfig as RasaConfig
    from rankfold.methods.sora import SoraConfig as SoraConfig

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

_CONFIGS = {m.config.__name__: m.config for m in METHODS.values() if m.config.__module__.startswith(f"{__name__}.")}
globals().update(_CONFIGS)
__all__ = sorted(_CONFIGS)  # pyright: ignore[reportUnsupportedDunderAll]
