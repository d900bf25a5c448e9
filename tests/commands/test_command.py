"""A dataclass of options makes its parser."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from rankfold.commands.command import CommonOptions, add_options, group, names, option, parse, positional


@dataclass(kw_only=True)
class Part:
    needed: str = option("needed where the command itself runs")
    count: int = option("how many", default=3)


@dataclass(kw_only=True)
class Options(CommonOptions):
    where: str = positional("a folder")
    more: list[str] = positional("more of them", default=[], nargs="*", metavar="key=value")
    share: float | None = option("of all", default=None, metavar="S")
    kind: Literal["this", "that"] = option("which", default="this", short="-k")
    on_top: bool = option("upon it", default=False)
    targets: list[str] | None = option("these", default=None, type=names, either="what")
    all: bool = option("all of them", default=False, either="what")
    part: dict[str, Any] = group("part", "of another command", Part)


def parsed(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    add_options(parser, Options)
    return parse(parser, Options, arguments)


def test_defaults_are_those_of_the_dataclass():
    assert parsed("here") == Options(where="here")
    assert Options(where="here").more is not Options(where="here").more


def test_types_and_places():
    arguments = [
        "-k",
        "that",
        "here",
        "--share",
        "0.5",
        "a=1",
        "--on-top",
        "--targets",
        "x, y",
        "b=2",
        "--count",
        "4",
        "--debug",
    ]
    assert parsed(*arguments) == Options(
        where="here",
        more=["a=1", "b=2"],
        share=0.5,
        kind="that",
        on_top=True,
        targets=["x", "y"],
        part={"count": 4},
        debug=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: where"),
        (["here", "--kind", "other"], "invalid choice: 'other'"),
        (["here", "--share", "x"], "invalid float value: 'x'"),
        (["here", "--all", "--targets", "x"], "not allowed with argument --all"),
        (["here", "--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        parsed(*arguments)
    assert message in capsys.readouterr().err
