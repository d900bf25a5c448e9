"""One file per method. Importing this package imports them all, and so registers them; their configs are its names."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from rankfold.host.registry import Method, discover

if TYPE_CHECKING:  # for type checkers alone, which cannot follow the loop below
    from rankfold.methods.adalora import AdaSvdConfig as AdaSvdConfig
    from rankfold.methods.block_lora import BlockLoraConfig as BlockLoraConfig
    from rankfold.methods.cola import ColaConfig as ColaConfig
    from rankfold.methods.cora import CoraConfig as CoraConfig
    from rankfold.methods.delta_lora import DeltaLoraConfig as DeltaLoraConfig
    from rankfold.methods.dynamic_dora import DynamicDoraConfig as DynamicDoraConfig
    from rankfold.methods.lora import PlainLoraConfig as PlainLoraConfig
    from rankfold.methods.rac_lora import RacLoraConfig as RacLoraConfig
    from rankfold.methods.rasa import RasaConfig as RasaConfig
    from rankfold.methods.res_lora import ResLoraConfig as ResLoraConfig
    from rankfold.methods.sbora import SboraConfig as SboraConfig
    from rankfold.methods.sd_lora import SdLoraConfig as SdLoraConfig
    from rankfold.methods.sora import SoraConfig as SoraConfig
    from rankfold.methods.xgblora import XgbLoraConfig as XgbLoraConfig

_modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
_rows = [value for module in _modules for value in vars(module).values() if isinstance(value, Method)]
globals().update({row.config.__name__: row.config for row in _rows})
__all__ = sorted({row.config.__name__ for row in _rows})  # pyright: ignore[reportUnsupportedDunderAll]
discover()  # last: what an entry point names may import every method from here
