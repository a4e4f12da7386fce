"""A training that is stopped, killed or refused: what is left goes on, and ends as if nothing had happened."""
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmr_diffusion import CMRError, Geometry, TrainConfig, load_checkpoint, paint, prepare, read_cohort, train
from cmr_diffusion.grid.loaders import make_dataloaders
from cmr_diffusion.model import checkpoint as checkpoint_chapter, sdm
from cmr_diffusion.stores import open_client
from cmr_diffusion.toy import toy_cohort
from cmr_diffusion.tracking import find_run, start_run
from cmr_diffusion.training import checks, continuing, learner as learner_chapter, resume, stopping
from cmr_diffusion.training.callbacks import Objective, TimeBox
from cmr_diffusion.training.continuing import find_training
from cmr_diffusion.training.learner import config_learner, run_callbacks, sdm_learner
from cmr_diffusion.training.resume import newest_point, points_in, read_point

from fastai.callback.core import Callback

CLOCK = {'train/images_per_second'}  # metrics that two trainings of one seed need not share
STEPS = 24
MINI = dict(width=32, multipliers=(1,), blocks=1, attention=(), hidden=8, size=16, dropout=.1)
#           dropout: so that PyTorch's own random numbers count, too


def settings(**changes):
    "A training of a second or two, with dropout."
    return TrainConfig(**{**dict(preset='tiny', steps=STEPS, checks=3, batch_size=2, precision='float32', warmup=5,
                                 learning_rate=3e-3, ema=.9, balance=True), **changes})


@pytest.fixture(scope='module')
def place():
    "A folder with a cache and a store of runs, and the mini network in place of the preset 'tiny'."
    memory = Path('/dev/shm')  # resume points wait for the disk, which others may be using
    room = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
    folder = Path(room.name).resolve()
    with room, pytest.MonkeyPatch.context() as patch:
        patch.delenv('IN_TEST', raising=False)
        patch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{folder}/mlruns/mlflow.db')
        patch.setitem(sdm.PRESETS, 'tiny', MINI)
        patch.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        fast_pictures(patch)
        yield folder
        torch.set_num_threads(threads)


def fast_pictures(patch):
    "Sample grids of two images in two steps."
    small = checks.SampleGrid.__init__
    patch.setattr(checks.SampleGrid, '__init__', lambda self, checkpoint: small(self, checkpoint, images=2, steps=2))


@pytest.fixture(scope='module')
def cache(place):
    table = read_cohort(toy_cohort(place/'toy', patients=4, splits=('train', 'train', 'train', 'val')), 'csv')
    return prepare(table, place/'cache', Geometry(16, 6.0, 'heart', jitter=1))


@pytest.fixture(scope='module')
def straight(cache):
    "The id of a run that nobody interrupted."
    return train(cache, settings(), device='cpu', run_name='straight')[0]


def last_point(run_id): return newest_point(find_training(run_id)[1])


def history(run_id):
    "Metric -> its points (step, value)."
    client = open_client(os.environ['MLFLOW_TRACKING_URI'])
    names = find_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def check_equal(run_id, other, cache):
    "Two runs have the same weights, optimizer and metrics, and no point twice."
    one, two = last_point(run_id), last_point(other)
    learned = {k for k in one.tensors if not k.startswith('random.')}
    assert learned == {k for k in two.tensors if not k.startswith('random.')}
    assert [k for k in learned | {'random.torch'} if not torch.equal(one.tensors[k], two.tensors[k])] == []
    for name in ('step', 'epoch', 'step_in_epoch', 'train_iter', 'pct_train', 'groups'):
        assert getattr(one.state, name) == getattr(two.state, name), name
    here, there = history(run_id), history(other)
    assert set(here) == set(there)
    for name in here:
        steps = [step for step, _ in there[name]]
        assert steps == [step for step, _ in here[name]], (name, steps)
        assert name in CLOCK or here[name] == there[name], name
    series = [sorted(pictures(run)) for run in (run_id, other)]
    assert series[0] == series[1] == [0, STEPS // 3, 2 * STEPS // 3, STEPS]
    digests = [checkpoint_chapter.weights_digest(files(run)/'checkpoint/model.safetensors') for run in (run_id, other)]
    assert digests[0] == digests[1] and load_checkpoint(files(other)/'checkpoint').info['steps'] == STEPS
    assert find_run(other).info.status == 'FINISHED'


def files(run_id): return continuing.files_of(run_id)


def pictures(run_id):
    "The steps of the sample grids of a run."
    names = [path.name for path in (files(run_id)/'images').glob('samples*.png')]
    return [int(re.search(r'[+%]step[+%](?:2B)?(\d+)', name)[1]) for name in names]


# Children: processes that train, and end themselves with SIGKILL.

class Killer:
    "Kills its process at the n-th event: the end of a step, a rename, a wait for the disk, a line to the store, ..."
    def __init__(self, at, report=None): self.at, self.count, self.report = at, 0, report

    def event(self, *_):
        self.count += 1
        if self.count == self.at: os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner, name):
        "Count the calls of a function, before and after."
        function = getattr(owner, name)
        def counted(*args, **kwargs):
            self.event(name)
            found = function(*args, **kwargs)
            self.event(name)
            return found
        setattr(owner, name, counted)


def watch(killer, kinds):
    "What a killer counts."
    from cmr_diffusion import results
    from mlflow import MlflowClient
    if 'step' in kinds:
        wrapped = stopping.ResumeWriter.after_batch
        def after_batch(self):
            if self.training: killer.event()
            wrapped(self)
            if self.training: killer.event()
        stopping.ResumeWriter.after_batch = after_batch
    if 'write' in kinds:
        for owner, name in ((os, 'rename'), (os, 'replace'), (os, 'fsync'), (results, 'to_disk'),
                            (results, 'take_place'), (resume, 'save_file'), (checkpoint_chapter, 'save_file'),
                            (Path, 'write_text'), (resume.shutil, 'rmtree')): killer.before(owner, name)
    if 'log' in kinds:
        for name in ('log_batch', 'log_artifacts', 'log_dict'): killer.before(MlflowClient, name)


def child(cache_folder, run_id, how, at, kinds, minutes, ready):
    "Train or go on in a process of its own; `at` is the event at which it is killed."
    from cmr_diffusion import CohortCache
    torch.set_num_threads(1)
    sdm.PRESETS['tiny'] = MINI
    fast_pictures(pytest.MonkeyPatch())
    killer = Killer(at)
    watch(killer, kinds)
    cache = CohortCache.load(cache_folder)
    options = dict(run_id=run_id, config=settings()) if how == 'begin' else dict(resume=run_id)
    train(cache, device='cpu', save_every=minutes, **options)
    ready.send(killer.count)


SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['pytest', 'cmr_diffusion.toy', 'cmr_diffusion.training.learner', 'mlflow', 'sqlalchemy',
                               'mlflow.store.tracking.sqlalchemy_store', 'cmr_diffusion.cohort.table'])
# these are imported once for all children


def in_process(cache, run_id, how, at=0, kinds=('step', 'write', 'log'), minutes=0.):
    "Exit code of a child, and how many events it has counted (None where it was killed)."
    receive, send = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=child, args=(str(cache.folder), run_id, how, at, kinds, minutes, send))
    process.start()
    send.close()
    try: count = receive.recv()
    except EOFError: count = None
    process.join(120)
    return process.exitcode, count


def new_run(name):
    "An empty run, whose id is known before the first kill."
    with start_run('cmr_diffusion', name) as run: return run.id


def killed_and_resumed(cache, name, kills):
    "Train with a kill at each of some events (kinds, number, minutes between points) of one process after the other."
    run_id, how, done = new_run(name), 'begin', 0
    for kinds, at, minutes in kills:
        code, _ = in_process(cache, run_id, how, at, kinds, minutes)
        assert code in (0, -signal.SIGKILL), code
        done += code != 0
        if points_in(continuing.resume_folder(run_id)): how = 'resume'
        if code == 0: break
    if code != 0: assert in_process(cache, run_id, how)[0] == 0
    return run_id, done


def test_killed_three_times(cache, straight):
    kills = [(('step',), 27, 10.), (('write',), 60, 0.), (('log',), 9, 10.)]
    run_id, killed = killed_and_resumed(cache, 'killed', kills)
    assert killed == 3
    check_equal(straight, run_id, cache)


@pytest.mark.skipif('CMR_SLOW' not in os.environ, reason='slow: set CMR_SLOW=1')
@pytest.mark.parametrize('seed', range(4))
def test_killed_twenty_times(cache, straight, seed):
    draw = random.Random(seed)
    sets = [('step',), ('write',), ('log',), ('step', 'write', 'log')]
    most = dict(zip(sets, (20, 150, 12, 60)))
    kills = [(kinds, draw.randint(1, most[kinds]), draw.choice([0., 10.])) for kinds in draw.choices(sets, k=20)]
    run_id, killed = killed_and_resumed(cache, f'killed {seed}', kills)
    print(f'seed {seed}: {killed} kills')
    check_equal(straight, run_id, cache)


# Signals

class At(Callback):
    "Does something once: after a step, in the validation after it, or before the sample grid is painted."
    order = 1
    def __init__(self, step, act, event='after_batch', training=True):
        self.step, self.act, self.event, self.train_part = step, act, event, training

    def __call__(self, event):
        is_here = event == self.event and self.learn.training == self.train_part and self.learn.model.steps == self.step
        if is_here and self.act: self.act, act = None, self.act
        else: return
        act()


@pytest.fixture
def also(monkeypatch):
    "Add a callback to all trainings of a test."
    def add(callback):
        own = learner_chapter.run_callbacks
        monkeypatch.setattr(learner_chapter, 'run_callbacks', lambda *args: [*own(*args), callback])
    yield add


def one_line(error, *words):
    "The message of an error is one line with some words in it."
    text = str(error.value)
    assert '\n' not in text and len(text) < 700, text
    for word in words: assert word in text, text
    return text


STOPS = {
    'in an epoch': (signal.SIGTERM, 11, 'after_batch', True),
    'in a validation': (signal.SIGINT, 16, 'after_batch', False),
    'before the samples': (signal.SIGTERM, 8, 'after_validate', False),
    'at the first step': (signal.SIGINT, 1, 'after_batch', True),
    'the line drops': (signal.SIGHUP, 3, 'after_batch', True)}

@pytest.mark.parametrize('when', STOPS)
def test_stopped_by_a_signal(cache, straight, also, caplog, when):
    number, step, event, training = STOPS[when]
    own = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = [signal.getsignal(n) for n in own]
    also(At(step, lambda: os.kill(os.getpid(), number), event, training))
    with pytest.raises(stopping.Stopped) as error: train(cache, settings(), device='cpu', run_name=when)
    run = find_run(when)
    assert str(error.value).endswith(f'; go on with: cmr_train {cache.folder} --resume {run.info.run_id}')
    assert f'stopped after step {step}' in str(error.value) and error.value.code == 128 + number
    assert run.info.status == 'KILLED' and last_point(run.info.run_id).state.step == step
    assert [signal.getsignal(n) for n in own] == handlers
    assert train(cache, resume=when, device='cpu')[0] == run.info.run_id
    check_equal(straight, run.info.run_id, cache)


@pytest.mark.parametrize('wait', [0, 1.1])
def test_a_later_signal_acts_at_once(cache, also, wait):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(wait)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(.1)
    also(At(3, twice))
    name = f'twice {wait}'
    with pytest.raises(KeyboardInterrupt) as error: train(cache, settings(), device='cpu', run_name=name)
    assert isinstance(error.value, stopping.Stopped) == (wait == 0)  # the process group and torchrun both send it
    assert find_run(name).info.status == 'KILLED'


def test_ignored_signals_stay_ignored(cache):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping.stop_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(.05)
        assert not flag.number and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)


def test_a_signal_at_the_end_changes_nothing(cache, also):
    also(At(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM), 'after_epoch', False))
    run_id, _ = train(cache, settings(), device='cpu')
    assert find_run(run_id).info.status == 'FINISHED'


# Points

def test_points_are_few_and_plain(cache, straight):
    points = points_in(continuing.resume_folder(straight))
    assert [p.name for p in points] == [f'step_{STEPS:08d}', f'step_{2 * STEPS // 3:08d}']
    names = {p.name for p in points[0].iterdir()}
    assert names == {'state.json', 'state.safetensors', '.cmr_diffusion.json'}


def test_points_by_the_clock(cache, monkeypatch):
    found = []
    own = stopping.write_point
    monkeypatch.setattr(stopping, 'write_point', lambda *args: found.append(args[3:5]) or own(*args))
    train(cache, settings(steps=4, checks=2), device='cpu', save_every=1e-9)
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


@pytest.fixture
def halfway(cache, also):
    "A run that was stopped after step 11, with points of the steps 8 and 11."
    names = []
    def make(**changes):
        also(At(11, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(stopping.Stopped) as error: train(cache, settings(**changes), device='cpu')
        names.append(str(error.value).split()[-1])
        return names[-1]
    yield make


def damage(path, how):
    "Spoil a file."
    content = path.read_bytes()
    if how == 'cut': path.write_bytes(content[:len(content) // 2])
    elif how == 'changed': path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == 'gone': path.unlink()
    else: path.write_text(json.dumps(how(json.loads(content))))


@pytest.mark.parametrize('file, how', [('state.safetensors', 'cut'), ('state.json', 'cut')])
def test_a_damaged_point_is_told_and_the_one_before_is_taken(cache, straight, halfway, caplog, file, how):
    run_id = halfway()
    damage(continuing.resume_folder(run_id)/'step_00000011'/file, how)
    train(cache, resume=run_id, device='cpu')
    told = [r.message for r in caplog.records if 'The point of step 8 is taken' in r.message]
    assert len(told) == 1 and file in told[0] and '\n' not in told[0]
    check_equal(straight, run_id, cache)


def put(name, value):
    "A change of a field in state.json; 'facts.precision' is one within another."
    def change(state):
        inner, *below = name.split('.')
        if below: state[inner][below[0]] = value
        else: state[inner] = value
        return state
    return change


ODD = [
    ('state.safetensors', 'changed', 'differs from what was written'), ('state.safetensors', 'gone', 'cannot be read'),
    ('state.json', 'gone', 'cannot be read'), ('state.json', lambda state: [], 'format None'),
    ('state.json', put('format', 99), 'format 99, this program reads 1'),
    ('state.json', put('step', 'x'), "step 'x'"), ('state.json', put('pct_train', None), 'pct_train'),
    ('state.json', put('callbacks', 3), 'callbacks'), ('state.json', put('facts.config', 7), 'config'),
    ('state.json', put('extra', 1), 'extra is unknown')]

def test_odd_points_are_refused_in_one_line(cache, straight, tmp_path):
    whole = points_in(continuing.resume_folder(straight))[0]
    for n, (file, how, word) in enumerate(ODD):
        folder = tmp_path/f'{n}'/whole.name
        shutil.copytree(whole, folder)
        damage(folder/file, how)
        with pytest.raises(CMRError) as error: read_point(folder)
        one_line(error, word)
        with pytest.raises(CMRError) as error: train(cache, resume=folder.parent, device='cpu')
        one_line(error, word)


def test_two_processes_do_not_train_one_run(cache, halfway):
    run_id = halfway()
    before = find_run(run_id).info.status
    with continuing.only_here(run_id):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(continuing, '_HELD', set())  # as it is in another process
            with pytest.raises(CMRError) as error: train(cache, resume=run_id, device='cpu')
    one_line(error, 'is being trained by another process')
    assert find_run(run_id).info.status == before


# What is refused

def test_what_differs_is_named(cache, straight, halfway, place, monkeypatch):
    run_id = halfway()
    table = read_cohort(toy_cohort(place/'other_toy', patients=4, seed=1), 'csv')
    other = prepare(table, place/'other', cache.geometry)
    grid = prepare(read_cohort(place/'toy', 'csv'), place/'grid', Geometry(16, 5.0, 'heart', jitter=1))
    refused = [
        (dict(cache=other), ['other: differs from the cache of the training', 'fingerprint']),
        (dict(cache=grid), ['grid: its grid is', 'spacing=5.0', 'spacing=6.0']),
        (dict(config=settings(batch_size=4)), ['batch_size 4: the training that is resumed has 2']),
        (dict(config=dict(steps=7)), ['steps 7: the training that is resumed has 24']),
        (dict(init=straight), ['init', 'started from other weights']),
        (dict(run_id=straight), ['give resume or run_id'])]
    for options, words in refused:
        with pytest.raises(CMRError) as error: train(**{**dict(cache=cache, resume=run_id, device='cpu'), **options})
        one_line(error, *words)
    for name, value, word in (('__version__', '0.0.9', 'begun by cmr_diffusion'),
                              ('choose_precision', lambda *_: 'bfloat16', 'in bfloat16')):
        with monkeypatch.context() as patch:
            patch.setattr(continuing, name, value)
            with pytest.raises(CMRError) as error: train(cache, resume=run_id, device='cpu')
        one_line(error, word)
    assert find_run(run_id).info.status == 'KILLED'
    same = dict(steps=STEPS, batch_size='auto', balance=True)  # nothing differs; the run has found its batch
    assert train(cache, same, resume=files(run_id), device='cpu')[0] == run_id
    check_equal(straight, run_id, cache)


def test_a_finished_run_says_so(cache, straight, caplog):
    caplog.set_level('INFO')
    before = history(straight)
    assert train(cache, resume='straight', device='cpu') == (straight, files(straight)/'checkpoint')
    assert f'the run straight ({straight}) has finished: there is nothing to resume' in caplog.text
    assert history(straight) == before


@pytest.mark.parametrize('run, words', [
    ('nobody', ['no run of that id or name']), ('', ['no name']),
    ('empty', ['no resume point on this machine', '--init']),
    ('.', ['no resume point in it', 'give a run id'])])
def test_nothing_to_resume(cache, place, run, words):
    if run == 'empty':
        new_run('empty')
        open_client(os.environ['MLFLOW_TRACKING_URI']).set_terminated(find_run('empty').info.run_id, 'FAILED')
    with pytest.raises(CMRError) as error: train(cache, resume=run, device='cpu')
    one_line(error, *words)


# What goes wrong

def test_no_room_for_the_points_at_the_start(cache, monkeypatch):
    run_id = new_run('in the way')
    files(run_id).mkdir(parents=True, exist_ok=True)
    (files(run_id)/'resume').write_text('a file')
    with pytest.raises(CMRError) as error: train(cache, settings(), device='cpu', run_id=run_id)
    one_line(error, 'is a file, not a folder')
    assert find_run(run_id).info.status == 'FAILED' and 'loss/validation' not in find_run(run_id).data.metrics


def test_a_folder_that_cannot_be_written_any_more(cache, straight, also):
    run_id = new_run('locked')
    folder = continuing.resume_folder(run_id)
    def lock():
        folder.rename(folder.with_name('away'))
        folder.write_text('a file in the way')  # root may write into any folder
    also(At(11, lock))
    with pytest.raises(CMRError) as error: train(cache, settings(), device='cpu', run_id=run_id)
    text = one_line(error, 'the resume point of step 16 cannot be written', 'is a file, not a folder')
    assert text.endswith(f'Then go on from step 8: cmr_train {cache.folder} --resume {run_id}')
    run = find_run(run_id)
    assert run.info.status == 'FAILED' and 'cannot be written' in run.data.tags['reason']
    folder.unlink()
    folder.with_name('away').rename(folder)
    train(cache, resume=run_id, device='cpu')
    check_equal(straight, run_id, cache)


@pytest.fixture
def small_disk(place):
    "Mount a small disk of memory in a folder."
    mounted = []
    def mount(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: pytest.skip(f'no disk can be mounted here: {done.stderr.strip()}')
        mounted.append(folder)
    yield mount
    for folder in mounted: subprocess.run(['umount', '-l', folder], check=True)


def test_a_full_disk(cache, straight, also, small_disk):
    run_id = new_run('full')
    folder = continuing.resume_folder(run_id)
    size = sum(p.stat().st_size for p in points_in(continuing.resume_folder(straight))[0].iterdir())
    small_disk(folder, int(4.5 * size))
    def fill():
        with open(folder/'.filler', 'wb') as f: f.write(bytes(2 * size))
    also(At(11, fill))
    with pytest.raises(CMRError) as error: train(cache, settings(), device='cpu', run_id=run_id)
    one_line(error, 'the resume point of step 16 cannot be written', 'No space left on device', 'go on from step 8')
    assert [p.name for p in points_in(folder)] == ['step_00000008', 'step_00000000']
    assert {p.name for p in folder.iterdir()} == {'step_00000008', 'step_00000000', '.filler'}
    (folder/'.filler').unlink()
    train(cache, resume=run_id, device='cpu')
    check_equal(straight, run_id, cache)


def test_a_loader_worker_that_dies(cache):
    config = settings()
    dls = make_dataloaders(cache, 2, device='cpu', num_workers=1, steps_per_epoch=8)
    learn = sdm_learner(dls, 'tiny', precision='float32')
    def kill_workers():
        for process in multiprocessing.active_children(): os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(CMRError) as error, start_run('cmr_diffusion', 'worker') as run, learn.no_bar():
        facts = continuing.facts_of(learn, config, run.id)
        writer = stopping.ResumeWriter(continuing.resume_folder(run.id), facts, save_every=0.)
        with learn.no_logging(): learn.fit(3, cbs=[*run_callbacks(learn, config), writer, At(3, kill_workers)])
    one_line(error, 'a process that loads slices ended', 'worker')
    assert find_run('worker').info.status == 'FAILED'
    assert last_point(find_run('worker').info.run_id).state.step >= 2


# The clock

def test_the_clock_stands_while_nothing_runs(cache, also, monkeypatch):
    now = [0.]
    monkeypatch.setattr(learner_chapter, 'TimeBox', lambda minutes: TimeBox(minutes, lambda: now[0]))
    own = stopping.ResumeWriter.__init__
    monkeypatch.setattr(stopping.ResumeWriter, '__init__', lambda self, *args: own(self, *args, clock=lambda: now[0]))
    class Tick(Callback):
        order = 0
        def after_batch(self):
            if self.training: now[0] += 1
    also(Tick())
    config = settings(steps=None, minutes=.2, checks=2)  # 12 seconds, so 12 steps
    also(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(stopping.Stopped): train(cache, config, device='cpu', run_name='clock')
    now[0] += 10_000
    run_id, _ = train(cache, resume='clock', device='cpu')
    state = last_point(run_id).state
    assert (state.step, state.epoch, state.seconds) == (12, 2, 12.)
    assert state.callbacks['recorder']['iters'] == (6, 12) or state.callbacks['recorder']['iters'] == [6, 12]


# Batches by memory

def small_memory(monkeypatch, most, from_step=0, error=torch.OutOfMemoryError('CUDA out of memory')):
    "A memory that holds so many slices, from a step of the training on."
    own = Objective.forward
    def forward(self, x0, *args):
        if len(x0) > most and self.steps >= from_step: raise error
        return own(self, x0, *args)
    monkeypatch.setattr(Objective, 'forward', forward)


def test_the_batch_is_halved_until_it_fits(cache, monkeypatch, caplog):
    monkeypatch.setattr(continuing, 'AUTO_BATCH', 8)
    small_memory(monkeypatch, 2)
    config = settings(steps=4, checks=1)
    found, _ = train(cache, replace(config, batch_size='auto'), device='cpu')
    told = [r.message for r in caplog.records if 'memory' in r.message]
    assert told == [f'the memory is too small for {n} slices per step; {n // 2} are tried' for n in (8, 4)]
    assert find_run(found).data.params['batch_size'] == '2'
    assert last_point(found).state.facts.config['batch_size'] == 2
    given, _ = train(cache, config, device='cpu')
    one, two = last_point(found).tensors, last_point(given).tensors
    assert all(torch.equal(one[k], two[k]) for k in one if k.startswith(('trained', 'averaged', 'optimizer')))


@pytest.mark.parametrize('error, is_memory', [
    (torch.OutOfMemoryError('CUDA out of memory'), True), (MemoryError('Unable to allocate 2 GiB'), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError('CUDA error: out of memory'), True), (RuntimeError('shapes do not fit'), False),
    (ValueError('out of memory'), False)])
def test_errors_of_memory(error, is_memory): assert continuing.out_of_memory(error) == is_memory


def test_the_batch_is_halved_in_the_middle_of_a_training(cache, monkeypatch, caplog):
    monkeypatch.setattr(continuing, 'AUTO_BATCH', 4)
    small_memory(monkeypatch, 2, from_step=6)
    run_id, _ = train(cache, settings(steps=8, checks=2, batch_size='auto'), device='cpu')
    assert 'too small for 4 slices per step. It goes on with half of them' in caplog.text
    run, state = find_run(run_id), last_point(run_id).state
    assert run.info.status == 'FINISHED' and run.data.tags['resumed.batch_size'] == '2'
    assert (state.step, state.facts.config['batch_size'], state.callbacks['tracking']['images']) == (8, 2, 4*4 + 4*2)


@pytest.mark.parametrize('size, word', [(4, 'too small for 4 slices per step; give a smaller batch, or auto'),
                                        ('auto', 'too small for 1 slices per step; choose a smaller network')])
def test_no_batch_fits(cache, monkeypatch, size, word):
    monkeypatch.setattr(continuing, 'AUTO_BATCH', 2)
    small_memory(monkeypatch, 0)
    with pytest.raises(CMRError) as error: train(cache, settings(batch_size=size), device='cpu')
    one_line(error, word)


@pytest.mark.parametrize('size', ['Auto', '16', 0, None])
def test_odd_batches(size):
    with pytest.raises(CMRError) as error: settings(batch_size=size)
    one_line(error, f'batch_size {size!r}: give ', "'auto'")


# The first lines

def test_the_first_lines(cache, caplog):
    caplog.set_level('INFO')
    run_id, _ = train(cache, settings(steps=2, checks=1, minutes=5.), device='cpu', run_name='lines')
    told = [r for r in caplog.records if r.name.startswith('cmr_diffusion')]
    assert 'it never reaches' in told[0].message and told[0].levelname == 'WARNING'  # two steps are no warm-up
    lines = [r.message for r in told if r.levelname == 'INFO'][:5]
    assert lines[:4] == [f'run lines ({run_id})', 'device cpu, precision float32, 2 slices per step',
                         '18 slices to train on, 6 to validate on', '2 steps or 5 minutes']
    assert lines[4].startswith('look at it: ') and 'cmr_ui\n  then open http' in lines[4] and run_id in lines[4]
    assert not any('\n' in line for line in lines[:4])


# A longer list of channels

@pytest.fixture(scope='module')
def more_types(place):
    "A cache with a type more than the others, which comes first by name; more than one slice is painted per patient."
    table = read_cohort(toy_cohort(place/'more_toy', 4, ('LGE', 'T1', 'T2'), ('train', 'train', 'train', 'val')), 'csv')
    return prepare(table, place/'more', Geometry(16, 6.0, 'heart', jitter=1))


def test_init_with_a_further_type(straight, more_types, caplog):
    caplog.set_level('INFO')
    start = load_checkpoint(files(straight)/'checkpoint')
    learn = config_learner(more_types, settings(), 'cpu', init=straight)
    told = [r.message for r in caplog.records if 'LGE' in r.message]
    assert len(told) == 1 and 'start at zero' in told[0]
    names, old = learn.checkpoint.spec.names, start.spec.names
    structures = 'background', 'myocardium', 'left_ventricle', 'right_ventricle'
    assert names[:len(old)] == old and names[len(old):] == [f'LGE {s}' for s in structures]
    assert learn.dls.values['T1'] == start.values['T1'] and learn.dls.values['LGE'] == more_types.values['LGE']
    for name, weight in start.model.state_dict().items():
        own = learn.model.network.state_dict()[name]
        if own.shape == weight.shape: assert torch.equal(own, weight), name
        elif name.startswith('value_'):  # what it knows is read as before; LGE has a spread of its own
            assert torch.equal(own[:len(old)], weight) and (own[len(old):] != weight[0]).all(), name
        else:  # the tissue values have two columns per channel
            known = weight.shape[1]
            assert known in (len(old), 2*len(old)), name
            assert torch.equal(own[:, :known], weight) and not own[:, known:].any(), name
    images, classes, spacing = learn.dls.train.one_batch()
    assert {learn.checkpoint.spec.decode(c)[1] for c in classes.numpy()} <= {'LGE', 'T1', 'T2'}
    of_t1 = next(i for i in more_types.rows('train') if more_types.usable.type[i] == 'T1')
    image, classes, _ = learn.dls.train_ds.sample(int(of_t1))
    assert set(np.unique(classes)) <= set(range(5))  # as in the checkpoint
    grid = more_types.grid(int(of_t1))
    one, two = (paint(c, [grid], [0], steps=2)[0].pixels for c in (start, learn.checkpoint))
    assert np.array_equal(one, two)  # what the checkpoint knew, it paints as before


def test_a_training_with_a_further_type_goes_on_like_any_other(straight, more_types, also):
    also(At(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    options = dict(config=settings(steps=8, checks=2), device='cpu')
    with pytest.raises(stopping.Stopped): train(more_types, init=straight, run_name='further', **options)
    train(more_types, resume='further', init='straight', device='cpu')
    other, _ = train(more_types, init=straight, **options)
    one, two = last_point('further'), last_point(other)
    different = [k for k in one.tensors if not torch.equal(one.tensors[k], two.tensors[k])]
    assert all(k.startswith('random.') for k in different), different
    painted = load_checkpoint(files(other)/'checkpoint')
    resumed = load_checkpoint(files(one.state.facts.run_id)/'checkpoint')
    assert painted.spec.names == resumed.spec.names == list(resumed.tissue.names)
    assert painted.tissue == resumed.tissue  # in the channels of the checkpoint that it began with
    assert painted.spec.types[-1][0] == 'LGE'


def test_init_with_fewer_types_is_refused(cache, more_types, straight, place):
    only = prepare(read_cohort(toy_cohort(place/'one_toy', 4, ('T1',)), 'csv'), place/'one', Geometry(16, 6.0, 'heart'))
    with pytest.raises(CMRError) as error: config_learner(only, settings(), 'cpu', init=straight)
    one_line(error, 'trained with channels', 'T2')
