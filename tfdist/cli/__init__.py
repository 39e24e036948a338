"""The command line. No TensorFlow is needed here."""

from tfdist.cli.commands import main

__all__ = ["main"]
