"""A training that has diverged ends at once, says why, and leaves its last good checkpoint as it was."""
import hashlib
import math

import pytest
import torch

from cmr_diffusion import (
    CMRError, Geometry, TrainConfig, load_checkpoint, prepare, read_cohort, sdm_learner, train)
from cmr_diffusion.figures import Picture
from cmr_diffusion.grid.loaders import make_dataloaders
from cmr_diffusion.toy import toy_cohort
from cmr_diffusion.tracking import find_run, start_run
from cmr_diffusion.training import checks, continuing, learner as learner_chapter

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastcore.basics import noop


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "Drawn hearts on a grid of 8 pixels, where a step takes milliseconds."
    folder = tmp_path_factory.mktemp('divergence')
    return prepare(read_cohort(toy_cohort(folder/'toy'), 'csv'), folder/'cache', Geometry(8, 12.0, 'heart'))


@pytest.fixture(autouse=True)
def own_store(monkeypatch):
    "A store of runs of this process alone."
    monkeypatch.setenv('IN_TEST', '1')


def learner(cache, batch_size=2, steps=6, **options):
    "A tiny learner without bars and tables."
    dls = make_dataloaders(cache, batch_size, device='cpu', steps_per_epoch=steps)
    learn = sdm_learner(dls, 'tiny', precision='float32', metrics=[], **options)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn


def short(**settings):
    "The configuration of a training of four steps with a check after the second and the last."
    usual = dict(preset='tiny', steps=4, checks=2, batch_size=2, warmup=0, precision='float32')
    return TrainConfig(**{**usual, **settings})


def refused(call, *words):
    "The one line that a call ends with."
    with pytest.raises(CMRError) as error: call()
    line = str(error.value)
    assert '\n' not in line and len(line) < 400
    for word in words: assert word in line, line
    return line


class From(Callback):
    "Does something after a step or in a validation; from that step of the training on."
    order = 5
    def __init__(self, step, after_step=noop, after_pred=noop):
        self.from_step, self.change_step, self.change_pred = step, after_step, after_pred
    def after_step(self):
        if self.model.steps >= self.from_step: self.change_step(self.learn)
    def after_pred(self):
        if self.model.steps >= self.from_step: self.change_pred(self.learn)


@torch.no_grad()
def plant(value, averaged=False):
    "Returns what writes a value into one weight."
    def change(learn):
        network = learn.model.average.model if averaged else learn.model.network
        list(network.parameters())[3].view(-1)[:1].data.fill_(value)
    return change


def larger(times, training):
    "Returns what makes the losses of training or validation larger."
    def change(learn):
        if learn.training == training: learn.pred = times * learn.pred
    return change


@pytest.fixture
def disturbed(monkeypatch):
    "Puts a callback into the learner of `train`; its sample grids are empty, and so take no time."
    monkeypatch.setattr('cmr_diffusion.training.checks.sample_figure', lambda *a, **options: Picture(1, 1))
    def with_callback(callback):
        plain = learner_chapter.run_callbacks
        monkeypatch.setattr(learner_chapter, 'run_callbacks', lambda *a: [*plain(*a), callback])
    return with_callback


def digest(folder):
    "What the files of a folder hold."
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob('*') if f.is_file()}


def run_of(name):
    "A run: the MLflow run, its folder and the steps of its sample grids."
    run = find_run(name)
    with start_run(run_id=run.info.run_id) as opened:
        images = [f.path for f in opened.client.list_artifacts(opened.id, 'images') if f.path.endswith('.png')]
        folder = opened.folder
    return run, folder, sorted(int(path.split('+step+')[1].split('+')[0]) for path in images)


class Rate(Callback):
    "Trains with a learning rate of 50 after some steps, whatever the schedule says."
    order = 61
    def __init__(self, after): self.steps_before = after
    def before_batch(self):
        if self.model.steps >= self.steps_before: self.opt.set_hyper('lr', 50.)


def test_a_rate_of_fifty_ends_as_failed(cache, disturbed):
    disturbed(Rate(after=0))
    line = refused(lambda: train(cache, short(steps=40, checks=1), run_name='fifty', device='cpu'),
                   'the training diverged: the loss of step ', 'no checkpoint was written',
                   'train again with a learning rate below 50')
    run, folder, grids = run_of('fifty')
    assert run.info.status == 'FAILED' and run.data.tags['reason'] == line
    assert not (folder/'checkpoint').exists() and grids == [0]


STOPPED = {  # name -> what goes wrong after the check of step 2, and what is said
    'nan loss': (From(3, after_pred=larger(math.nan, True)), 'the loss of step 4 is nan'),
    'infinite loss': (From(2, after_pred=larger(math.inf, True)), 'the loss of step 3 is inf'),
    'rate of fifty': (Rate(after=2), 'the '),
    'nan weight': (From(3, plant(math.nan)), 'the loss of step 4 is nan'),
    'last step': (From(4, plant(math.nan)), 'a weight is nan after step 4'),
    'averaged weight': (From(4, plant(math.inf, averaged=True)), 'an averaged weight is inf after step 4'),
    'validation nan': (From(4, after_pred=larger(math.nan, False)), 'the validation loss at step 4 is nan'),
    'validation large': (From(4, after_pred=larger(1e4, False)), 'the validation loss at step 4 is '),
    'training large': (From(3, after_pred=larger(1e4, True)), 'the training loss at step 4 is '),
}


@pytest.mark.parametrize('name', STOPPED)
def test_what_ends_a_training_leaves_the_last_checkpoint(cache, disturbed, monkeypatch, name):
    callback, said = STOPPED[name]
    written = {}
    plain = learner_chapter.CheckpointWriter.after_epoch
    def after_epoch(self):
        plain(self)
        written[self.model.steps] = digest(self.learn.path/'checkpoint')
    monkeypatch.setattr(learner_chapter.CheckpointWriter, 'after_epoch', after_epoch)
    disturbed(callback)
    line = refused(lambda: train(cache, short(), run_name=name, device='cpu'), f'the training diverged: {said}',
                   'the checkpoint of step 2 is kept', 'train again with a learning rate below ')
    run, folder, grids = run_of(name)
    assert run.info.status == 'FAILED' and run.data.tags['reason'] == line
    assert list(written) == [2] and digest(folder/'checkpoint') == written[2]
    assert load_checkpoint(folder/'checkpoint').info['steps'] == 2
    assert grids == [0, 2]  # no picture of what has gone wrong


def test_before_the_first_check(cache, disturbed):
    disturbed(From(1, plant(math.nan)))
    refused(lambda: train(cache, short(), run_name='first', device='cpu'), 'the loss of step 2 is nan',
            'no checkpoint was written')
    assert run_of('first')[2] == [0]


def test_weights_that_cannot_be_trained(cache):
    learn = learner(cache)
    plant(math.nan)(learn)
    refused(lambda: learn.fit(1, 1e-3), 'the training cannot begin: a weight is nan', 'other weights')
    assert learn.model.steps == 0


def test_a_plain_fit_is_ended_soon(cache, tmp_path):
    learn = learner(cache, steps=60, path=tmp_path)
    refused(lambda: learn.fit(1, 50.), 'the training diverged: the loss of step', 'learning rate below 50')
    assert learn.model.steps == 20
    learn = learner(cache, steps=3, path=tmp_path)
    refused(lambda: learn.fit(2, 1e-3, cbs=[SaveModelCallback(), From(3, plant(math.nan))]), 'a weight is nan')
    assert not (tmp_path/'models'/'model.pth').exists()


def test_early_divergence_is_no_measure(cache):
    learn = learner(cache, steps=4)
    refused(lambda: learn.fit(1, 1e-4, cbs=From(0, after_pred=larger(1e4, True))), 'that of the first steps was 1')


def test_after_a_divergence_the_learner_can_be_used(cache):
    learn = learner(cache)
    learn.save('good')
    refused(lambda: learn.fit(1, 1e-3, cbs=From(2, plant(math.nan))), 'nan')
    assert math.isnan(learn.validate()[0])  # a validation alone is no training: it says what there is
    learn.load('good')
    learn.opt = None
    learn.fit(1, 1e-3)
    assert learn.model.steps == 6 and math.isfinite(learn.validate()[0])
    plant(math.nan, averaged=True)(learn)
    assert math.isnan(learn.validate()[0])


@pytest.mark.parametrize('recipe', ('edm', 'paper'))
def test_a_healthy_noisy_training_is_not_ended(cache, recipe):
    noise = torch.Generator().manual_seed(0)
    def noisy(learn): learn.pred = learn.pred * (1.5 * torch.randn(1, generator=noise)).exp()  # from 1/30 to 30 times
    learn = learner(cache, batch_size=1, steps=10, recipe=recipe)
    learn.fit(3, 1e-3, cbs=From(0, after_pred=noisy))
    assert learn.model.steps == 30 and learn.divergence_guard.first <= 1


def test_lr_find_is_not_ended(cache):
    learn = learner(cache, steps=30)
    assert learn.lr_find(start_lr=1e-3, end_lr=1e4, num_it=30, stop_div=False, show_plot=False).valley > 0
    assert not all(math.isfinite(loss) for loss in learn.recorder.losses)  # it went as far as that
    assert learn.model.steps == 0 and learn.divergence_guard.first is None
    learn.fit(1, 1e-3)
    assert learn.divergence_guard.first <= 1


def test_the_guard_does_not_wait_for_the_device_in_a_step(cache, monkeypatch):
    guard = learner_chapter.DivergenceGuard
    learn, looks, plain = learner(cache, steps=25), [], guard.look
    monkeypatch.setattr(guard, 'look', lambda self: looks.append(self.model.steps) or plain(self))
    learn.fit(1, 1e-3)
    assert looks == [0, 20, 25]


@pytest.mark.parametrize('argument, value', (
    ('lr', .2), ('lr', math.nan), ('lr', math.inf), ('lr', 0), ('lr', '1e-3'), ('preset', 'huge'), ('recipe', 'ddim'),
    ('weight_decay', -1.), ('drop', 1.), ('drop', math.nan), ('ema', 1.), ('clip', 0.), ('clip', True), ('seed', 1.5),
    ('seed', 2**64), ('precision', 'float16')))
def test_wrong_arguments_of_the_learner(cache, argument, value):
    dls = make_dataloaders(cache, 2, device='cpu')
    line = refused(lambda: sdm_learner(dls, **{'preset': 'tiny', argument: value}), f'{argument} {value!r}: give ')
    assert 'give ' in line


def test_wrong_arguments_of_a_training(cache):
    refused(lambda: train(cache, dict(steps=1)), 'give a TrainConfig')
    refused(lambda: train(str(cache.folder), short()), 'CohortCache.load')
    refused(lambda: short(learning_rate=50.), 'learning_rate 50.0: give a finite number above 0 and up to 0.1')


def test_before_the_work_begins(cache, tmp_path, monkeypatch):
    odd = prepare(cache.table, tmp_path/'odd', Geometry(18, 6.0, 'heart'))
    too_small = short(preset='small')
    refused(lambda: train(odd, too_small, device='cpu'), 'a grid of 18 pixels', 'preset small', 'divisible by')
    def full(*a, **options): raise CMRError('no room')
    monkeypatch.setattr(continuing, 'check_result', full)
    refused(lambda: train(cache, short(), run_name='full', device='cpu'), 'no room')
    run, _, grids = run_of('full')
    assert (run.info.status, run.data.tags['reason'], grids) == ('FAILED', 'no room', [])


def test_a_network_that_paints_no_finite_numbers(cache, monkeypatch):
    def broken(*args, **options):
        raise CMRError('6 of 6 painted images hold values that are no finite numbers; paint with a lower guidance')
    own = checks.sample_figure
    monkeypatch.setattr(checks, 'sample_figure', broken)
    refused(lambda: train(cache, short(), device='cpu'),
            'the training cannot begin: the network paints no finite numbers; start from other weights')
    def later(checkpoint, *args, **options):
        return (broken if checkpoint.info.get('steps') else own)(checkpoint, *args, **options)
    monkeypatch.setattr(checks, 'sample_figure', later)
    refused(lambda: train(cache, short(), device='cpu'), 'the training diverged: the network paints no finite numbers',
            'the checkpoint of step 2 is kept', 'learning rate below')
