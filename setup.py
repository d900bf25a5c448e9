"""Everything is in pyproject.toml but this: the wheel holds docs/ as rankfold/pages, for `rankfold docs`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPages(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # there docs/ itself is read
            return
        for page in Path("docs").rglob("*.md"):
            target = Path(self.build_lib, "rankfold", "pages", page.relative_to("docs"))
            self.mkpath(str(target.parent))
            self.copy_file(str(page), str(target))


setup(cmdclass={"build_py": BuildWithPages})
