"""Builds and installs Horovod's wheel for the installed TensorFlow, without importing it."""
