"""One `fit`: what is asked for, who takes part, and the straight line through it."""
