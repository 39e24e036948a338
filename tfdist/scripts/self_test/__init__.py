"""The program that the workers of `tfdist test` run."""
