"""Runs users' scripts in the processes that `tfdist run` starts, and adapts Keras for them."""
