"""What the README.md beside a saved adapter says about loading it: PEFT alone ends with a bare KeyError of its type."""

from __future__ import annotations

from pathlib import Path


def say_what_loads_it(folder: Path, method: str, module: str, fold_option: str = "") -> None:
    """Adds a section to the model card in a folder, once, or starts one. A README.md that is not PEFT's card stays as it is.

    Args:
        module: the one whose import registers the method.
        fold_option: what `rankfold fold` must be told where no LoRA equals the adapter.
    """
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.exists() else "---\nlibrary_name: peft\ntags:\n- rankfold\n---\n"
    package = "rankfold" if module.startswith("rankfold.") else module
    if "library_name: peft" not in text or f"import {package}" in text:
        return
    file.write_text(
        f"{text.rstrip()}\n\n{_SECTION.format(package=package, method=method)}{_fold(fold_option)}", encoding="utf-8"
    )


_SECTION = """## What loads this adapter

It is a `{method}` adapter of [rankfold](https://pypi.org/project/rankfold). PEFT knows its type once rankfold is imported:

```python
import {package}
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

"""


def _fold(option: str) -> str:
    command = f"`rankfold fold path/to/this/folder -o folded{option}`"
    if option:
        return f"No LoRA equals it. {command} makes one that comes near it, with one of these rules, and measures how near on texts.\n"
    return f"{command} makes a plain LoRA of it, which needs no rankfold: PEFT and engines load it as it is.\n"
