"""Label maps are deformed, whatever is drawn in them: the topology is kept, and nothing breaks."""
import numpy as np
import pytest

from cmr_diffusion.cohort.shapes import shape_limits, shape_of
from cmr_diffusion.core import BACKGROUND, LEFT_VENTRICLE, MYOCARDIUM, PADDING, RIGHT_VENTRICLE, Slice
from cmr_diffusion.synthesis.deformation import deform, deform_patient, draw_deformation, topology
from cmr_diffusion.toy import toy_label_map, toy_slices


def part(number, *index):
    "A map of 20 x 24 pixels with a structure in a part of it."
    labels = np.zeros((20, 24), np.uint8)
    labels[index or np.s_[:]] = number
    return labels


def with_part(labels, number, *index):
    labels = labels.copy()
    labels[index] = number
    return labels


HEARTS = (MYOCARDIUM, LEFT_VENTRICLE, RIGHT_VENTRICLE)
PLACES = (np.s_[5, 6], np.s_[5, 6:8], np.s_[0, 0], np.s_[:, :], np.s_[:, 3])
CAVITY, WALL = part(LEFT_VENTRICLE, slice(5, 9), slice(6, 9)), part(MYOCARDIUM, slice(5, 9), slice(6, 9))
STRANGE = [part(n, *place) for n in HEARTS for place in PLACES] + [
    CAVITY,  # without a wall
    with_part(WALL, LEFT_VENTRICLE, 6, 7), with_part(CAVITY, MYOCARDIUM, 6, 7),  # a cavity in a wall, and the reverse
    with_part(WALL, LEFT_VENTRICLE, slice(12, 15), slice(12, 15)),  # side by side
    part(BACKGROUND), part(PADDING),
    with_part(with_part(WALL, PADDING, slice(10, 20)), PADDING, slice(None), slice(20, 24))]


def noise(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, rng.integers(1, 30, 2)).astype(np.uint8)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('spacing', [(1., 1.), (.3, 2.5), (10., 8.)])
def test_whatever_is_drawn(spacing):
    for labels in STRANGE + [noise(n) for n in range(30)]:
        s = Slice(labels.astype(np.float32), spacing, 'T1', labels)
        new, = deform_patient([s], np.random.default_rng(1), shape_limits([s]))
        assert (new.shape, new.dtype) == (labels.shape, np.uint8)
        assert topology(new) == topology(labels) and ((new == PADDING) == (labels == PADDING)).all()
        free = deform(labels, spacing, draw_deformation(np.random.default_rng(2)))  # not checked, and not broken
        assert set(np.unique(free)) <= set(np.unique(labels)) | {BACKGROUND}


def test_the_slices_of_a_patient_turn_together():
    "The right ventricle lies in the same direction from the left one in all slices, before and after."
    def directions(maps):
        found = []
        for labels in maps:
            row, column = (np.argwhere(labels == RIGHT_VENTRICLE).mean(0)
                           - np.argwhere((labels == LEFT_VENTRICLE) | (labels == MYOCARDIUM)).mean(0))
            found.append(np.degrees(np.arctan2(row, column)) % 360)
        return np.array(found)
    slices = toy_slices(1, ('T1', 'T2'))
    limits = shape_limits(toy_slices(12))
    before, turned = directions([s.labels for s in slices]), []
    for seed in range(6):
        after = directions(deform_patient(slices, np.random.default_rng(seed), limits))
        assert np.ptp(after - before) < 9
        turned.append((after - before).mean())
    assert np.ptp(turned) > 5


def test_a_range_of_hearts_that_is_kept():
    slices = toy_slices(6, ('T1',))
    limits = shape_limits(slices)
    for first in range(0, len(slices), 3):
        own = slices[first:first + 3]
        for s, new in zip(own, deform_patient(own, np.random.default_rng(first), limits), strict=True):
            found = shape_of(new, s.spacing)
            assert all(low <= one <= high for low, one, high in zip(limits.low, found, limits.high))


def test_the_same_numbers_give_the_same_heart():
    labels = toy_label_map(64, 3)
    one, two, other = (draw_deformation(np.random.default_rng(n)) for n in (5, 5, 6))
    assert (deform(labels, (1.5, 1.5), one) == deform(labels, (1.5, 1.5), two)).all()
    assert (deform(labels, (1.5, 1.5), one) != deform(labels, (1.5, 1.5), other)).any()
