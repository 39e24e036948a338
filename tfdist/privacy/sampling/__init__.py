"""Samplers of private training: the examples or users of each step."""
