"""Sums, differences and extractions of updates, each a source of a fold: every profile and the proof come with it.

from rankfold.algebra import combine, diff, extract
print(combine(["runs/a", "runs/b"], "both", weights=[0.7, 0.3]).summary())
"""

from rankfold.algebra.combination import combine
from rankfold.algebra.difference import Difference, diff
from rankfold.algebra.extraction import extract

__all__ = ["Difference", "combine", "diff", "extract"]
