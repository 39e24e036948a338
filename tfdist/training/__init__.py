"""One `fit`: its request, its extensions, and the sequence of its steps (`run.py`)."""
