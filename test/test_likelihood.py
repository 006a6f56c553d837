"""The training loss: what it calls zero, and what it calls good."""

import numpy as np
import pytest
import torch

from nope_ros.harmonics import rotate, wigner_d
from nope_ros.rotations import exp
from nope_ros.training.likelihood import Candidates, PairPrior, candidates, pose_loss, upright_loss

BANDWIDTH = 4


def upright(rng, count):
    """Level views at any azimuth: the object's z points up, the camera's y down."""
    level = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    tilt, yaw = np.zeros((2, count, 3))
    tilt[:, 0] = rng.uniform(-1.2, 1.2, count)
    yaw[:, 2] = rng.uniform(-np.pi, np.pi, count)
    return exp(tilt) @ level @ exp(yaw)


@pytest.fixture(scope="module")
def samples() -> Candidates:
    rng = np.random.default_rng(0)
    together = 1 - rng.uniform(0, 1, 5000) ** 2  # near views come more often
    prior = PairPrior.of(together, rng.uniform(-1, 1, 5000))
    return candidates(BANDWIDTH, 10.0, 0, upright(rng, 1500), prior, prior)


def pairs(rng, count):
    """Latents of views of random objects whose every side is seen, and their upright orientations."""
    R_query, R_reference = (torch.from_numpy(upright(rng, count)).float() for _ in range(2))
    objects = torch.from_numpy(rng.normal(size=(count, (BANDWIDTH + 1) ** 2, 8))).float()
    return (*(rotate(objects, wigner_d(R, BANDWIDTH)) for R in (R_query, R_reference)), R_query, R_reference)


def test_knowing_nothing_costs_nothing_whatever_the_prior(samples):
    query, _, R_query, R_reference = pairs(np.random.default_rng(1), 6)
    none = torch.zeros_like(query)
    free, _ = pose_loss(none, none, R_query @ R_reference.mT, torch.tensor(1.0), samples)
    level, _ = upright_loss(none, none, R_query, R_reference, torch.tensor(1.0), samples)
    assert free.abs().max() < 1e-3
    assert level.abs().max() < 1e-4


def test_the_loss_of_right_latents_is_low_and_their_choice_right(samples):
    query, reference, R_query, R_reference = pairs(np.random.default_rng(2), 8)
    scale = torch.tensor(0.1)
    free, _ = pose_loss(query, reference, R_query @ R_reference.mT, scale, samples)
    level, logits = upright_loss(query, reference, R_query, R_reference, scale, samples, jitter_deg=1.0)
    assert free.max() < -2
    assert level.max() < -2
    chosen = samples.views[logits.argmax(1)]
    cosine = ((chosen * R_query).sum((1, 2)) - 1) / 2
    assert torch.rad2deg(torch.arccos(cosine.clip(-1, 1))).max() < 12


def test_wrong_latents_cost_more_than_knowing_nothing(samples):
    query, reference, R_query, R_reference = pairs(np.random.default_rng(3), 8)
    other = query.roll(1, 0)
    level, _ = upright_loss(other, reference, R_query, R_reference, torch.tensor(0.2), samples)
    free, _ = pose_loss(other, reference, R_query @ R_reference.mT, torch.tensor(0.2), samples)
    assert level.mean() > 0.5
    assert free.mean() > 0.5


def test_finding_frequent_pairs_pays_less_when_the_prior_knows_them(samples):
    """What every view has in common, here a pattern that faces the camera, finds all views alike."""
    rng = np.random.default_rng(4)
    R_reference = torch.from_numpy(upright(rng, 200)).float()
    R_query = torch.from_numpy(exp(0.4 * rng.normal(size=(200, 3)))).float() @ R_reference
    facing = torch.from_numpy(rng.normal(size=(BANDWIDTH + 1) ** 2)).float()[None, :, None].expand(200, -1, 1)
    flat = Candidates(**{**vars(samples), "prior_upright": PairPrior(torch.zeros(20))})
    known, unknown = (
        upright_loss(facing, facing, R_query, R_reference, torch.tensor(0.1), given)[0].mean()
        for given in (samples, flat)
    )
    assert known > unknown + 0.05
