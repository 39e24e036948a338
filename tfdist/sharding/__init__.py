"""The optimizer's state in parts, one on each replica (`tfdist.Zero`)."""
