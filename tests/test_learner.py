"""The learner as a user of fastai knows it: each test fails when the line it is about is removed."""
import logging
import math
from copy import deepcopy

import pytest
import torch

from cmr_diffusion import (
    CMRError, Geometry, TrainConfig, load_checkpoint, paint, prepare, read_cohort, sdm_learner, train)
from cmr_diffusion.grid.loaders import make_dataloaders
from cmr_diffusion.toy import toy_cohort
from cmr_diffusion.tracking import find_run, start_run
from cmr_diffusion.training.learner import config_learner, run_callbacks

from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastcore.basics import noop


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "Drawn hearts on a grid of 16 pixels, where a step takes milliseconds."
    folder = tmp_path_factory.mktemp('learner')
    return prepare(read_cohort(toy_cohort(folder/'toy'), 'csv'), folder/'cache', Geometry(16, 6.0, 'heart', jitter=1))


@pytest.fixture(autouse=True)
def own_store(monkeypatch):
    "A store of runs of this process alone."
    monkeypatch.setenv('IN_TEST', '1')


def quiet(learn):
    "The learner without bars and tables."
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn


def learner(cache, batch_size=4, steps=6, **options):
    "A tiny learner."
    dls = make_dataloaders(cache, batch_size, device='cpu', steps_per_epoch=steps)
    return quiet(sdm_learner(dls, 'tiny', **{'precision': 'float32', **options}))


def weights(learn):
    "A copy of all that training changes."
    return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in learn.model.state_dict().items()}


def same(a, b):
    "Whether two state dicts are equal to the last bit."
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


class KeepLosses(Callback):
    "The losses of the steps."
    def before_fit(self): self.learn.step_losses = []
    def after_batch(self):
        if self.training: self.learn.step_losses.append(self.loss.item())


def test_fit_uses_the_rate_it_is_given(cache):
    learn = learner(cache)
    learn.fit(2, 5e-3)
    assert len(learn.recorder.lrs) == 12 and set(learn.recorder.lrs) == {5e-3}
    learn.fit(1)
    assert set(learn.recorder.lrs) == {4e-4}  # the learner's own


def test_schedules_of_fastai(cache):
    learn = learner(cache, steps=8)
    learn.fit_one_cycle(5, 4e-4)
    rates = learn.recorder.hps['lr']
    assert len(rates) == 40 and math.isclose(max(rates), 4e-4, rel_tol=.01) and rates[0] < 2e-5 and rates[-1] < 4e-6
    learn.fit_flat_cos(2, 1e-3)
    rates = learn.recorder.hps['lr']
    assert len(rates) == 16 and rates[:12] == [1e-3] * 12 and rates[-1] < 2e-4


def test_the_schedule_of_a_training(cache):
    config = TrainConfig('tiny', steps=40, warmup=10, batch_size=2, learning_rate=4e-4, checks=4)
    learn = quiet(config_learner(cache, config))
    learn.fit(config.epochs, cbs=run_callbacks(learn, config)[:1])
    falls = [.01 + .99 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    expected = [4e-4 * min(1, (step + 1) / 10) * fall for step, fall in enumerate(falls)]
    assert learn.recorder.hps['lr'] == pytest.approx(expected, rel=1e-6)


def test_lr_find_leaves_everything_as_it_was(cache):
    files = {f for f in cache.folder.rglob('*')}
    found, straight = learner(cache), learner(cache)
    for learn in (found, straight): learn.fit(1, 1e-3)
    before, epoch, optimizer = weights(found), found.dls.train.epoch, deepcopy(found.opt.state_dict())
    suggested = found.lr_find(num_it=20, show_plot=False)
    assert 1e-7 < suggested.valley < 10
    assert same(before, weights(found)) and found.dls.train.epoch == epoch
    for n, state in found.opt.state_dict()['state'].items():
        assert all(torch.equal(state[k], optimizer['state'][n][k]) for k in state)
    for learn in (found, straight): learn.fit(1, 1e-3, cbs=KeepLosses())
    assert found.step_losses == straight.step_losses and same(weights(found), weights(straight))
    assert {f for f in cache.folder.rglob('*')} == files
    assert not found.path.resolve().is_relative_to(cache.folder.resolve())


def test_validation_sees_the_averaged_weights(cache):
    learn = learner(cache, ema=.99, steps=20)
    learn.fit(1, 5e-3)
    averaged = learn.validate()[0]
    assert averaged == pytest.approx(learn.recorder.values[-1][0]) and averaged == learn.validate()[0]
    plain = learner(cache)
    plain.model.network.load_state_dict(learn.model.average.model.state_dict())
    assert plain.validate()[0] == pytest.approx(averaged, rel=1e-6)  # no step yet: what it validates is the network
    plain = learner(cache)
    plain.model.network.load_state_dict(learn.model.network.state_dict())
    assert abs(plain.validate()[0] / averaged - 1) > .01


def test_eight_batches_of_one_are_one_batch_of_eight(cache):
    class KeepGradients(Callback):
        "The gradients of each step, after accumulation and before clipping."
        order = 8
        def before_step(self):
            self.learn.gradients = [p.grad.clone() for p in self.model.network.parameters()]
    whole, parts = learner(cache, batch_size=8, steps=1), learner(cache, batch_size=1, steps=8)
    whole.fit(1, cbs=KeepGradients())
    parts.fit(1, cbs=[KeepGradients(), GradientAccumulation(8)])
    assert whole.model.steps == parts.model.steps == 1  # the average follows steps, not batches
    largest = max(g.abs().max() for g in whole.gradients)
    assert largest > 0
    for a, b in zip(whole.gradients, parts.gradients): assert (a - b).abs().max() < 1e-5 * largest


def test_the_optimizer(cache):
    class KeepNorms(Callback):
        "Norms of the gradient, as the optimizer sees it."
        order = 12
        def before_fit(self): self.learn.norms = []
        def before_step(self):
            squares = [p.grad.square().sum() for p in self.model.network.parameters()]
            self.learn.norms.append(torch.stack(squares).sum().sqrt().item())
    learn = learner(cache, weight_decay=.03, clip=.01)
    learn.fit(1, 1e-3, cbs=KeepNorms())
    assert isinstance(learn.opt.opt, torch.optim.AdamW)
    group = learn.opt.opt.param_groups[0]
    assert (group['weight_decay'], group['betas'], group['fused'], group['lr']) == (.03, (.9, .99), True, 1e-3)
    assert len(group['params']) == len(list(learn.model.network.parameters()))  # not the average
    assert learn.norms == pytest.approx([.01] * 6, rel=1e-3)


def test_one_seed_is_one_training(cache):
    def losses(seed):
        learn = learner(cache, seed=seed)
        learn.dls.train_ds.seed = seed
        learn.fit(2, 1e-3, cbs=KeepLosses())
        return learn.step_losses
    first = losses(3)
    assert len(first) == 12 and first == pytest.approx(losses(3), abs=1e-5)
    assert abs(first[0] - losses(4)[0]) > 1e-4


def test_an_epoch_that_begins_later_is_that_epoch(cache):
    straight, later = learner(cache), learner(cache)
    straight.fit(1, 1e-3)
    straight.save('one_epoch')
    later.load('one_epoch')
    straight.fit(1, 1e-3, cbs=KeepLosses())
    later.fit(2, 1e-3, cbs=KeepLosses(), start_epoch=1)
    assert later.step_losses == straight.step_losses and same(weights(later), weights(straight))


def test_save_and_load_keep_network_average_and_steps(cache):
    learn = learner(cache)
    learn.fit(1, 5e-3)
    learn.save('trained')
    loaded = learner(cache, seed=1).load('trained')
    assert same(weights(learn), weights(loaded)) and loaded.model.steps == 6
    assert not same(learn.model.average.state_dict(), learn.model.denoise.state_dict())


def test_without_validation_slices(cache, caplog):
    dls = make_dataloaders(cache, 4, device='cpu', steps_per_epoch=8, valid_slices=0)
    with caplog.at_level(logging.WARNING): learn = quiet(sdm_learner(dls, 'tiny', precision='float32'))
    assert 'no validation slices' in caplog.text and len(caplog.text.splitlines()) == 1
    learn.fit(1, 1e-3)
    assert learn.recorder.values[0][1] is None and learn.recorder.plot_loss() is not None
    with pytest.raises(CMRError, match='no validation slices') as error: learn.validate()
    assert '\n' not in str(error.value)
    assert learn.show_results(max_n=1, steps=2)


def test_half_precision_takes_effect_on_a_cpu(cache):
    learn = learner(cache)
    with torch.no_grad(): learn.model.network.out.weight.normal_(std=.1)
    single = learn.validate()[0]
    half = learn.to_bf16().validate()[0]
    assert single != half and half == pytest.approx(single, rel=.05)
    assert learner(cache, precision='bfloat16').model.denoise.precision == 'bfloat16'
    assert learn.to_fp32().validate()[0] == single
    with pytest.raises(CMRError, match='precision='): learn.to_fp16()


def test_what_a_notebook_shows(cache):
    learn = learner(cache)
    assert len(learn.show_batch(max_n=4).axes) >= 4 and learn.dls.show_batch() and learn.dls.valid.show_batch()
    learn.fit(1, 1e-3)
    assert len(learn.show_results(max_n=2, steps=2).axes) == 2 * 4  # two types, two pairs each
    assert learn.recorder.plot_loss()
    losses, targets, each = learn.get_preds(with_loss=True)
    assert torch.equal(losses, each) and len(targets) == len(learn.dls.valid_ds)
    images, classes, spacing = learn.get_preds(with_input=True)[0]  # the batch as it was loaded
    assert torch.equal(images, targets) and classes.dtype == torch.uint8 and spacing.shape == losses.shape
    assert paint(learn.checkpoint, [cache.grid(0)], [0], steps=2)[0].pixels.max() > 20  # ms


@pytest.mark.parametrize('fast', (False, True))
def test_the_summary_counts_every_parameter(cache, tmp_path, fast):
    large = prepare(read_cohort(cache.folder.parent/'toy', 'csv'), tmp_path/'large', Geometry(64, 2.0, 'heart'))
    learn = learner(large, batch_size=2, fast=fast)
    before, averaged = weights(learn), learn.model.average.model
    text = learn.summary()
    parameters = sum(p.numel() for p in learn.model.network.parameters())
    assert f'Total params: {parameters:,}' in text and f'Total trainable params: {parameters:,}' in text
    assert 'Noising' in text and same(before, weights(learn)) and learn.model.average.model is averaged


def test_the_published_recipe(cache):
    learn = learner(cache, recipe='paper')
    learn.fit(1, 1e-3)
    assert all(math.isfinite(value) for value in learn.validate()) and learn.show_results(max_n=1, steps=2)


def test_callbacks_of_fastai(cache):
    learn = learner(cache)
    better = SaveModelCallback(fname='best')
    learn.fit(3, 1e-3, cbs=[better, CSVLogger(), ReduceLROnPlateau(patience=1, factor=2.)])
    assert learn.validate()[0] == pytest.approx(better.best) and (learn.path/'models'/'best.pth').is_file()
    log = learn.csv_logger.read_log() if hasattr(learn, 'csv_logger') else (learn.path/'history.csv').read_text()
    assert 'loss_sigma_q4' in str(log)
    learn.fit(20, 0., cbs=EarlyStoppingCallback(patience=2, min_delta=1.))
    assert len(learn.recorder.values) < 20


def test_it_learns_to_look_at_the_label_map(cache):
    learn = learner(cache, batch_size=8, steps=60)
    learn.fit_one_cycle(2, 3e-3)
    loss, shuffled, *quarters = learn.validate()
    assert loss < .95 * shuffled and all(math.isfinite(q) for q in quarters)


def test_a_learner_in_a_run_writes_into_it(cache):
    with start_run('learner') as run:
        learn = learner(cache)
        assert learn.path == run.folder and learn.save('here').is_relative_to(run.folder)
    assert learner(cache).path != run.folder


def test_a_training_writes_into_its_run(cache, monkeypatch):
    paths = []
    monkeypatch.setattr('cmr_diffusion.training.learner.log_settings', lambda learn, config: paths.append(learn.path))
    _, folder = train(cache, TrainConfig('tiny', steps=1, checks=1, batch_size=2), 'learner', device='cpu')
    assert paths == [folder.parent]


def test_steps_and_checks(cache):
    run_id, folder = train(cache, TrainConfig('tiny', steps=7, checks=3, batch_size=2), 'learner', device='cpu')
    run = find_run(run_id)
    with start_run(run_id=run_id) as opened:
        history = {k: [m.step for m in opened.client.get_metric_history(run_id, k)] for k in run.data.metrics}
        images = [f.path for f in opened.client.list_artifacts(run_id, 'images') if f.path.endswith('.png')]
    assert history['loss/validation'] == history['loss/training'] == [2, 5, 7]
    assert history['train/images'] == [2, 5, 7] and run.data.metrics['train/images'] == 14
    for name in ('loss/validation_shuffled_masks', *(f'valid/loss_sigma_q{n}' for n in (1, 2, 3, 4))):
        assert history[name] == [2, 5, 7]
    assert 'train/learning_rate' in history and 'train/images_per_second' in history
    assert sorted(int(path.split('+step+')[1].split('+')[0]) for path in images) == [0, 2, 5, 7]
    info = load_checkpoint(folder).info
    assert (info['steps'], info['images'], info['run_id'], info['config']['checks']) == (7, 14, run_id, 3)


def test_a_time_box(cache):
    config = TrainConfig('tiny', minutes=.05, checks=2, warmup=1, batch_size=2)
    run_id, folder = train(cache, config, 'learner', device='cpu')
    with start_run(run_id=run_id) as run:
        checks = run.client.get_metric_history(run_id, 'loss/validation')
        rates = [m.value for m in run.client.get_metric_history(run_id, 'train/learning_rate')]
    assert len(checks) == 2 and load_checkpoint(folder).info['steps'] == checks[-1].step >= 2
    assert rates[-1] < rates[0] or checks[-1].step < 4  # a busy machine may have time for a step per epoch only


def test_balance_gives_every_type_the_same_share(cache, tmp_path, caplog):
    def types(balance, cache):
        "The type of each image of an epoch."
        config = TrainConfig('tiny', steps=30, checks=1, batch_size=2, precision='float32', balance=balance)
        dls = config_learner(cache, config).dls
        return [cache.spec.decode(classes.numpy())[1] for batch in dls.train for classes in batch[1]]
    train, of_t2 = cache.table.split == 'train', cache.table.type == 'T2'
    rare = cache.table[~(train & of_t2) | (cache.table.index == cache.table.index[train & of_t2][0])]
    few = prepare(rare, tmp_path/'few', cache.geometry)
    share = 1 / len(few.rows('train'))
    assert len(few.rows('train', 'T2')) == 1 and types(False, few).count('T2') == pytest.approx(60 * share, abs=1)
    assert types(True, few).count('T2') == types(True, few).count('T1') == 30
    assert 'no effect' not in caplog.text
    one = prepare(cache.table[~of_t2], tmp_path/'one', cache.geometry)
    assert types(True, one) == ['T1'] * 60 and 'so balance has no effect' in caplog.text


def test_training_goes_on_from_a_checkpoint(cache):
    config = TrainConfig('tiny', steps=6, checks=1, batch_size=4, precision='float32')
    _, folder = train(cache, config, 'learner', device='cpu')
    further = quiet(config_learner(cache, config, init=folder))
    assert further.validate()[0] == pytest.approx(load_checkpoint(folder).info['valid/loss'], rel=1e-4)
