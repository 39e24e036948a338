"""A model's layers on several devices, which work on a batch one after the other."""
