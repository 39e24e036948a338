"""Fewer bytes between replicas: half precision, and PowerSGD with error feedback."""

from tfdist.compression.settings import PowerSGD
from tfdist.compression.traffic import Traffic, bytes_per_step

__all__ = ["PowerSGD", "Traffic", "bytes_per_step"]
