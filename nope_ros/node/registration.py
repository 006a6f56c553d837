"""From a service request to a registered object, without a node."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Frame, InputError
from nope_ros.node import messages
from nope_ros.node.distro import nanoseconds
from nope_ros.node.gravity import Gravity
from nope_ros.node.pairing import FrameMessages
from nope_ros.srv import RegisterObject

STALE = 60.0
"""Seconds after which the latest frame is no longer what stands before the camera."""


def requested_messages(request: RegisterObject.Request, latest: FrameMessages | None) -> FrameMessages:
    """The messages to register from: those of the request, or the latest frame if it has none.

    Raises:
        InputError: if the request has some of them only, or there is no frame, or none of the last minute.
    """
    given = {
        "image": request.image.height > 0,
        "mask": request.mask.height > 0,
        "camera_info": request.camera_info.height > 0,
    }
    if not any(given.values()):
        if latest is None:
            raise InputError("no frame of image, mask and camera_info has been received yet; send one, or give one")
        age = time.monotonic() - latest.came
        if age > STALE:
            raise InputError(
                f"the latest frame that has a mask is of {age:.0f} s ago, and what it shows may be gone; does the "
                "segmentation still run? Send a mask, or give image, mask and camera_info in the request"
            )
        return latest
    if not all(given.values()):
        missing = ", ".join(name for name, there in given.items() if not there)
        raise InputError(f"request: {missing} is empty; give image, mask and camera_info, or none for the latest frame")
    depth = request.depth if request.depth.height > 0 else None
    stamp = nanoseconds(request.image.header.stamp)
    return FrameMessages(stamp, request.image, request.mask, request.camera_info, depth)


def reference_frame(received: FrameMessages, instance: int, *, rectified: bool) -> Frame:
    """The frame that an object is registered from.

    Args:
        received: its messages.
        instance: id in the mask; 0: the only one there is.
        rectified: whether the image has been undistorted already.

    Raises:
        InputError: if it can't be, or shows the object in part only.
    """
    messages.check_together(received.image, received.mask, received.camera_info)
    ids = messages.mask_array(received.mask)
    present = messages.instances(ids, at_most=20)
    if instance == 0 and len(present) > 1:
        raise InputError(f"instance: the mask holds {_listed(present)}; say which one is the object")
    if instance != 0 and present and instance not in present:
        raise InputError(f"instance: {instance} is not in the mask, which holds {_listed(present)}")
    frame = Frame.from_arrays(
        messages.image_array(received.image),
        ids == instance if instance else ids,
        messages.camera(received.camera_info, rectified=rectified),
        None if received.depth is None else messages.depth_array(received.depth),
    )
    if frame.touches_border:
        raise InputError("mask: the object reaches the image's border, a part of it is not seen; move it to the middle")
    return frame


def mesh_path(name: str, folder: str) -> Path:
    """The file that a request names: in the folder that meshes may be read from, wherever links in it lead.

    Raises:
        InputError: if there is no such folder, or the file is elsewhere. It does not say whether there is such a file.
    """
    if not folder:
        raise InputError(
            "mesh_file: this node may read no meshes; start it with the parameter mesh.directory, the folder they are "
            "in, or use `nope-ros register NAME --mesh FILE` beside it"
        )
    root = Path(folder).expanduser().resolve()
    try:
        path = (root / name).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a link to itself
        raise InputError(f"mesh_file: {name[:100]!r} is no name of a file") from None
    if not path.is_relative_to(root):
        raise InputError(f"mesh_file: {name[:100]!r} leads out of mesh.directory ({folder}); put the mesh there")
    return path


def register_mesh(estimator: PoseEstimator, request: RegisterObject.Request, folder: str) -> RegisteredObject:
    """Learn an object from the mesh that a request names.

    Args:
        estimator: the model.
        request: all of it.
        folder: that meshes may be read from.

    Raises:
        InputError: if the file cannot be used, or the request says what does not go with a mesh.
    """
    beside = {
        "image": request.image.height > 0,
        "mask": request.mask.height > 0,
        "reference_distance": request.reference_distance != 0,
        "use_reference_pose": request.use_reference_pose,
    }
    if any(beside.values()):
        named = ", ".join(name for name, there in beside.items() if there)
        raise InputError(
            f"request: {named} does not go with mesh_file, which has its own frame and scale; leave it out"
        )
    down = np.array([request.gravity.x, request.gravity.y, request.gravity.z])
    return estimator.register_mesh(
        mesh_path(request.mesh_file, folder),
        object_id=request.object_id,
        object_diameter=_known(request.object_diameter),
        gravity_object=down if down.any() else None,
    )


def register(
    estimator: PoseEstimator,
    request: RegisterObject.Request,
    received: FrameMessages,
    gravity: Gravity,
    *,
    rectified: bool,
) -> RegisteredObject:
    """Learn an object.

    Args:
        estimator: the model.
        request: everything but the messages.
        received: the messages.
        gravity: asked for the moment of the image where the request says nothing of it.
        rectified: whether the image has been undistorted already.

    Raises:
        InputError: naming what does not fit.
    """
    frame = reference_frame(received, request.instance, rectified=rectified)
    R, t = messages.pose_arrays(request.reference_pose) if request.use_reference_pose else (None, None)
    given = np.array([request.gravity.x, request.gravity.y, request.gravity.z])
    # That the node's source does not answer is an error here: an object registered without gravity lacks it for good.
    down = given if given.any() else gravity.down(received.image.header.frame_id, received.stamp)
    return estimator.register_frame(
        frame,
        object_id=request.object_id,
        reference_distance=_known(request.reference_distance),
        object_diameter=_known(request.object_diameter),
        R_camera_object=R,
        t_camera_object=t,
        gravity_camera=down,
    )


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ids)))


def _known(length: float) -> float | None:
    return None if length == 0 else length
