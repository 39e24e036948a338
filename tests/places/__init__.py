"""Places: clusters of real processes that live as long as the test session.

Starting TensorFlow takes seconds and tracing most of the rest, so tests share clusters. A test
names what must be done and where, by `on`; all of it is handed to one run of `program` a place.
"""
