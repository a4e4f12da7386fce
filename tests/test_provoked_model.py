"""Messages of networks, trainings, paintings and the store of runs that no other test meets: each is provoked here in
the way in which a user comes to it."""
import socket
import subprocess
import sys
from dataclasses import replace
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from cmr_diffusion import CMRError, Geometry, TrainConfig, load_checkpoint, paint, prepare, read_cohort, sdm_learner
from cmr_diffusion import example, paint_label_map, toy_label_map, ui
from cmr_diffusion.command_options import read_table
from cmr_diffusion.grid.condition import ConditionSpec
from cmr_diffusion.grid.geometry import GridSlice
from cmr_diffusion.grid.loaders import make_dataloaders
from cmr_diffusion.grid.tissue import TissueModel
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.model.checkpoint import Checkpoint, save_checkpoint
from cmr_diffusion.model.ddpm import DDPMRecipe, make_denoiser
from cmr_diffusion.model.edm import EDMRecipe
from cmr_diffusion.model.fast_spade import fast
from cmr_diffusion.model.samplers import sample
from cmr_diffusion.model.sdm import SDM, sdm_config
from cmr_diffusion.outbox import Outbox
from cmr_diffusion.registry import register
from cmr_diffusion.sender import Sender
from cmr_diffusion.synthesis.inputs import check_words
from cmr_diffusion.synthesis.label_maps import mask_rows
from cmr_diffusion.synthesis.records import with_sources
from cmr_diffusion.synthesis.wanted import AskedValues
from cmr_diffusion.toy import toy_cohort
from cmr_diffusion.tracking import import_jsonl, resolve_run
from cmr_diffusion.training.continuing import facts_of
from cmr_diffusion.training.model import new_denoiser
from cmr_diffusion.training.resume import learn_again, read_point, write_point
from cmr_diffusion.training.stopping import ResumeWriter

from fastai.callback.progress import ProgressCallback

STRUCTURES = ('background', 'myocardium', 'left_ventricle', 'right_ventricle')


def toy_checkpoint(recipe='edm', values=False):
    "A network for T1 maps that has learned nothing."
    spec = ConditionSpec((('T1', STRUCTURES),))
    model = SDM(sdm_config('tiny', label_channels=5, hidden=8, values=values, variance=recipe == 'paper'))
    measured = np.random.default_rng(0).normal(.3, .05, (40, 5))
    tissue = TissueModel.fit(measured, np.arange(40), spec.names, measured + 6) if values else None
    transforms = {'T1': ValueTransform('T1', 2000., 4095.)}
    return Checkpoint(make_denoiser(recipe, model), spec, transforms, Geometry(16, 6.), dict(run_id='abc'), tissue)


@pytest.fixture(scope='module')
def plain(): return toy_checkpoint()


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    return read_cohort(toy_cohort(tmp_path_factory.mktemp('toy'), 3, ('T1',), ('train', 'val', 'test')), 'csv')


@pytest.fixture(scope='module')
def cache(table, tmp_path_factory):
    "Drawn hearts on a grid of 16 pixels, where a step takes milliseconds."
    return prepare(table, tmp_path_factory.mktemp('cache')/'cache', Geometry(16, 6., 'heart', jitter=1), workers=0)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    "Each test works in a folder of its own, which also holds its store of runs."
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    monkeypatch.chdir(tmp_path)


def learner(cache, **options):
    "A tiny learner without bars and tables."
    learn = sdm_learner(make_dataloaders(cache, 2, device='cpu', steps_per_epoch=1), 'tiny', precision='float32',
                        **options)
    return learn.remove_cbs(ProgressCallback)


def levels(*sigmas): sample(lambda *_: None, torch.tensor(sigmas), None, [0], (1, 4, 4))


@pytest.mark.parametrize('call, words', [
    (lambda: DDPMRecipe(schedule='square'), "noise schedule 'square': use 'linear' or 'cosine'"),
    (lambda: DDPMRecipe().sigmas(0), '0 sampling steps: use 1 to 1000'),
    (lambda: EDMRecipe().sigmas(0), '0 sampling steps: at least one is needed'),
    (lambda: make_denoiser('ddim', nn.Identity()), "recipe 'ddim': choose one of edm, paper"),
    (lambda: make_denoiser('edm', nn.Identity(), 'float16'), "precision 'float16': choose one of "),
    (lambda: toy_checkpoint().denoiser(-1.), r'guidance -1\.0: use a number from 0 \(no condition\) up'),
    (lambda: fast(nn.Conv2d(1, 1, 3)), 'Conv2d: only an SDM can be made fast'),
    (lambda: levels(2., 1.), 'noise levels must fall to 0'),
    (lambda: sdm_config('huge'), "preset 'huge': choose one of tiny, small, base, paper")])
def test_networks_and_recipes(call, words):
    "Names and numbers that a network, a recipe or a sampler does not know."
    with pytest.raises(CMRError, match=words): call()


def test_an_incomplete_package(monkeypatch, tmp_path):
    "The package without the files of its example model."
    monkeypatch.setattr(example, '__file__', str(tmp_path/'example.py'))
    with pytest.raises(CMRError, match='example:phantom: .*phantom is missing, so the package is incomplete'):
        load_checkpoint('example:phantom')


def test_values_for_a_network_that_takes_none(plain):
    with pytest.raises(CMRError, match='values: this model takes no tissue values'):
        paint_label_map(plain, toy_label_map(16), 'T1', 6., values={'myocardium': 1150.}, steps=1)
    with pytest.raises(CMRError, match="values 'T1 myocardium=1150': the model takes no tissue values"):
        AskedValues('T1 myocardium=1150', plain.spec, plain.values, plain.tissue)


def test_values_that_are_no_wishes():
    told = toy_checkpoint(values=True)
    grid = GridSlice(np.zeros((16, 16), np.float32), toy_label_map(16), (6., 6.), 'T1')
    with pytest.raises(CMRError, match='1 label maps and 2 sets of values: give one each'):
        paint(told, [grid], [0], steps=1, values=[{'myocardium': 1150.}, {}])
    with pytest.raises(CMRError, match="values 'many': give draw, own, none, or wishes: "):
        AskedValues('many', told.spec, told.values, told.tissue)


def test_words_of_synthesize(plain, tmp_path):
    with pytest.raises(CMRError, match="format 'png': give dicom, or nifti for volumes, too"):
        check_words(plain, tmp_path/'out', 'native', 'dpmpp_2m', 'float32', 'draw', 'png')


def test_masks_of_no_use(table, tmp_path):
    with pytest.raises(CMRError, match='no masks: the cohort has no usable slice'):
        mask_rows(table.assign(usable=False))
    with pytest.raises(CMRError, match='no such file; paint the cohort again with cmr_sample'):
        with_sources(tmp_path, table)


def test_a_training_without_a_length():
    with pytest.raises(CMRError, match='say how long to train: --steps N, --minutes M, or both'):
        TrainConfig(preset='tiny')


@pytest.mark.parametrize('options, words', [
    (dict(init=dict(recipe='paper')), 'trained with recipe paper; use --recipe paper'),
    (dict(init=dict(values=True), tissue_values=False), 'its network takes tissue values; train with them')])
def test_a_learner_that_does_not_fit(cache, tmp_path, options, words):
    "Checkpoints that the training cannot begin with."
    start = toy_checkpoint(**options['init'])
    model = SDM(replace(start.model.config, label_channels=cache.spec.channels))
    start = replace(start, denoise=type(start.denoise)(model, start.recipe), spec=cache.spec, values=cache.values)
    options = options | dict(init=save_checkpoint(tmp_path/'checkpoint', start))
    with pytest.raises(CMRError, match=words): learner(cache, **options)


def test_a_recipe_that_is_not_known(cache):
    loaders = make_dataloaders(cache, 2, device='cpu', steps_per_epoch=1)
    with pytest.raises(CMRError, match="recipe 'ddim': choose one of edm, paper"):
        new_denoiser(loaders, 'tiny', 'ddim', 'float32')


def test_points_of_a_training(cache, tmp_path):
    "A resume point that holds moments of another shape, and a first one that cannot be written."
    learn, config = learner(cache), TrainConfig(preset='tiny', steps=1, precision='float32')
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    facts = facts_of(learn, config, 'run')
    point = read_point(write_point(tmp_path/'resume', learn, facts, 1))
    point.tensors['optimizer.0.grad_avg'] = torch.zeros(3)
    with pytest.raises(CMRError, match=r'moments of another network: weight 0 is \(3,\) there and '):
        learn_again(learner(cache), point)
    (tmp_path/'file').touch()
    writer = ResumeWriter(tmp_path/'file', facts)
    with learn.no_bar(), learn.no_logging(), pytest.raises(CMRError, match='no resume point can be written: '):
        learn.fit(1, cbs=[writer])


def test_a_learning_rate_is_looked_for_in_one_process(cache, tmp_path):
    state = pytest.importorskip('accelerate.state')
    from cmr_diffusion.training.distributed import BatchDealer
    learn = learner(cache)
    learn.path = tmp_path
    try:
        learn.add_cb(BatchDealer(cpu=True))
        with pytest.raises(CMRError, match='lr_find: call it in one process'): learn.lr_find(show_plot=False)
    finally:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


@pytest.mark.parametrize('content, words', [
    ('{"step": 1, "loss": .5}', r'log\.jsonl: not JSON lines \(.*\); give the log that a training wrote'),
    ('{"step": 1}\n[1, 2]', r'log\.jsonl, line 2: expected an object with a step and numbers'),
    (None, r'log\.jsonl: No such file or directory; give the JSON-lines log of a training')])
def test_logs_of_trainings(tmp_path, content, words):
    if content is not None: (tmp_path/'log.jsonl').write_text(content)
    with pytest.raises(CMRError, match=words): import_jsonl(tmp_path/'log.jsonl')
    assert not (tmp_path/'mlruns').exists()


def test_names_of_registered_models():
    with pytest.raises(CMRError, match="alias 'latest': give letters, digits, - and _"):
        register('some_run', 'hearts', 'latest')


@pytest.fixture
def store(template, monkeypatch, tmp_path):
    "The address of a store of runs with nothing in it."
    (tmp_path/'mlflow.db').write_bytes(template.read_bytes())
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
    return f'sqlite:///{tmp_path}/mlflow.db'


def test_a_model_that_another_program_registered(store, tmp_path):
    "MLflow registers any folder, also one that no run has written."
    client = MlflowClient(store, store)
    client.create_registered_model('other')
    client.create_model_version('other', str(tmp_path/'model'))
    with pytest.raises(CMRError, match="'models:/other/1': was registered without a run, by another program"):
        resolve_run('models:/other/1')


def test_a_queue_that_is_in_disorder(store, caplog):
    "An entry was cut off, and a file is where the folder for such entries should be."
    box = Outbox(store, '0' * 32, 'cut_off')
    entry = box.folder/'1-1-log_batch'
    entry.mkdir(parents=True)
    (entry/'entry.json').touch()
    (box.folder/'refused').touch()
    sender = Sender(box)
    watch = Timer(20, sender.stop.set)  # should it try for ever
    watch.start()
    sender.work()
    watch.cancel()
    assert f'the queue {box.folder} is not sent: ' in caplog.text


def test_a_port_of_the_administrator(monkeypatch):
    "As every port below 1024 is to other users."
    class Guarded(socket.socket):
        def bind(self, address): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(ui, 'socket', SimpleNamespace(**{**vars(socket), 'socket': Guarded}))
    with pytest.raises(CMRError, match='port 80: only the administrator may use it; give one from 1024'):
        ui.check_port(80, 'sqlite:///mlflow.db')


@pytest.mark.parametrize('program, words', [
    ('pass', 'the MLflow server ended before it answered: no such table'),
    ('input()', 'the MLflow server did not answer at .*/health within 0 seconds; its last line: no such table')])
def test_servers_that_do_not_answer(tmp_path, program, words):
    "One that has ended, and one that says nothing; the port is taken, and nobody answers there."
    (tmp_path/'log').write_text('it begins\nno such table\n\n')
    with socket.socket() as taken, subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE) as server:
        taken.bind(('127.0.0.1', 0))
        if program == 'pass': server.wait()
        with pytest.raises(CMRError, match=words):
            ui.wait_until_up(server, f'http://127.0.0.1:{taken.getsockname()[1]}', tmp_path/'log', 0.)
        server.kill()


def test_a_file_in_the_place_of_a_cohort(tmp_path):
    (tmp_path/'cohort.csv').write_text('image,label\n')
    with pytest.raises(CMRError, match='cohort.csv: is a file; a cohort of the layout semmelweis is a folder'):
        read_table('cohort.csv', 'semmelweis', 'default', 0, None, 1)
