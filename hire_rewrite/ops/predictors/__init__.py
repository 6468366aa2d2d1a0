"""Predictors guess all products of a matrix with a vector while reading little of it.

A predictor is a frozen dataclass with the methods of `Predictor`; another one is another file, and
a `register_predictor`.
"""

from hire_rewrite.ops.predictors.cascade import Cascade
from hire_rewrite.ops.predictors.lowrank import LowRank
from hire_rewrite.ops.predictors.protocol import (
    Certifying,
    Choose,
    Predictor,
    Proportional,
    Read,
    ScoresRows,
    State,
    Timed,
    certifies,
    optimistic,
    predictor_types,
    proportional,
    reads_of,
    register_predictor,
    written,
)
from hire_rewrite.ops.predictors.quantized import Quantized

__all__ = [
    "Cascade",
    "Certifying",
    "Choose",
    "LowRank",
    "Predictor",
    "Proportional",
    "Quantized",
    "Read",
    "ScoresRows",
    "State",
    "Timed",
    "certifies",
    "optimistic",
    "predictor_types",
    "proportional",
    "reads_of",
    "register_predictor",
    "written",
]
