"""Rules of the project's own, which `make lint` checks."""
