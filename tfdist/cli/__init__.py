"""The command line. It does not import TensorFlow."""

from tfdist.cli.commands import main

__all__ = ["main"]
