"""Images with a class: folders and files of rows, what is converted, and what is refused."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import write_jsonl
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rankfold.runfile.load import parse
from rankfold.tasks import table
from rankfold.tasks.images import opened
from rankfold.tasks.rows import DataError, Rows
from rankfold.train.data import load_rows

TASK = table.get("image-classification")


def load(source: Path, **data: Any) -> Rows:
    values = {"task": TASK.name, "model": "-", "method": "lora", "output": "-", "data": {"source": str(source), **data}}
    return load_rows(parse(values))


def picture(mode: str = "RGB", colour: Any = 0, size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


def folder_of(folder: Path, **files: bytes) -> Path:
    """Files by class and number, as in cat__1."""
    for name, content in files.items():
        place = folder.joinpath(*name.split("__"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return folder


RED, BLUE = picture(colour="red"), picture(colour="blue", kind="JPEG")


def test_class_folders(tmp_path: Path):
    rows = load(folder_of(tmp_path / "all", dog__2=BLUE, cat__10=RED, cat__9=RED, cat__deep__1=BLUE))
    train = rows.splits["train"]
    assert rows.labels == ["cat", "dog"]
    assert [Path(path).name for path in train["image"]] == ["10", "9", "1", "2"]
    assert train["label"][:] == [0, 0, 0, 1]
    assert rows.class_counts == {"cat": 3, "dog": 1}
    assert rows.notes == []


def test_folders_of_splits(tmp_path: Path):
    files = {"train__a__1": RED, "train__b__1": BLUE, "test__b__1": RED, "validation__a__1": BLUE}
    rows = load(folder_of(tmp_path / "all", **files))
    assert {name: split["label"][:] for name, split in rows.splits.items()} == {
        "train": [0, 1],
        "test": [1],
        "validation": [0],
    }
    assert "test: 1 of 1 rows also occur in train; scores on them show memory, not learning" in rows.notes
    apart = load(tmp_path / "all" / "train", test=str(tmp_path / "all" / "test"))
    assert len(apart.splits["test"]) == 1
    folder_of(tmp_path / "all", test__b__1=BLUE)  # under the name that it had
    assert [name for name, digest in load(tmp_path / "all").digests.items() if digest != rows.digests[name]] == ["test"]


def test_hidden_files_are_no_images(tmp_path: Path):
    folder = folder_of(tmp_path / "all", a__1=RED, b__1=BLUE)
    for name in (".DS_Store", "a/.hidden", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert len(load(folder).splits["train"]) == 2


def parquet(folder: Path, column: list[Any], features: Any = None) -> Path:
    Dataset.from_dict({"image": column, "label": ["a", "b"]}, features=features).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def test_bytes_paths_and_images_in_files(tmp_path: Path):
    folder_of(tmp_path, pictures__1=RED, pictures__2=BLUE)
    both = [{"image": "pictures/1", "label": "a"}, {"image": str(tmp_path / "pictures" / "2"), "label": "b"}]
    images = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    raw = Dataset.from_dict(
        {"image": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "x"}], "label": [0, 1]}, features=images
    )
    raw.to_parquet(tmp_path / "images.parquet")
    files = [
        write_jsonl(tmp_path / "rows.jsonl", both),  # seen from the file's folder
        parquet(tmp_path, [RED, BLUE]),
        tmp_path / "images.parquet",
    ]
    for file in files:
        rows = load(file)
        first, second = (opened(value).getpixel((1, 1)) for value in rows.splits["train"]["image"])
        assert first == (255, 0, 0)
        assert second == pytest.approx((0, 0, 254), abs=2)  # JPEG
        assert rows.labels == ["a", "b"]


def test_other_names(tmp_path: Path):
    folder_of(tmp_path, p__1=RED, p__2=BLUE)
    rows = [{"file_name": "p/1", "kind": "x"}, {"file_name": "p/2", "kind": "y"}]
    found = load(write_jsonl(tmp_path / "rows.jsonl", rows), columns={"image": "file_name", "label": "kind"})
    assert found.labels == ["x", "y"]


@pytest.mark.parametrize(
    ("mode", "colour", "pixel"),
    [
        ("L", 99, (99, 99, 99)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 257 * 80, (80, 80, 80)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (10, 0), (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), (254, 0, 0)),
    ],
)
def test_everything_becomes_rgb(mode: str, colour: Any, pixel: tuple[int, ...]):
    image = opened(picture(mode, colour, kind="TIFF" if mode == "CMYK" else "PNG"))
    assert image.mode == "RGB"
    assert image.getpixel((2, 2)) == pytest.approx(pixel, abs=1)


def test_what_is_converted_is_counted(tmp_path: Path):
    files = {"a__1": picture("L"), "a__2": picture("RGBA"), "b__1": picture("I;16"), "b__2": RED, "b__3": picture("P")}
    assert load(folder_of(tmp_path / "all", **files)).notes == [
        "train: images that are not RGB are converted to it: 2 grey, 1 with transparency (it becomes white), 1 P"
    ]


def test_the_right_way_up():
    image = Image.new("RGB", (6, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert opened(file.getvalue()).size == (4, 6)


@pytest.mark.parametrize(
    "content", [b"", b"text", RED[:40], BLUE[: len(BLUE) // 2]], ids=["empty", "text", "png", "jpeg"]
)
def test_images_that_cannot_be_read(content: bytes, tmp_path: Path):
    folder = folder_of(tmp_path / "all", a__1=RED, b__2=content)
    with pytest.raises(
        DataError, match=r"train, row 2: column 'image' holds the image '.*2', which cannot be read \(.*\); mend or"
    ):
        load(folder)


def test_bad_values(tmp_path: Path):
    good = folder_of(tmp_path, p__1=RED) / "p" / "1"
    for value, message in (
        (
            "nowhere.png",
            r"row 2: column 'image' holds the image '.*nowhere\.png', which cannot be read \(.*No such file",
        ),
        (None, "row 2: column 'image' is missing"),
    ):
        rows = [{"image": str(good), "label": "a"}, {"image": value, "label": "b"}]
        with pytest.raises(DataError, match=message):
            load(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match="row 1: column 'image' holds 3; it must be the path or the bytes of an image"):
        load(write_jsonl(tmp_path / "rows.jsonl", [{"image": 3, "label": "a"}]))


def test_empty_classes_and_folders(tmp_path: Path):
    folder = folder_of(tmp_path / "all", cat__1=RED)
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match="the class 'dog' has no image; add some or remove the folder"):
        load(folder)
    (folder / "dog").rmdir()
    with pytest.raises(DataError, match="train has the single label 'cat'"):
        load(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none' has neither a folder of images for each class nor a file of rows"):
        load(tmp_path / "none")


def test_pixels_are_made_of_a_batch(tmp_path: Path):
    processor: Any = ViTImageProcessorPil(size={"height": 8, "width": 8})
    rows = load(folder_of(tmp_path / "all", a__1=RED, b__2=picture("L", 255, (9, 30))))
    made = TASK.encode(rows, "train", processor, None, None)
    assert made.rows.column_names == ["image", "labels"]
    collate = TASK.options(processor, rows.labels)["data_collator"]
    batch = collate([made.rows[0], made.rows[1]])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"][0, :, 3, 3].tolist() == [1, -1, -1]  # (255, 0, 0), scaled to −1 … 1
    assert bool((batch["pixel_values"][1] == 1).all())
    assert torch.equal(TASK.example(_Config)["pixel_values"], TASK.example(_Config)["pixel_values"])


class _Config:
    image_size, num_channels = (4, 6), 3


def test_nothing_of_images_is_loaded_without_need():
    code = (
        "import sys, rankfold.cli, rankfold.tasks.table; print([m for m in ('PIL', 'torchvision') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
