"""Several processes train as one does. torchrun starts this file, too: `work` is what each of its processes does."""
import json, os, signal, subprocess, sys, time
from configparser import ConfigParser
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cmr_diffusion.__main__ as program
from cmr_diffusion import CMRError, CohortCache, Geometry, TrainConfig, prepare, read_cohort, sdm_learner
from cmr_diffusion.grid.loaders import make_dataloaders
from cmr_diffusion.processes import any_process, barrier, from_main, mean_of_processes, rank, several, world_size
from cmr_diffusion.toy import toy_cohort
from cmr_diffusion.training import learner as learner_chapter
from cmr_diffusion.training.callbacks import TimeBox, objective_of

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop

ROOT = Path(__file__).resolve().parents[1]
CASES = {  # name -> options of the learner, processes that load
    'sgd': (dict(fast=False), 0), 'adam': ({}, 1), 'bfloat16': (dict(precision='bfloat16'), 0),
    'paper': (dict(recipe='paper', checkpointing=True), 0)}
OPTIONS = '--preset tiny --steps 4 --checks 2 --batch-size 4 --precision float32 --device cpu'.split()
CONFIG = TrainConfig('tiny', steps=4, checks=2, batch_size=4, precision='float32')  # the same
PARTS = 'image', 'classes', 'level', 'noise'  # of what the network is given


class Keep(Callback):
    "Keeps what the network is given, and the gradients of the first step, in which the processes have agreed."
    order = 10  # before clipping
    def before_fit(self): self.tasks, self.gradients = [], []
    def before_batch(self):
        x0, condition, level, noise = self.xb
        if self.training: self.tasks.append((x0, condition.classes, level, noise))

    def before_step(self):
        if self.gradients: return
        self.gradients = [p.grad.clone() for p in objective_of(self.learn).network.parameters()]


class KeepLosses(Callback):
    "Keeps the losses, as every callback sees them."
    def before_fit(self): self.losses = []
    def after_batch(self):
        if self.training: self.losses.append(self.loss.item())


class Spoil(Callback):
    "Makes a weight infinite after a step, in the last process alone."
    def after_step(self):
        weight = next(objective_of(self.learn).network.parameters())
        if rank() == world_size() - 1: weight.data.fill_(float('inf'))


def learner(folder, num_workers=0, batch_size=4, **options):
    "A tiny learner with random numbers in all layers; one row of its validation is left for a batch of its own."
    cache = CohortCache.load(folder/'cache')
    dls = make_dataloaders(cache, batch_size, num_workers=num_workers, device='cpu', steps_per_epoch=3, valid_slices=5)
    learn = sdm_learner(dls, 'tiny', **{'precision': 'float32', **options})
    torch.manual_seed(1)
    for p in learn.model.network.parameters(): torch.nn.init.normal_(p, std=.05)
    learn.logger = noop
    return learn.remove_cbs(ProgressCallback)


def train(folder, name):
    "Train a case; give the tensors and the numbers that are compared."
    options, num_workers = CASES[name]
    keep, losses = Keep(), KeepLosses()
    learn = learner(folder, num_workers, **options, cbs=[keep, losses])
    if name != 'adam': learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    seen = []  # rows of validation that the network of this process computes
    learn.model.register_forward_pre_hook(lambda model, task: None if model.training else seen.append(len(task[0])))
    with learn.in_processes(): learn.fit(2, 1e-3 if name == 'adam' else .1)
    tensors = {f'{kind}.{k}': v for kind, denoise in (('weight', learn.model.denoise), ('average', learn.model.average))
               for k, v in denoise.model.state_dict().items()}
    tensors |= {f'gradient.{n}': g for n, g in enumerate(keep.gradients)}
    tensors |= {f'{part}.{n}': task[k] for k, part in enumerate(PARTS) for n, task in enumerate(keep.tasks)}
    numbers = losses.losses + [number for values in learn.recorder.values for number in values]
    facts = dict(numbers=numbers, steps=learn.model.steps, share=learn.dls.train.share, kind=type(learn.model).__name__)
    return {k: v.contiguous() for k, v in tensors.items()}, facts, sum(seen)


def boxed(folder):
    "The steps that a time box allows, where the clock of every process goes at a speed of its own."
    learn = learner(folder)
    box = TimeBox(4 / 60, clock=lambda: (1 + 2 * rank()) * objective_of(learn).steps)
    with learn.in_processes(): learn.fit(2, 1e-3, cbs=box)
    return learn.model.steps


def refused(folder, action, **options):
    "What a learner says that cannot do something."
    learn = learner(folder, **options)
    try:
        with learn.in_processes(): action(learn)
    except CMRError as e: return str(e)


def work(folder, run):
    "What each of two processes does; `run` was begun by one."
    torch.set_num_threads(1)
    with several():
        learner_chapter.train(CohortCache.load(folder/'cache'), resume=run, device='cpu')
        facts = dict(processes=world_size(), agreed=from_main(f'from {rank()}'), any=any_process(rank() == 1),
                     none=any_process(False), mean=mean_of_processes(torch.tensor([0., 4.]) * rank()).tolist())
        rows = {}
        for name in CASES:
            tensors, facts[name], rows[name] = train(folder, name)
            save_file(tensors, folder/f'{rank()}.{name}.safetensors')
        facts['boxed'] = boxed(folder)
        facts['found'] = refused(folder, lambda learn: learn.lr_find(show_plot=False))
        facts['uneven'] = refused(folder, lambda learn: learn.fit(1), batch_size=5)
        facts['diverged'] = refused(folder, lambda learn: learn.fit(1, 1e-3, cbs=Spoil()))
        barrier()
    (folder/f'{rank()}.json').write_text(json.dumps([facts, rows]))


def fail(folder):
    "A training of whose processes the second one cannot go on."
    from cmr_diffusion.training.checks import TrackingCallback
    def after_batch(self):
        if rank() == 1: raise CMRError('this process has no room left')
    TrackingCallback.after_batch, program.PATIENCE = after_batch, 1
    sys.argv = ['cmr_diffusion', 'train', str(folder/'cache'), *OPTIONS, '--run-name', 'broken']
    sys.exit(program.main())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with the cache of drawn hearts on a grid of 16 pixels, and a store of runs."
    folder = tmp_path_factory.mktemp('several').resolve()
    prepare(read_cohort(toy_cohort(folder/'toy'), 'csv'), folder/'cache', Geometry(16, 6.0, 'heart', jitter=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{folder}/mlruns/mlflow.db')
        patch.delenv('IN_TEST', raising=False)
        yield folder


def torchrun(folder, *words):
    "What two processes print, and the exit code of torchrun."
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', *map(str, words)]
    own = dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=300)


def runs(name=None):
    "All runs of the store, or those of a name."
    from cmr_diffusion.stores import open_client, tracking_uri
    client = open_client(tracking_uri())
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return client, [run for run in found if name in (None, run.info.run_name)]


class Stop(Callback):
    "Asks for an end in the middle of an epoch, as Slurm does."
    def after_batch(self):
        if self.training and objective_of(self.learn).steps == 3: os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def stopped(folder):
    "The id of a run named `both`, which one process has begun."
    callbacks = learner_chapter.run_callbacks
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match='stopped after step 3'):
        patch.setattr(learner_chapter, 'run_callbacks', lambda learn, config: [Stop(), *callbacks(learn, config)])
        learner_chapter.train(CohortCache.load(folder/'cache'), CONFIG, run_name='both', device='cpu')
    return runs('both')[1][0].info.run_id


@pytest.fixture(scope='module')
def pair(folder, stopped):
    "Facts from both processes, and by case the rows that each has validated."
    done = torchrun(folder, __file__, 'work', folder, stopped)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(zip(*(json.loads((folder/f'{number}.json').read_text()) for number in range(2))))


def largest(tensors): return max(t.abs().max().item() for t in tensors)


@pytest.mark.parametrize('name', CASES)
def test_two_processes_train_as_one(folder, pair, name):
    one, facts, rows = train(folder, name)
    first, second = (load_file(folder/f'{number}.{name}.safetensors') for number in range(2))
    def of(tensors, *kinds): return {k: v for k, v in tensors.items() if k.partition('.')[0] in kinds}
    for key, whole in of(one, *PARTS).items():  # the same slices and the same noise, dealt
        assert torch.equal(torch.cat([first[key], second[key]]), whole), key
        assert not key.startswith('noise') or not torch.equal(first[key], second[key])
    same = of(first, 'gradient', 'weight', 'average')
    assert len(of(one, 'gradient')) > 50 and set(same) == set(of(second, 'gradient', 'weight', 'average'))
    assert all(torch.equal(first[key], second[key]) for key in same)
    close = dict(bfloat16=.02).get(name, 1e-5)
    size = largest(of(one, 'gradient').values())
    assert 0 < largest(first[k] - g for k, g in of(one, 'gradient').items()) < close * size
    if name != 'adam':  # Adam makes whole steps of what should be zero, as the gradient of a bias before a norm
        kept = of(one, 'weight', 'average')
        assert largest(first[k] - w for k, w in kept.items()) < close * .1
        assert largest(one[f'weight.{k}'] - one[f'average.{k}'] for k in [k.partition('.')[2] for k in kept]) > .001
    (both, again), dealt = pair
    assert both[name] == again[name]
    assert both[name]['numbers'] == pytest.approx(facts.pop('numbers'), rel=close) and len(facts) == 3
    assert {k: both[name][k] for k in facts} == json.loads(json.dumps(facts))
    assert rows == 20 and [by_case[name] for by_case in dealt] == [8, 12]  # two epochs and losses, of 4 + 1 slices
    assert facts == dict(steps=6, share=(0, 1), kind='Objective')


def test_processes_agree(pair):
    facts, again = pair[0]
    assert facts == again
    expected = dict(processes=2, agreed='from 0', any=True, none=False, mean=[0, 2])
    assert {k: facts[k] for k in expected} == expected
    assert facts['boxed'] == 4  # by the clock of the first; that of the second allows a step in each of two epochs
    assert facts['found'].startswith('lr_find: call it in one process')
    assert facts['uneven'] == 'batch_size 5: 2 processes share each batch; give a multiple of 2'
    assert facts['diverged'].startswith('the training diverged')


def points(name):
    "All points of the only run of a name, with the numbers of its pictures and of the files of its checkpoint."
    client, (run,) = runs(name)
    assert run.info.status == 'FINISHED'
    keys = [k for k in run.data.metrics if 'second' not in k]
    found = {k: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)] for k in keys}
    single = {(k, step): value for k, history in found.items() for step, value in history}
    assert sum(map(len, found.values())) == len(single)  # one point per step
    files = {name: client.list_artifacts(run.info.run_id, name) for name in ('images', 'checkpoint')}
    counts = {name: sum(not f.path.endswith('MODEL_CARD.md') for f in own) for name, own in files.items()}
    return single | counts


@pytest.fixture(scope='module')
def straight(folder):
    "All points of a training in one process, which nobody interrupted."
    learner_chapter.train(CohortCache.load(folder/'cache'), CONFIG, run_name='straight', device='cpu')
    return points('straight')


def test_a_training_of_two_is_one_run(folder, straight):
    done = torchrun(folder, '-m', 'cmr_diffusion', 'train', 'cache', *OPTIONS, '--run-name', 'two')
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ['run', 'model', 'look', 'then']  # of one process
    assert points('two') == pytest.approx(straight, rel=1e-4)
    assert straight['train/images', 4] == 16 and straight['images'] and straight['checkpoint']


def test_one_process_begins_and_two_go_on(pair, straight):
    assert points('both') == pytest.approx(straight, rel=1e-4)


def test_a_wrong_call_is_said_once(monkeypatch, capfd):
    said = 'cmr_train: --checks 0: give a whole number from 1 to 100000\n'
    monkeypatch.setattr(program, 'PATIENCE', 0)
    for name, value in dict(WORLD_SIZE='2', TQDM_DISABLE='').items(): monkeypatch.setenv(name, value)
    for number, expected in ('0', said), ('1', f'process 1: {said}'):  # this one, where torchrun has not ended it
        monkeypatch.setenv('RANK', number)
        monkeypatch.setattr(sys, 'argv', ['cmr_diffusion', 'train', 'cache', '--checks', '0'])
        assert program.main() == 2 and capfd.readouterr().err == expected


def test_an_error_in_one_process_ends_all(folder):
    began = time.monotonic()
    done = torchrun(folder, __file__, 'fail', folder)
    assert done.returncode and 'process 1: cmr_train: this process has no room left' in done.stderr
    begins = 'cmr_train: ended, since another process has'
    line = next(line for line in done.stderr.splitlines() if line.startswith(begins))
    assert ' --resume ' in line and 'rank0' not in done.stderr
    assert runs('broken')[1][0].info.status == 'FAILED'
    assert time.monotonic() - began < 120
    assert 'exitcode  : 2' in done.stderr


def test_commands(monkeypatch, capsys):
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    scripts = [line.partition('=') for line in settings['DEFAULT']['console_scripts'].split()]
    expected = {f'{name}={module}' for name, _, module in scripts if name.startswith('cmr_')}
    assert {f'cmr_{name}=cmr_diffusion.{module}:cmr_{name}' for name, module in program.COMMANDS.items()} == expected

    def called(*words, **env):
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', ['cmr_diffusion', *words])
            for name, value in env.items(): patch.setenv(name, value)
            return program.main(), *capsys.readouterr()
    code, out, _ = called('--help')
    assert code == 0 and all(f'\n  {name} ' in out for name in program.COMMANDS) and called()[1] == out
    assert called('trein') == (2, '', "cmr_diffusion: 'trein' is no command; see python -m cmr_diffusion --help\n")
    assert called('prepare', WORLD_SIZE='2', RANK='1') == (2, '', '')
    assert 'prepare runs in one process, without torchrun' in called('prepare', WORLD_SIZE='2', RANK='0')[2]
    assert called('train', '--help')[:1] == called('cmr_train', '--help')[:1] == (0,)


if __name__ == '__main__': dict(work=work, fail=fail)[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
