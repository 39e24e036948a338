"""Measures the mechanism of private training on a model: noise, clipping and sampling.

Everything is measured through `tfdist.fit(..., privacy=...)` itself, with an optimizer that
keeps the gradient it is given in place of the model's own. Nothing of the mechanism is
written down here a second time: what is expected comes from its definition.
"""

from tfdist.privacy.checking.checking import check
from tfdist.privacy.checking.report import CheckReport, Finding

__all__ = ["CheckReport", "Finding", "check"]
