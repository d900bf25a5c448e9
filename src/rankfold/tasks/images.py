"""Images in rows: a path, the bytes of a file, or both as `datasets` keeps them; opened as RGB."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.errors import short
from rankfold.tasks.rows import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


def class_folders(folder: Path) -> Dataset:
    """The paths of the images in a folder with one folder for each class.

    Raises:
        DataError: no folder in it, or a class without a file.
    """
    from datasets import Dataset

    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    rows: dict[str, list[str]] = {"image": [], "label": []}
    for entry in classes:
        files = sorted(file for file in entry.rglob("[!.]*") if file.is_file())
        if not files:
            raise DataError(f"folder '{entry}': the class '{entry.name}' has no image; add some or remove the folder")
        rows["image"] += map(str, files)
        rows["label"] += [entry.name] * len(files)
    if not classes:
        raise DataError(
            f"folder '{folder}' has neither a folder of images for each class nor a file of rows called train.jsonl (or .parquet ...)"
        )
    return Dataset.from_dict(rows)


def content(value: Any) -> bytes:
    """The bytes of an image's file.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else Path(value).read_bytes()


def problem(value: Any) -> str | None:
    """What is wrong with an image, as the end of a sentence, or None; all of it is read."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, str | bytes):
        return "is missing" if not value else f"holds {short(value)}; it must be the path or the bytes of an image"
    import PIL.Image  # noqa: F401 - what is missing is not the file's fault

    try:
        opened(value, whole=False)
    except Exception as e:  # whatever a decoder makes of a damaged file
        name = f"'{value}'" if isinstance(value, str) else f"of {len(value):,} bytes"
        return f"holds the image {name}, which cannot be read ({e}); mend or remove it"
    return None


def opened(value: Any, whole: bool = True) -> Image:
    """An image as RGB, the right way up; what is transparent becomes white.

    Args:
        whole: False still reads the whole file, but makes a smaller picture of it where its format can.

    Raises:
        Exception: whatever its decoder raises.
    """
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(content(value)))
    if not whole:
        image.draft("RGB", (1, 1))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would cut off what is above 255
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.mode == "F":
        raise DataError("it holds fractions, whose range is not known; save it with 8 bits for a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def note_converted(values: Iterable[Any], name: str, notes: list[str]) -> None:
    """Adds a note on the images of a split that are not RGB; only their headers are read."""
    from PIL import Image

    kinds = Counter[str]()
    for value in values:
        image = Image.open(io.BytesIO(content(value)))
        if image.has_transparency_data:
            kinds["with transparency (it becomes white)"] += 1
        elif image.mode != "RGB":
            kinds["grey" if image.mode[0] in "1LI" else image.mode] += 1
    if kinds:
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        notes.append(f"{name}: images that are not RGB are converted to it: {listed}")
