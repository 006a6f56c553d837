"""Renders objects and learns weights from the renders."""
