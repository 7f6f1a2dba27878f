"""Seeing where time and memory go: NVTX spans that cost nothing while they are off. Needs torch only."""

from __future__ import annotations

from reca.profiling.span import enable_spans as enable_spans
from reca.profiling.span import span as span
from reca.profiling.span import spans_enabled as spans_enabled
