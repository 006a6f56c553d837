"""The networks: each predicts templates from a reference latent and rotations."""
