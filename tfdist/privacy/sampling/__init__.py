"""Who takes part in which private step."""
