"""Meshes from files, and pictures of them: for objects that have one, for evaluation, and for training."""
