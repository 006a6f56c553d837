"""The same walk as ``nope_ros.estimator``, over ROS topics."""

from nope_ros.node.interfaces import provide

# Before any module of this package imports a message.
provide()
