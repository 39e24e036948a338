"""Gets Horovod: its wheel, built for the installed TensorFlow. No TensorFlow is needed."""
