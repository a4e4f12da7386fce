"""What an evaluation says of cohorts whose properties are known, from the painting to the report."""
import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cmr_diffusion import CMRError, Geometry, prepare, read_cohort, synthesize
from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.levels import LEVELS, slice_levels
from cmr_diffusion.core import PADDING, shared_data, STRUCTURES
from cmr_diffusion.evaluation.overlap import Part
from cmr_diffusion.evaluation.patients import icc_table, neighbour_table
from cmr_diffusion.evaluation.report import _check_splits, evaluate, read_synthetic
from cmr_diffusion.evaluation.segmentation import SegConfig
from cmr_diffusion.evaluation.tissue import ASKED, tissue
from cmr_diffusion.grid.loaders import grid_slices
from cmr_diffusion.grid.tissue import measure_slices, TissueModel
from cmr_diffusion.model.checkpoint import Checkpoint
from cmr_diffusion.model.edm import EDMDenoiser
from cmr_diffusion.model.sdm import SDM, sdm_config
from cmr_diffusion.synthesis import cohort as synthesis
from cmr_diffusion.synthesis.phantom_masks import phantom_masks
from cmr_diffusion.toy import toy_cohort, toy_grid

PAINTING = dict(steps=1, precision='float32', device='cpu')
SHORT = SegConfig(decoder=(16, 16), steps=2, batch_size=8)


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('evaluation').resolve()


@pytest.fixture(scope='module')
def cache(work):
    "T1 and T2 maps of eight patients, three of them of the test split."
    splits = ('train', 'test', 'train', 'test', 'train', 'val', 'test', 'train')
    cohort = read_cohort(toy_cohort(work/'toy', 8, splits=splits, shape=48), 'csv')
    return prepare(cohort, work/'cache', Geometry(32, 2., 'heart'), workers=0)


def untrained(cache, seed):
    "A network that has learned nothing, with the tissue values of the training patients."
    torch.manual_seed(seed)
    model = SDM(sdm_config('tiny', label_channels=cache.spec.channels, hidden=8, values=True))
    known = grid_slices(cache, 'train')
    measured = measure_slices(known, cache.spec, cache.values)
    tissues = TissueModel.fit(measured, known.rows.patient, cache.spec.names)
    return Checkpoint(EDMDenoiser(model), cache.spec, cache.values, cache.geometry, dict(run_id=None), tissues)


@pytest.fixture(scope='module')
def checkpoint(cache): return untrained(cache, 0)


def obedient(checkpoint, grids, seeds, values=None, **options):
    "Paint as a perfect model would: what is asked for is the mean of the structure, and noise lies about it."
    painted = []
    for grid, seed, asked in zip(grids, seeds, values):
        rng, scale = np.random.default_rng(seed), .05 if grid.type == 'T1' else .02
        pixels = np.zeros(grid.labels.shape, np.float32)
        for n, name in enumerate(STRUCTURES):
            inside = grid.labels == n
            noise = rng.standard_normal(inside.sum())
            mean = asked.get(name, 500.)
            pixels[inside] = mean * (1 + scale * (noise - noise.mean()))
        pixels[grid.labels == PADDING] = 0
        painted.append(replace(grid, pixels=pixels))
    return painted


@pytest.fixture
def obeyed(monkeypatch): monkeypatch.setattr(synthesis, 'paint', obedient)


def with_asked(cohort, change):
    "Change the manifest of a cohort."
    path = cohort/'manifest.parquet'
    change(pd.read_parquet(path)).to_parquet(path)


@pytest.fixture
def drawn(work, checkpoint, cache, obeyed, tmp_path):
    "A cohort with values drawn from the distribution of the training patients."
    return synthesize(checkpoint, cache, tmp_path/'drawn', values='draw', per_mask=2, **PAINTING)


def test_asked_values_are_found_from_the_manifest_to_the_report(drawn, cache):
    "Both types, written as DICOM and read back: the slope is 1, and nothing is off by a millisecond."
    part = tissue(read_synthetic(drawn, cache), cache.values, drawn)
    assert set(zip(part.table.type, part.table.structure)) == {(t, s) for t in ('T1', 'T2') for s in STRUCTURES}
    assert part.table.slope.sub(1).abs().max() < .02 and part.table.correlation.min() > .99
    assert part.table.error.abs().max() < 1 and (part.table.images == 48).all()


def test_what_was_asked_in_words(work, checkpoint, cache, obeyed, tmp_path):
    "One value for one structure, a range for another: both are in the table, and the rest was drawn."
    root = synthesize(checkpoint, cache, tmp_path/'words', splits=('test',), type='T1', **PAINTING,
                      values='T1 myocardium=1150, T1 left_ventricle=1500-1700')
    table = tissue(read_synthetic(root, cache), cache.values, root).table.set_index('structure')
    assert table.low.myocardium == pytest.approx(1150) == table.high.myocardium and np.isnan(table.slope.myocardium)
    assert 1500 <= table.low.left_ventricle < table.high.left_ventricle <= 1700
    assert table.error.abs().max() < 1


@pytest.mark.parametrize('change, reason', [
    (lambda m: m.drop(columns=ASKED), 'a version that knew no tissue values'),
    (lambda m: m.assign(**dict.fromkeys(ASKED, np.nan)), 'no tissue value was asked for'),
], ids=['older', 'none'])
def test_not_assessed_with_the_reason(drawn, cache, change, reason):
    with_asked(drawn, change)
    part = tissue(read_synthetic(drawn, cache), cache.values, drawn)
    assert part.table is None and part.note.startswith('not assessed: ') and reason in part.note


def test_one_set_of_values_makes_one_patient(drawn, cache):
    "The slices of a synthetic patient resemble each other; drawn one by one, they would not."
    real, synthetic = grid_slices(cache), read_synthetic(drawn, cache)
    together = icc_table(real, synthetic, cache.values)
    rng = np.random.default_rng(0)
    names = pd.Series(rng.permutation(synthetic.rows.patient), name='patient')
    mixed = icc_table(real, replace(synthetic, rows=synthetic.rows.assign(patient=names)), cache.values)
    assert together.icc.mean() > .8 and mixed.icc.mean() < .4
    assert (together.patients == 16).all()


PARTS = ('values', 'tissue', 'patients', 'edges', 'physics', 'textures', 'distances', 'adherence', 'levels',
         'agreement', 'image types', 'resolution', 'utility', 'readings', 'comparisons', 'tissue readings', 'privacy')


def test_a_report_has_all_parts(drawn, cache, tmp_path):
    "In the text, in the table, in the JSON, and as charts; what is not assessed says why."
    report = evaluate(cache, drawn, SHORT, log=False, out=tmp_path/'report', device='cpu')
    assert tuple(report.parts) == PARTS
    missing = {name: part.note for name, part in report.parts.items() if part.table is None}
    assert all('not assessed: ' in note for note in missing.values()), missing
    assert {f.stem for f in (report.folder/'charts').iterdir()} == set(report.charts)
    kept = json.loads((report.folder/'report.json').read_text())
    names = ('tissue/T1/myocardium/slope', 'tissue/T2/left_ventricle/error', 'patients/T1/myocardium/icc',
             'levels/T2/right_ventricle/apical/bias', 'levels/T1/myocardium/basal/dice')
    assert {*names} <= {*kept['metrics']} and kept['metrics']['tissue/T1/myocardium/slope'] == pytest.approx(1, abs=.02)
    text = report.text()
    assert all(f'\n{name.capitalize()}: ' in text for name in PARTS)
    assert text.splitlines()[2].startswith('privacy: ')  # the first line after the title
    assert kept['parts']['values']['table'][0]['bias_low'] <= kept['parts']['values']['table'][0]['bias']
    assert set(report.parts['readings'].table.arm) == {
        'real, 100 %', 'synthetic, 100 %', 'real + synthetic, 100 %', 'real, not augmented, 100 %'}
    privacy = json.loads((drawn/'synthesis.json').read_text())['privacy']
    assert privacy['verdicts'] == report.parts['privacy'].note.split('; ')
    evaluate(cache, drawn, SHORT, True, log=False, out=tmp_path/'report', device='cpu')  # takes the place of the first
    synthesize(untrained(cache, 1), cache, drawn, values='draw', **PAINTING)  # its synthesis.json is ours all the same


def test_copies_make_the_evaluation_fail_after_it_is_written(drawn, cache, monkeypatch):
    "Whether copies are found is for test_privacy.py; here they were."
    found = pd.DataFrame([dict(type='T1', structure='', test='pixels', images=48, flagged=3, caught=.96)])
    part = Part(found, 'copies, T1 (pixels): COPIES: 3 of 48 images are copies', 'test', ('flagged',), (), None)
    monkeypatch.setattr('cmr_diffusion.evaluation.parts.privacy', lambda *arguments: part)
    with pytest.raises(CMRError, match='3 of 48 synthetic images are copies of training images') as raised:
        evaluate(cache, drawn, SHORT, True, log=False, device='cpu', max_copies=2)
    assert str(drawn/'evaluation') in str(raised.value) and (drawn/'evaluation'/'report.html').is_file()
    assert json.loads((drawn/'synthesis.json').read_text())['privacy']['verdicts'] == [part.note]


def test_no_real_image_enters_a_run_unless_asked(drawn, cache, tmp_path, monkeypatch):
    "The figure that is logged has no column of real images, and the page is not logged."
    logged = []
    monkeypatch.setattr('cmr_diffusion.evaluation.report._log',
                        lambda report, root, run_id, shown, page: logged.append((len(shown.axes), page)) or 'run')
    monkeypatch.setattr('cmr_diffusion.evaluation.report.check_store', lambda **options: None)
    for log_real in (False, True):
        evaluate(cache, drawn, SHORT, True, out=tmp_path/'out', device='cpu', log_real=log_real)
    (without, no_page), (whole, page) = logged
    assert (no_page, page) == (False, True) and whole * 3 == without * 4


def test_deformed_hearts_of_held_out_patients_are_found(work, checkpoint, cache, obeyed, tmp_path):
    "Their masks are not recognised by their pixels, and the manifest refers to the patients."
    root = synthesize(checkpoint, cache, tmp_path/'deformed', splits=('test',), deform=True, **PAINTING)
    evaluate(cache, root, SHORT, True, log=False, device='cpu')
    splits = pd.read_csv(root/'splits.csv')
    splits.assign(split='train').to_csv(root/'splits.csv', index=False)
    with pytest.raises(CMRError, match='painted into masks of held-out patients'):
        evaluate(cache, root, SHORT, log=False, device='cpu')


def test_masks_of_a_phantom_are_nobodys(work, checkpoint, cache, obeyed, tmp_path, caplog):
    root = synthesize(checkpoint, phantom_masks(2, cache.spec.types), tmp_path/'phantom', **PAINTING)
    with caplog.at_level(logging.WARNING): _check_splits(cache, root, grid_slices(cache), read_synthetic(root, cache))
    assert 'nobody can tell' not in caplog.text
    (root/'synthesis.json').unlink()
    with caplog.at_level(logging.WARNING): _check_splits(cache, root, grid_slices(cache), read_synthetic(root, cache))
    assert 'nobody can tell' in caplog.text


def test_levels_do_not_depend_on_order_or_direction():
    "Nor on which stacks lie in the same table."
    rng = np.random.default_rng(0)
    rows, maps, expected = [], [], []
    for patient in range(20):
        n, up = int(rng.integers(2, 13)), bool(rng.integers(2))
        areas = np.sort(rng.integers(50, 900, n))[::1 if up else -1] + np.arange(n)[::1 if up else -1]
        levels = [LEVELS[3 * i // n] for i in range(n)]
        for z, area in enumerate(areas):
            label_map = np.zeros((32, 32), np.uint8)
            label_map.flat[:area] = 1
            rows.append(dict(patient=str(patient), type='cine', volume=f'{patient}/cine', slice=f'frame01_{z:02d}'))
            maps.append(label_map)
            expected.append(levels[n - 1 - z] if up else levels[z])
    order = rng.permutation(len(rows))
    found = slice_levels(pd.DataFrame(rows).iloc[order].reset_index(drop=True), [maps[i] for i in order])
    assert found.tolist() == [expected[i] for i in order]


NO_ACDC = shared_data() is None or not (shared_data()/'acdc').is_dir()

@pytest.mark.skipif(NO_ACDC, reason='ACDC not found: set CMR_SHARED to the folder that holds data/acdc')
def test_thirds_find_the_levels_of_acdc():
    "ACDC states the order of its slices; what the sizes of the hearts say agrees with it."
    table = read_cohort(shared_data()/'acdc', 'acdc', workers=0)
    table = table[table.usable & table.patient.isin(sorted(table.patient.unique())[::10])].reset_index(drop=True)
    label_maps = [load_slice(row).labels for _, row in table.iterrows()]
    found = slice_levels(table.assign(level=''), label_maps)
    assert (found == table.level).mean() > .95 and set(found) == set(LEVELS)
    assert (slice_levels(table, label_maps) == table.level).all()


def test_neighbours_of_the_same_patient_only():
    "Slices of two stacks are never neighbours, whatever order the rows come in."
    slices = toy_grid(4, image_types=('T1', 'T2'))
    order = np.random.default_rng(0).permutation(len(slices))
    first, again = neighbour_table(slices), neighbour_table(slices[order])
    assert first.pairs.tolist() == [8, 8] == again.pairs.tolist()
    assert np.allclose(first.correlation, again.correlation)
