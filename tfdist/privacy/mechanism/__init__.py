"""The private step: per-example gradients, clipped and summed, and the noise on the sum."""
