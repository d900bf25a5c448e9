"""Read YAML by the rules of YAML 1.2 and remember on which line every key stands; write what reads back as it was.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` a boolean, `1:30` the number 90 and a key written twice is
silently the last one. Each of these has ruined a training run, so plain scalars are read by the 1.2 core schema here
and a repeated key is an error. What is written means the same by both rules.
"""

import re
from typing import Any, ClassVar

import yaml

from rankfold.errors import RankfoldError

KeyPath = tuple[str | int, ...]


class YamlError(RankfoldError):
    """The text is not YAML; `line` counts from 1."""

    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}  # none of YAML 1.1's


class _Dumper(yaml.SafeDumper):
    """Quotes text that one of the two schemas takes for something else."""


_CORE_SCHEMA = {
    "null": (r"(?:~|null|Null|NULL|)", "~nN\0"),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    _firsts = ["" if c == "\0" else c for c in _first]
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _firsts)

# The 1.1 constructor would read `010` as octal 8.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document.

    Returns:
        The plain Python value, and the line (from 1) of every key path in it.

    Raises:
        YamlError: for a syntax error or a key that is written twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines = {(): node.start_mark.line + 1}
        _collect_lines(node, (), lines, ())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise YamlError(f"not valid YAML: {e.problem or e.context}", mark.line + 1 if mark else 1) from e
    except yaml.YAMLError as e:
        raise YamlError(f"not valid YAML: {e}", 1) from e
    finally:
        loader.dispose()


def write(values: Any, comment: str = "") -> str:
    """Plain Python values as YAML that `read` reads back, below a line of comment."""
    above = f"# {' '.join(comment.split())}\n" if comment else ""
    return above + yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _collect_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], around: tuple[yaml.Node, ...]) -> None:
    if node in around:
        raise YamlError("an alias (*) stands inside what it repeats", node.start_mark.line + 1)
    around = (*around, node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            line = key.start_mark.line + 1
            if below in lines:
                raise YamlError(f"the key '{key.value}' is written twice, first on line {lines[below]}", line)
            lines[below] = line
            _collect_lines(value, below, lines, around)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[*path, i] = value.start_mark.line + 1
            _collect_lines(value, (*path, i), lines, around)
