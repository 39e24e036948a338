"""Programs as their authors wrote them, run as they are and on every kind of place.

`scripts/` has ordinary scripts that know nothing of tfdist. `expected` says what holds for each
of them where, and `table` writes the page of the documentation that says so.
"""
