"""Commands of `nope-ros` that ask, register and estimate; those that judge and train are beside what they run."""
