"""Measures the mechanism of private training on a model: noise, clipping and sampling.

All measurements run `tfdist.fit(..., privacy=...)` itself, with an optimizer that records its
gradients instead of the model's own optimizer. The expected values come from the definition of
the mechanism, not from a second implementation of it.
"""

from tfdist.privacy.checking.checking import check
from tfdist.privacy.checking.report import CheckReport, Finding

__all__ = ["CheckReport", "Finding", "check"]
