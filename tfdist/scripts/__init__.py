"""Scripts as people write them, in the processes that `tfdist run` starts."""
