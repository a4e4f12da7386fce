"""A model that was trained far too long on twenty-one images is caught by both measures; a healthy case passes."""
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cmr_diffusion.cohort.phantom import phantom_slices
from cmr_diffusion.core import CMRError, GridSlices, STRUCTURES
from cmr_diffusion.evaluation.copies import all_distances, copies, copy_table
from cmr_diffusion.evaluation.membership import membership
from cmr_diffusion.evaluation.neighbours import FLIPS, pixel_neighbours
from cmr_diffusion.evaluation.privacy import check_privacy, privacy, privacy_summary
from cmr_diffusion.grid.condition import ConditionSpec
from cmr_diffusion.grid.geometry import Geometry, place
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.model.checkpoint import Checkpoint
from cmr_diffusion.model.edm import EDMDenoiser, EDMRecipe
from cmr_diffusion.model.fast_spade import fast
from cmr_diffusion.model.painting import grid_condition, paint
from cmr_diffusion.model.sdm import SDM, sdm_config

GEOMETRY, TRANSFORM = Geometry(32, 4.5, 'heart'), ValueTransform('T1', 2000., 4095.)
SPEC = ConditionSpec((('T1', STRUCTURES),))
PATIENTS, STEPS, BATCH = 7, 1500, 7  # patients of the training, with three slices each; steps and images per step


def placed(patients): return [place(s, GEOMETRY) for s in phantom_slices(patients, types=('T1',), workers=1)]


def arrays(grids, train=()):
    "Slices on the grid as arrays; the patients named are the training patients."
    rows = pd.DataFrame([dict(patient=g.patient, type=g.type, slice=g.name) for g in grids])
    rows['split'] = np.where(rows.patient.isin(train), 'train', 'test')
    images = np.stack([TRANSFORM.forward(g.pixels)[None] for g in grids]).astype(np.float32)
    return GridSlices(images, np.stack([g.labels for g in grids]), rows)


def new_checkpoint():
    torch.manual_seed(0)
    model = SDM(sdm_config('tiny', label_channels=SPEC.channels, hidden=16, size=32))
    recipe = EDMRecipe(sigma_data=.4, p_mean=-.8, p_std=1.2)
    return Checkpoint(EDMDenoiser(model, recipe), SPEC, {'T1': TRANSFORM}, GEOMETRY)


@pytest.fixture(scope='module')
def grids(): return placed(20)


@pytest.fixture(scope='module')
def real(grids):
    names = list(dict.fromkeys(g.patient for g in grids))
    return arrays(grids, names[:PATIENTS])


@pytest.fixture(scope='module')
def fresh(): return arrays(placed(range(21, 29)))


@pytest.fixture(scope='module')
def overfitted(grids, real):
    "Train on the same few images until they are known by heart."
    known, checkpoint = grids[:3 * PATIENTS], new_checkpoint()
    denoise, x0 = checkpoint.denoise, torch.tensor(real.images[:3 * PATIENTS])
    fast(denoise.model)
    condition, generator = grid_condition(SPEC, known), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(denoise.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=.1)
    for _ in range(STEPS):
        some = torch.randperm(len(known), generator=generator)[:BATCH]
        noise = torch.randn(x0[some].shape, generator=generator)
        loss = denoise.loss(x0[some], condition[some], denoise.draw(BATCH, generator), noise)['loss'].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    denoise.model.eval()
    return checkpoint


@pytest.mark.skipif('CMR_SLOW' not in os.environ, reason='slow: set CMR_SLOW=1')
def test_overfitted_model_is_caught_by_both(overfitted, grids, real):
    known = grids[:3 * PATIENTS]
    painted = arrays(paint(overfitted, known, list(range(len(known))), fast=False))
    part = privacy(real, painted, overfitted)
    print(part.note.replace('; ', '\n'), *part.lines, sep='\n')
    table = part.table.set_index('test')
    assert table.flagged['pixels'] > len(known) / 2 and table.caught['pixels'] > .5
    assert (table.auc_low[['loss', 'sima']] > .7).all()
    assert 'COPIES' in part.note and 'CAN BE TOLD' in part.note
    for limits in (dict(max_copies=0), dict(max_copies=.2), dict(max_auc=.7)):
        with pytest.raises(CMRError, match='allows'): check_privacy(part, **limits)


def test_healthy_case_passes(real, fresh):
    "Images of patients whom nobody has trained on, and a network that has seen nobody."
    part = privacy(real, fresh, new_checkpoint())
    table = part.table.set_index('test')
    assert table.flagged['pixels'] == 0 and table.caught['pixels'] > .5
    assert (table.auc_low[['loss', 'sima']] < .5).all() and (table.auc_high[['loss', 'sima']] > .5).all()
    assert 'COPIES' not in part.note and 'CAN BE TOLD' not in part.note
    check_privacy(part, max_copies=0, max_auc=1.)
    assert privacy_summary(part)['assessed']


@pytest.mark.parametrize('noise, least', [(0., 1.), (.02, .9)])
@pytest.mark.parametrize('flip', FLIPS)
@pytest.mark.parametrize('move', [(0, 0), (1, -2)])
def test_planted_copies_are_found(real, noise, least, flip, move):
    "Exact and slightly noised ones, flipped and moved by whole pixels, each with its own training image."
    training, (row, column) = real.of('train'), FLIPS[flip]
    images, label_maps = (np.roll(a[..., ::row, ::column], move, (-2, -1))
                          for a in (training.images, training.label_maps))
    images = images + noise * np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    found = pixel_neighbours(replace(training, images=images, label_maps=label_maps), training)
    assert (found.position == np.arange(len(training))).mean() >= least
    assert found.distance.median() < .35


def test_share_of_copies_is_counted(real, fresh):
    training = real.of('train')
    for n in (1, 6):
        some = fresh[n:] + training[:n]  # exact copies; of moved and noisy ones, not all are caught
        row = copy_table(all_distances(some, real)).iloc[0]
        assert row.flagged == n and row.images == len(fresh), row
        assert row.copies_low <= row.copies <= row.copies_high


def test_types_are_kept_apart(real, fresh):
    "A copy is not found among images of another type, and a type without training images is left out."
    training = real.of('train')
    other = replace(training, rows=training.rows.assign(type='T2'))
    assert copy_table(all_distances(other, real)).caught.isna().all()
    assert copies(real, other).table is None
    part = privacy(real, fresh + other)
    assert part.table.type.tolist() == ['T1', 'T2'] and part.table.flagged[0] == 0
    with pytest.raises(CMRError, match='copies of T2 could not'): check_privacy(part, max_copies=0)


def test_groups_that_differ_by_themselves_are_noticed(real):
    "Members are less noisy: an attack succeeds without any memory, and so does the blind attacker."
    noise = .3 * np.random.default_rng(0).standard_normal(real.images.shape).astype(np.float32)
    held = (real.rows.split != 'train').to_numpy()[:, None, None, None]
    part = membership(replace(real, images=real.images + held * noise), new_checkpoint())
    assert (part.table.blind_low > .9).all()
    found = privacy(replace(real, images=real.images + held * noise), real[[]], new_checkpoint())
    assert 'differ without any model' in found.note and 'CAN BE TOLD' not in found.note
