"""The train, test and predict step: what each replica computes, and what all make of it."""
