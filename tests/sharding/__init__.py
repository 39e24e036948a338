"""The optimizer's state in parts."""
