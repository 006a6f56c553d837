"""The same walk as ``nope_ros.estimator``, over ROS topics."""
