"""Messages of the evaluation that nothing else provokes: each says what is wrong, where somebody meets it."""
import errno
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import CMRError, PADDING
from cmr_diffusion.evaluation.adherence import adherence_table
from cmr_diffusion.evaluation.arms import arms, check_generator, Painted
from cmr_diffusion.evaluation.card import copy_card, write_card
from cmr_diffusion.evaluation.copies import nearest_pairs
from cmr_diffusion.evaluation.distances import distance_table
from cmr_diffusion.evaluation.features import Encoder, features, inception_encoder, timm_encoder
from cmr_diffusion.evaluation.fidelity import slice_values
from cmr_diffusion.evaluation.generators import _place, _trained, fraction_generator, only_patients
from cmr_diffusion.evaluation.nnunet import acquired, export_nnunet, read_nnunet
from cmr_diffusion.evaluation.overlap import dice
from cmr_diffusion.evaluation.parts import model_of, Subject, utility_parts
from cmr_diffusion.evaluation.privacy import check_privacy
from cmr_diffusion.evaluation.report import _keep, _run_of, evaluate
from cmr_diffusion.evaluation.resolution import size_rows
from cmr_diffusion.evaluation.runs import read_run, report_of
from cmr_diffusion.evaluation.segmentation import (
    _file_name, cached_segmentation, load_segmentation, SegConfig, Segmenter, train_segmentation)
from cmr_diffusion.evaluation.summary import Report
from cmr_diffusion.evaluation.surfaces import surface_rows
from cmr_diffusion.evaluation.textures import standardised
from cmr_diffusion.evaluation.tissue import asked_values, painted_and_asked
from cmr_diffusion.evaluation.utility import utility_table
from cmr_diffusion.evaluation.worst import worst_figure
from cmr_diffusion.grid.cache import prepare
from cmr_diffusion.grid.geometry import Geometry
from cmr_diffusion.grid.loaders import grid_slices, make_dataloaders
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.model.checkpoint import save_checkpoint
from cmr_diffusion.stores import open_client, tracking_uri
from cmr_diffusion.synthesis.cohort import synthesize
from cmr_diffusion.synthesis.records import MANIFEST
from cmr_diffusion.synthesis.settings import read_settings, write_settings
from cmr_diffusion.toy import toy_cohort, toy_grid
from cmr_diffusion.tracking import start_run
from cmr_diffusion.training.config import TrainConfig
from cmr_diffusion.training.learner import sdm_learner

NATIVE, VALUES = Geometry(32, 'native'), {'T1': ValueTransform('T1', 2000., 4095.)}
TINY = SegConfig(encoder='tu-resnet10t', decoder=(8, 8), steps=1, batch_size=2)
HEARTS = toy_grid(3)
NONE, FIRST = HEARTS.of('synthesis'), tuple(HEARTS.rows.patient.unique()[:1])
FLAT = Encoder('flat', lambda x: x.flatten(1))


def measured(slices, row_spacing=1.5):
    "The same slices with what the cache of a cohort says of them."
    structures = 'background,myocardium,left_ventricle,right_ventricle'
    return replace(slices, rows=slices.rows.assign(row_spacing=row_spacing, column_spacing=2., structures=structures))


TRAIN, TEST = measured(HEARTS), measured(toy_grid(2, split='test'))
ONE_SCORE = pd.DataFrame(dict(space=['pixels'], images=['synthetic'], distance=[.5], measure=['Dice'], score=[np.nan]))
ONE_SCORE['position'] = 0
NO_FILE = 'no such file; give .+, nothing is downloaded'
TOLD = pd.DataFrame([dict(type='T1', test='loss', auc_high=.9)])

CALLS = {
    'adherence': [(lambda: adherence_table(None, NONE), 'no synthetic image to read; paint some')],
    'arms': [
        (lambda: check_generator(Painted(HEARTS, ()), HEARTS, FIRST, 10), 'at 10 %: name the patients that the gen'),
        (lambda: check_generator(Painted(HEARTS, FIRST), HEARTS, FIRST, 10),
         'at 10 %: 6 synthetic images show masks of patients outside of this fraction, such as train00[12]; paint'),
        (lambda: arms(HEARTS, {100.: []}, VALUES, NATIVE), 'no usable test slice, so nothing can be tested')],
    'copies': [(lambda: nearest_pairs(ONE_SCORE, HEARTS, HEARTS, 'encoder'), 'searched in encoder; give another')],
    'distances': [(lambda: distance_table(HEARTS, HEARTS, []), 'no encoder to compute features with; give at least')],
    'features': [
        (lambda: features(FLAT, NONE.images), 'flat: no image to encode; give at least one'),
        (lambda: features(FLAT, HEARTS.images * np.nan), 'flat: features are no finite numbers; check the images'),
        (lambda: timm_encoder('resnet10t', 'missing.pth'), NO_FILE),
        (lambda: inception_encoder('missing.pth'), NO_FILE)],
    'fidelity': [(lambda: slice_values(HEARTS, {'T2': VALUES['T1']}), 'no value transform for T1; the cache knows T2')],
    'nnunet': [
        (lambda: acquired(np.pad(np.zeros((4, 4), np.uint8), 1, constant_values=PADDING)), 'padding elsewhere than at'),
        (lambda: export_nnunet({}, TEST, VALUES, NATIVE, 'out'), 'there is no arm, or no test slice; check the splits'),
        (lambda: export_nnunet({'real': TRAIN.of('val')}, TEST, VALUES, NATIVE, 'out'), "arm 'real' has no T1 image"),
        (lambda: read_nnunet([], TEST), 'no predictions for T1 images; give the folder of each type')],
    'overlap': [(lambda: dice(TEST.label_maps[1:], TEST.label_maps, 1), r'of shapes \(5, 32, 32\) and \(6, 32, 32\)')],
    'privacy': [
        (lambda: check_privacy(pd.DataFrame(), max_auc=.4), '--max-auc 0.4: give a number from 0.5 to 1'),
        (lambda: check_privacy(pd.DataFrame(), max_auc=.6), 'could not be assessed .+; evaluate where the model is'),
        (lambda: check_privacy(pd.DataFrame(), max_copies=-1), '--max-copies -1: give 0 or more'),
        (lambda: check_privacy(TOLD, max_auc=.6), r'up to 0.90 \(T1, loss\), more than --max-auc 0.6 allows: train')],
    'resolution': [(lambda: size_rows(TEST.label_maps, TEST, np.ones(6)), r'6 slices, .+ spacings of shape \(6,\)')],
    'runs': [(lambda: report_of(dict(format=0)), 'the report is of format 0, expected .+: evaluate the cohort again')],
    'segmentation': [
        (lambda: Segmenter(SegConfig(encoder='no-such-network')), "encoder 'no-such-network': .+; give \"tu-\" and"),
        (lambda: Segmenter(SegConfig(weights='missing.pth')), 'missing.pth: no such file; give a timm state dict of'),
        (lambda: train_segmentation(NONE, TINY), 'no training slice; check the split of the cohort')],
    'surfaces': [(lambda: surface_rows(TEST.label_maps, TEST, np.ones(6)), r'spacings of shape \(6,\): give a label')],
    'textures': [(lambda: standardised(np.ones((5, 3))), 'one and the same texture; check the images')],
    'tissue': [(lambda: painted_and_asked(TEST, pd.DataFrame(), VALUES), '6 slices and 0 rows of asked values')],
    'utility': [(lambda: utility_table({'real': HEARTS}, NONE), 'no usable test slice, so nothing can be tested')],
    'worst': [(lambda: worst_figure(HEARTS, ONE_SCORE, VALUES, 'Dice'), "none has a score by 'Dice'; give another")],
}


@pytest.mark.parametrize('call, words', [
    pytest.param(call, words, id=f'{module}-{n}')
    for module, rows in CALLS.items() for n, (call, words) in enumerate(rows)])
def test_wrong_calls_say_what_is_wrong(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CMRError, match=words): call()
    assert not list(tmp_path.iterdir())


# Files

def test_a_card_that_is_not_there_or_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(CMRError, match=r'MODEL_CARD.md: cannot be read \(No such file .+\); evaluate again'):
        copy_card(tmp_path, tmp_path)
    def full(*paths): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('os.replace', full)
    with pytest.raises(CMRError, match=r'cannot be written \(No space left on device\); choose another folder'):
        write_card(tmp_path, 'a card')


def test_inception_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity.feature_extractor_inceptionv3', None)
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    (tmp_path/'weights.pth').write_bytes(b'')
    with pytest.raises(CMRError, match='Inception-v3 needs torch-fidelity: pip install torch-fidelity'):
        inception_encoder(tmp_path/'weights.pth')


def test_a_manifest_that_is_damaged(tmp_path):
    (tmp_path/MANIFEST).write_text('no table')
    with pytest.raises(CMRError, match=r'damaged \(.+\); paint the cohort again'): asked_values(tmp_path, TEST.rows)


def test_what_nnunet_is_given_and_gives_back(tmp_path):
    with pytest.raises(CMRError, match='slice test000/0: the size of its pixels is not known'):
        export_nnunet({'real': TRAIN}, measured(TEST, np.nan), VALUES, NATIVE, tmp_path/'unknown')
    folder, = export_nnunet({'real': TRAIN}, TEST, VALUES, NATIVE, tmp_path/'out')
    found = tmp_path/'found'
    with pytest.raises(CMRError, match='found: has no dataset.json; run nnUNetv2_predict'): read_nnunet(found, TEST)
    found.mkdir()
    shutil.copy(folder/'dataset.json', found)
    with pytest.raises(CMRError, match='its predictions are of other test images; export and train again'):
        read_nnunet(found, TRAIN)
    (found/'test_00000.nii.gz').write_bytes(b'half of a file')
    with pytest.raises(CMRError, match=r'no prediction can be read \(.+\); run nnUNetv2_predict again'):
        read_nnunet(found, TEST)


def test_a_damaged_network_is_trained_again(tmp_path, caplog):
    path = tmp_path/_file_name(TRAIN, TINY)
    path.write_bytes(b'half of a file')
    with pytest.raises(CMRError, match=r'damaged \(.+\); delete the file, and the network is trained again'):
        load_segmentation(path)
    cached_segmentation(tmp_path, TRAIN, TINY, 'cpu')
    assert f'{path}: damaged' in caplog.text and 'it is trained anew now' in caplog.text
    load_segmentation(path, 'cpu')


def test_a_network_that_cannot_be_kept(tmp_path, caplog):
    (tmp_path/'file').write_text('')
    assert cached_segmentation(tmp_path/'file', TRAIN, TINY, 'cpu') is not None
    assert 'the network is not kept (' in caplog.text


# A cohort, a model that has learned nothing, and what it has painted

SPLITS = ('train', 'train', 'train', 'train', 'val', 'test')


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp('provoked')
    cohort = toy_cohort(folder/'cohort', 6, ('T1',), SPLITS, (2.,), (1,), 32)
    return prepare(read_cohort(cohort, 'csv'), folder/'cache', NATIVE, workers=0)


@pytest.fixture(scope='module')
def untaught(tmp_path_factory):
    "A cohort without a training patient."
    folder = tmp_path_factory.mktemp('untaught')
    cohort = toy_cohort(folder/'cohort', 2, ('T1',), ('val', 'test'), (2.,), (1,), 32)
    return prepare(read_cohort(cohort, 'csv'), folder/'cache', NATIVE, workers=0)


@pytest.fixture(scope='module')
def checkpoint(cache):
    return sdm_learner(make_dataloaders(cache, 2, device='cpu'), 'tiny', precision='float32').checkpoint


@pytest.fixture(scope='module')
def painted(cache, checkpoint, tmp_path_factory):
    return synthesize(checkpoint, cache, tmp_path_factory.mktemp('painted')/'synthetic', steps=1, device='cpu')


@pytest.fixture
def cohort(painted, tmp_path): return shutil.copytree(painted, tmp_path/'synthetic')


@pytest.fixture
def uri(tmp_path, monkeypatch):
    "Says which store of runs is in use; one that does not exist, to begin with."
    monkeypatch.delenv('IN_TEST', raising=False)
    def use(file): monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{file}')
    use(tmp_path/'mlflow.db')
    return use


@pytest.fixture
def runs(uri, template, tmp_path):
    "A store of runs that is empty."
    shutil.copy(template, tmp_path/'mlflow.db')


@pytest.fixture
def broken(uri, tmp_path):
    "A store of runs that is none."
    (tmp_path/'mlflow.db').write_text('This is no database, but a text that somebody has put in its place.' * 99)


def test_evaluations_that_are_refused_before_they_train(cache, untaught, cohort):
    def refused(words, cache=cache, **options):
        with pytest.raises(CMRError, match=words): evaluate(cache, cohort, log=False, device='cpu', **options)
    refused('--generator-steps: give --fractions, too, as 10,100', generator_steps=5)
    refused('no usable training slice, so no network can be trained to read images', untaught)
    (cohort/MANIFEST).write_text('no table')
    refused(r'manifest.parquet: damaged \(.+\); paint the cohort again with cmr_sample')
    for file in cohort.rglob('*.dcm'): file.write_bytes(b'half of a file')
    refused('synthetic: no usable slice; see the column reason of its cohort table')


def test_an_evaluation_whose_run_is_not_in_the_store(cohort, uri, caplog):
    write_settings(cohort, replace(read_settings(cohort), run_id='a' * 32))
    assert _run_of(cohort) is None
    assert 'the evaluation becomes a run of its own' in caplog.text


def test_a_report_that_cannot_be_logged(tmp_path, broken):
    with pytest.raises(CMRError, match='report: has the report, but it could not be logged: '):
        _keep(Report('toy', {}), tmp_path/'synthetic', tmp_path/'report', (), dict(shown=None, page=False), None)
    assert (tmp_path/'report'/'report.json').is_file()


def test_the_model_that_painted(cohort, checkpoint, cache, uri, tmp_path, caplog):
    settings = replace(read_settings(cohort), run_id='a' * 32)
    assert model_of(cohort, settings, device='cpu') is None
    assert 'what needs the model is not assessed (--model names it)' in caplog.text
    other = sdm_learner(make_dataloaders(cache, 2, device='cpu'), 'tiny', precision='float32', seed=1).checkpoint
    folder = save_checkpoint(tmp_path/'other', other)
    with pytest.raises(CMRError, match='other weights than those that painted synthetic; name the model that did'):
        model_of(cohort, settings, folder, 'cpu')
    assert model_of(cohort, replace(settings, run_id=str(folder)), device='cpu') is None
    assert 'perhaps since it was trained further; what needs the model is not assessed' in caplog.text


@pytest.fixture
def subject(cache, cohort):
    "An evaluation of a cohort whose model is not at hand."
    real = grid_slices(cache)
    synthetic = replace(real, rows=real.rows.assign(synthetic=True))
    return Subject(cache, cohort, real, synthetic, read_settings(cohort), None, TINY, True, device='cpu')


def note_of(subject, tmp_path): return utility_parts(subject, tmp_path/'networks')['readings'].note


def test_arms_that_cannot_be_read(subject, checkpoint, tmp_path):
    untested = replace(subject, real=subject.real[(subject.real.rows.split != 'test').to_numpy()])
    assert note_of(untested, tmp_path) == 'not assessed: the cache has no test patient'
    some = replace(subject, fractions=(50.,))
    assert 'fractions need the model that painted the images, which is not at hand' in note_of(some, tmp_path)
    some = replace(some, checkpoint=replace(checkpoint, info={}))
    assert 'the checkpoint does not say how it was trained; train it anew' in note_of(some, tmp_path)
    some = replace(some, synthetic=some.synthetic.of('test'))
    assert 'no image is painted into a training mask (cmr_sample --split train)' in note_of(some, tmp_path)


def test_arms_for_nnunet(subject, tmp_path, caplog):
    "They are exported first; then the predictions of one arm are there, and the others are named."
    asked = replace(subject, judge='nnunet')
    place = tmp_path/'synthetic_nnunet'
    assert f'exported for nnU-Net; type bash {place/"train.sh"} and evaluate again' in note_of(asked, tmp_path)
    folder = next((place/'nnUNet_raw').glob('*501_real*'))
    shutil.copytree(folder/'labelsTs', place/'predictions'/folder.name/'repetition_1')
    shutil.copy(folder/'dataset.json', place/'predictions'/folder.name/'repetition_1')
    note_of(asked, tmp_path)
    assert 'nnU-Net has predicted nothing yet for: real + synthetic, 100 %; synthetic, 100 %' in caplog.text


# Generators and runs

CONFIG = TrainConfig(preset='tiny', steps=1, checks=1, batch_size=2)


def test_a_fraction_of_nobody(cache):
    with pytest.raises(CMRError, match='a stranger is no patient of the training split'):
        only_patients(cache, ['a stranger'])


def test_a_damaged_generator_is_trained_again(cache, broken, caplog):
    "Here it cannot be, since the store of runs is none."
    place = _place(cache, CONFIG)/'checkpoint'
    place.mkdir(parents=True)
    with pytest.raises(CMRError, match='is not an SQLite database'): fraction_generator(cache, CONFIG, device='cpu')
    assert f'{place}' in caplog.text and 'it is trained anew now' in caplog.text


def test_a_training_that_cannot_go_on_begins_anew(untaught, runs, tmp_path, caplog):
    "Here that cannot be either, since there is no training slice."
    with start_run(run_name='generator') as run: pass
    place = tmp_path/'generator'
    place.mkdir()
    (place/'run.txt').write_text(run.id)
    with pytest.raises(CMRError, match='no training slices; prepare it'):
        _trained(untaught, CONFIG, place, 'generator', 'cpu')
    assert '; the generator is trained anew' in caplog.text


def test_a_model_that_was_registered_without_a_run(runs, tmp_path):
    client = open_client(tracking_uri())
    client.create_registered_model('hearts')
    client.create_model_version('hearts', str(tmp_path/'model'))
    with pytest.raises(CMRError, match='models:/hearts/1: was registered without a run, by another program; give'):
        read_run('models:/hearts/1')
