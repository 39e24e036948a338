"""`tfdist test`: whether the hosts reach each other, their links, and what was measured.

No TensorFlow is needed here. What the workers run is in `tfdist.scripts.self_test`.
"""
