"""Fewer bytes between replicas: half precision, and PowerSGD with error feedback."""

from tfdist.compression.settings import PowerSGD

__all__ = ["PowerSGD"]
