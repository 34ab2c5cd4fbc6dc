"""Optimizers: each a real torch.optim.Optimizer, fed by the engine."""

from steepest.linalg.kronecker import Cholesky, Eigenbasis, EigenbasisCorrected
from steepest.optim.balance import BalancedMetric
from steepest.optim.fisher import Empirical, Exact, MonteCarlo
from steepest.optim.fop import FOP, LayerDiagnostics
from steepest.optim.ggn import ggn_rows
from steepest.optim.gram import Solution
from steepest.optim.kalman import KalmanFilter
from steepest.optim.kfac import KFAC, KFACDiagnostics
from steepest.optim.leave_one_out import LeaveOneOut
from steepest.optim.levenberg import LevenbergMarquardt
from steepest.optim.lpsgd import LPSGD, LPSGDM, LPSGDDiagnostics
from steepest.optim.metric import KroneckerMetric
from steepest.optim.p_schedules import ConstantP, CosineAnnealingP, LinearAnnealingP
from steepest.optim.solvers import Damped, RandomizedSVD, Solver, TruncatedEigh, TruncatedSVD
from steepest.optim.sven import Sven
from steepest.optim.system import SvenDiagnostics

__all__ = [
    "FOP",
    "KFAC",
    "LPSGD",
    "LPSGDM",
    "BalancedMetric",
    "Cholesky",
    "ConstantP",
    "CosineAnnealingP",
    "Damped",
    "Eigenbasis",
    "EigenbasisCorrected",
    "Empirical",
    "Exact",
    "KFACDiagnostics",
    "KalmanFilter",
    "KroneckerMetric",
    "LPSGDDiagnostics",
    "LayerDiagnostics",
    "LeaveOneOut",
    "LevenbergMarquardt",
    "LinearAnnealingP",
    "MonteCarlo",
    "RandomizedSVD",
    "Solution",
    "Solver",
    "Sven",
    "SvenDiagnostics",
    "TruncatedEigh",
    "TruncatedSVD",
    "ggn_rows",
]
