"""Sparse training beside quantised weights."""

from .formats import dequantized as dequantized
from .sparse import QuantizedSparse as QuantizedSparse
