"""Training that goes on: from a checkpoint, or when processes come and go."""
