"""From what was found in an image to messages that tell of it: the node publishes them, `nope-ros bag` records them.

Each kind is made when it is asked for: some cost more than the pose, and often nobody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from geometry_msgs.msg import PoseWithCovarianceStamped, TransformStamped
from sensor_msgs.msg import Image
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import MarkerArray

from nope_ros.draw import Drawn, overlay
from nope_ros.msg import ObjectPoseArray, PoseDistribution
from nope_ros.node import messages
from nope_ros.node.estimation import Result
from nope_ros.node.parameters import Settings


@dataclass(frozen=True)
class Outputs:
    """The messages of one image.

    Attributes:
        result: what was found in it.
        settings: thresholds and names.
    """

    result: Result
    settings: Settings

    @cached_property
    def trusted(self) -> dict[str, bool]:
        """By object, whether its pose is for TF."""
        return {
            one.estimate.object_id: one.estimate.confidence >= self.settings.confidence_threshold
            for one in self.result.seen
        }

    @property
    def present(self) -> frozenset[str]:
        """The objects that were seen."""
        return frozenset(one.estimate.object_id for one in self.result.seen)

    def transforms(self, complain: Callable[[object], None]) -> list[TransformStamped]:
        """Trusted poses, for TF; none if the parameters say so, or the frames' names make it impossible."""
        parent = self.result.header.frame_id
        seen = [one for one in self.result.seen if self.trusted[one.estimate.object_id]]
        if not self.settings.tf_publish or not seen:
            return []
        if not parent:
            complain("image: header.frame_id is empty, so nothing can be broadcast on TF; set it in the camera driver")
            return []
        transforms = []
        taken = {
            self.settings.gravity_frame: "the frame that tells gravity",
            self.settings.tracking_fixed_frame: "the frame that objects do not move in",
            parent: "the camera's own frame",
        }
        for one in seen:
            child = self.settings.tf_prefix + one.estimate.object_id
            if child in taken:
                complain(f"TF: '{child}' is {taken[child]}; rename the object or set the parameter 'tf.prefix'")
                continue
            transforms.append(messages.transform(self.result.header, child, one.estimate))
        return transforms

    def object_poses(self) -> Iterator[tuple[str, PoseWithCovarianceStamped]]:
        """Each object's id and pose."""
        for one in self.result.seen:
            yield (
                one.estimate.object_id,
                messages.pose_with_covariance_stamped(self.result.header, one.estimate),
            )

    def poses(self) -> ObjectPoseArray:
        """All objects in full."""
        poses = [
            messages.object_pose(one.estimate, one.instance, trusted=self.trusted[one.estimate.object_id])
            for one in self.result.seen
        ]
        return messages.object_poses(self.result.header, poses)

    def detections(self) -> Detection3DArray:
        """All objects, for users of vision_msgs."""
        header = self.result.header
        found = [
            messages.detection(header, one.estimate, one.centre_object, 2 * one.radius) for one in self.result.seen
        ]
        return messages.detections(header, found)

    def distributions(self) -> Iterator[PoseDistribution]:
        """One for each object."""
        for one in self.result.seen:
            yield messages.distribution(self.result.header, one.estimate, self.settings.distribution_count)

    def markers(self, before: Collection[str]) -> MarkerArray:
        """For RViz.

        Args:
            before: objects that have markers; those that were not seen lose them.
        """
        drawn = [(one.estimate, one.radius) for one in self.result.seen]
        return messages.markers(self.result.header, drawn, sorted(set(before) - self.present))

    def overlay(self) -> Image:
        """The image with the poses drawn in."""
        K = self.result.camera.K
        things = [Drawn.of(one.estimate, one.mask, K, self.trusted[one.estimate.object_id]) for one in self.result.seen]
        return messages.image(self.result.header, overlay(self.result.image, K, things))
