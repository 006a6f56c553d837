"""Recorded sequences: read, judged, played into ROS, and run through the real node."""
