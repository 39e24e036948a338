"""What an audit's scores mean: attacks, lower bounds of epsilon. No TensorFlow is needed."""
