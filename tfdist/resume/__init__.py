"""Continues a training: from a checkpoint, or when processes join or leave."""
