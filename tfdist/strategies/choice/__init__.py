"""The choice of a strategy: predictions for each of them, reasons, and what would be faster.

Nothing here needs TensorFlow, a device or a model: a `Workload` and a `Hardware` say it all.
"""
