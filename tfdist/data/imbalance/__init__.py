"""Reports, losses, splits and metrics for rare classes: `tfdist.imbalance` has their names."""
