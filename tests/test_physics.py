"""What the fidelity measures of physics say of cohorts with other types, spacings and patients."""
from dataclasses import replace

import numpy as np
import pytest

from cmr_diffusion.core import BACKGROUND, PADDING
from cmr_diffusion.evaluation.physics import controls, darkest_region, noise_level, physics, physics_table, septum
from cmr_diffusion.grid.geometry import Geometry
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.toy import toy_grid

TRANSFORMS = {'T1': ValueTransform('T1', 2000., 4095.), 'cine': ValueTransform('cine', 1.2, 4.)}
GEOMETRY = Geometry(48, 1.5)


@pytest.fixture(scope='module')
def real(): return toy_grid(8, image_types=('T1', 'cine'), size=48, noise=.05)


def judged(table): return table.set_index(['type', 'measure', 'structure']).verdict


def test_each_control_is_caught_in_every_type(real):
    "Blur, shift (30 ms, or 3 % of the range) and noise are found by the measure meant for each."
    spoilt = controls(real, TRANSFORMS, GEOMETRY)
    for name, measure in dict(blurred='fine detail', shifted='values', noisy='noise').items():
        found = physics_table(real, spoilt[name], TRANSFORMS, GEOMETRY, splits=10)
        own = found[found.measure == measure]
        assert set(own.type) == {'T1', 'cine'} and (own.verdict == 'beyond').all(), own
    shifted = physics_table(real, spoilt['shifted'], TRANSFORMS, GEOMETRY, splits=10)
    cine = shifted[(shifted.type == 'cine') & (shifted.measure == 'values')]
    assert np.allclose(cine.difference, .03, atol=.003) and set(cine.unit) == {'rel'}


def test_a_seed_decides(real):
    one, again = (physics_table(real, real, TRANSFORMS, GEOMETRY, splits=5, seed=3) for _ in range(2))
    assert one.equals(again)


def test_padding_is_never_measured(real):
    "Whatever stands in the padding, no number changes."
    loud = np.where(real.label_maps[:, None] == PADDING, 3., real.images).astype(np.float32)
    found = physics_table(real, replace(real, images=loud), TRANSFORMS, GEOMETRY, splits=5)
    assert set(found[found.measure != 'noise'].verdict) == {'within'}
    assert np.allclose(found[found.measure != 'noise'].difference, 0, atol=1e-6), found


def test_unknown_spacing_and_a_type_of_one_side(real):
    rows = real.rows.assign(row_spacing=np.nan, column_spacing=np.nan)
    unknown = replace(real, rows=rows)
    spoilt = controls(unknown, TRANSFORMS, Geometry(48, 'native'))
    assert all(np.isfinite(some.images).all() for some in spoilt.values())
    found = physics_table(unknown.of(image_type='T1'), unknown, TRANSFORMS, Geometry(48, 'native'), splits=5)
    assert set(found.type) == {'T1'}
    assert physics(real.of(image_type='T1'), real.of(image_type='cine'), TRANSFORMS, GEOMETRY).table is None


def test_air_without_noise_and_hearts_without_a_right_ventricle():
    values, labels = np.zeros((32, 32)), np.full((32, 32), BACKGROUND, np.uint8)
    assert noise_level(values, darkest_region(values, labels)) == 0
    assert not darkest_region(values, np.ones_like(labels)).any()
    labels[10:20, 10:20] = 1
    assert not septum(labels).any()
    silent = toy_grid(6, size=48, noise=0)
    found = physics_table(silent, silent, TRANSFORMS, GEOMETRY, splits=5)
    assert not ((found.measure == 'noise') & (found.structure == 'background')).any()


def test_a_part_says_why_it_is_missing(real):
    part = physics(real, replace(real, rows=real.rows.assign(split='val')), TRANSFORMS, GEOMETRY)
    assert part.table is None and 'no slice' in part.note
    few = real[real.rows.patient.isin(real.rows.patient.unique()[:3]).to_numpy()]
    part = physics(few, few, TRANSFORMS, GEOMETRY)
    assert part.table is None and '4 or more' in part.note
