"""The pictures of docs/tutorial.md: ``python -P -m nope_ros.demo.tutorial`` in the checkout.

Everything in them comes from the packaged weights and the bundled sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from nope_ros import draw
from nope_ros.demo.run import bundled_sequence
from nope_ros.estimator import PoseEstimator
from nope_ros.recording import Moment, open_recording
from nope_ros.rotations import geodesic_distance

Picture = NDArray[np.uint8]
Rotation = NDArray[np.float64]
_LATER = 12  # of the bundled sequence's frames, the one whose mask is spoilt
_REFERENCES = range(0, 45, 8)  # frames of the bundled sequence, which goes round the object twice, to register from
_APART = 6  # frames from the reference to those in which the object is found again


def references(estimator: PoseEstimator) -> Picture:
    """Views to register from, and how sure the estimator is a little later, on either side."""
    moments = list(open_recording(bundled_sequence()))
    pictures, captions, good = [], [], []
    for index in _REFERENCES:
        reference = moments[index % len(moments)]
        known = estimator.register(reference.image, reference.mask, reference.camera)
        later = [moments[(index + step) % len(moments)] for step in (-_APART, _APART)]
        sure = np.mean([estimator.estimate(one.image, one.mask, one.camera, known).confidence for one in later])
        pictures.append(draw.mask_only(reference.image, reference.mask))
        turned = [geodesic_distance(_truth(one), _truth(reference)) for one in later]
        captions.append(f"{np.degrees(np.mean(turned)):.0f}° further on: confidence {sure:.2f}")
        good.append(bool(sure >= 0.5))
    return draw.contact_sheet(pictures, captions, columns=3, cell_width=320, good=good)


def _truth(moment: Moment) -> Rotation:
    assert moment.truth is not None, "the bundled sequence is rendered"
    return moment.truth.R_camera_object


def masks(estimator: PoseEstimator) -> Picture:
    """What a mask's outline does to the distance: as it should be, too wide, and half of it missing."""
    moments = list(open_recording(bundled_sequence(), limit=_LATER))
    first, later = moments[0], moments[-1]
    known = estimator.register(first.image, first.mask, first.camera, reference_distance=1.0)
    fits = later.mask.astype(np.uint8)
    half = fits.copy()
    half[:, : int(np.median(np.nonzero(fits)[1]))] = 0
    wide = cv2.dilate(fits, np.ones((3, 3), np.uint8), iterations=max(2, round(0.06 * np.sqrt(fits.sum()))))
    pictures, captions, right = [], [], 0.0
    for name, mask in (("it fits", fits), ("too wide", wide), ("half of it", half)):
        pose = estimator.estimate(later.image, mask, later.camera, known)
        distance = float(np.linalg.norm(pose.t_camera_object))
        right = right or distance
        off = 100 * (distance / right - 1)
        image, cut, _ = draw.zoomed(later.image, mask > 0, later.camera.K, 320, 320, fill=0.5)
        pictures.append(draw.draw_outline(image, cut, (255, 210, 60)))
        captions.append(name if name == "it fits" else f"{name}: {abs(off):.0f} % too {'far' if off > 0 else 'near'}")
    return draw.contact_sheet(pictures, captions, columns=3, cell_width=320, good=(True, False, False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(prog="python -P -m nope_ros.demo.tutorial", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (%(default)s)")
    out: Path = parser.parse_args(arguments).out
    estimator = PoseEstimator.from_pretrained(device="cpu")
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in (("references", references(estimator)), ("masks", masks(estimator))):
        cv2.imwrite(str(out / f"tutorial_{name}.jpg"), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main()
