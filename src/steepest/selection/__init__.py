"""Data-subset selection: SAGE, and the methods that it must be judged against."""

from steepest.selection.grad_match import GradMatch
from steepest.selection.herding import Herding
from steepest.selection.k_center import KCenter
from steepest.selection.keeping import Keep
from steepest.selection.method import Method, Picked, Rows, Run
from steepest.selection.report import Estimate, Progress, SelectionReport
from steepest.selection.result import Selection
from steepest.selection.rules import RandomAboveCut, Strata, Top
from steepest.selection.sage import SAGE
from steepest.selection.sampler import ReselectingSampler, SelectionSampler
from steepest.selection.select import select_subset
from steepest.selection.simple import EL2N, GraNd, Random

__all__ = [
    "EL2N",
    "SAGE",
    "Estimate",
    "GraNd",
    "GradMatch",
    "Herding",
    "KCenter",
    "Keep",
    "Method",
    "Picked",
    "Progress",
    "Random",
    "RandomAboveCut",
    "ReselectingSampler",
    "Rows",
    "Run",
    "Selection",
    "SelectionReport",
    "SelectionSampler",
    "Strata",
    "Top",
    "select_subset",
]
