"""What several processes bring in training and painting, and what logging, checks and resume points cost.

    python benchmarks/processes.py [--quick] [--presets tiny small base]

Each preset has the size of its images (64 pixels; `base` 128). One and two processes with a thread each, and one
process with two threads, take turns; the rates are medians over all turns. `--quick` takes one turn of few steps. The
results go to `benchmarks/results/processes_<machine>.md`."""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile, time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from writing import print_and_keep

SETTINGS = {'1 process, 1 thread': (1, 1), '2 processes, 1 thread each': (2, 1), '1 process, 2 threads': (1, 2)}
SIZES = dict(tiny=64, small=64, base=128)  # pixels per side
BATCH = dict(tiny=16, small=16, base=4)  # slices per step, of all processes together
IMAGES = dict(tiny=16, small=8, base=2)  # painted at once, by all processes together
EVALUATIONS = 20  # of the network per image
HOUR, CHECKS, SAVE_EVERY = 3600, 10, 600  # a training by default: seconds, checks, seconds between resume points
IMPORTS = {'Python': 'pass', 'PyTorch': 'import torch',
           'PyTorch and fastai, with the libraries that it imports': 'import torch, fastai.learner, '
           'fastai.data.core, fastai.callback.core, fastai.callback.hook, fastai.callback.training, fastai.optimizer',
           '`cmr_diffusion.training.learner`': 'import cmr_diffusion.training.learner'}


# In the processes that are measured

def open_cache(folder, preset):
    "The cache of a preset's size."
    from cmr_diffusion.grid.cache import CohortCache
    return CohortCache.load(Path(folder)/str(SIZES[preset]))


def new_learner(folder, preset, steps):
    "A learner as `train` makes it."
    from cmr_diffusion.training.learner import config_learner, TrainConfig
    config = TrainConfig(preset, steps=steps, batch_size=BATCH[preset], checks=1)
    return config_learner(open_cache(folder, preset), config, 'cpu')


def training_times(folder, preset, steps):
    "Seconds of each step but the first two, loading and averaging of the weights included; and the learner."
    from fastai.callback.core import Callback, CancelValidException
    moments = []

    class Clock(Callback):
        order = 1000
        def before_validate(self): raise CancelValidException
        def after_batch(self): moments.append(time.perf_counter())

    learn = new_learner(folder, preset, steps + 2)
    with learn.no_bar(), learn.no_logging(), learn.in_processes(): learn.fit(1, cbs=Clock())
    return [after - before for before, after in zip(moments[1:], moments[2:])], learn


def painting_time(learn, preset, images):
    "Seconds until all processes have painted their part of the images."
    from cmr_diffusion.grid.loaders import evenly
    from cmr_diffusion.model.painting import paint
    from cmr_diffusion.processes import barrier, own_rows, rank, world_size
    checkpoint, cache = learn.checkpoint, learn.dls.cache
    positions = evenly(cache.rows('train'), images)[own_rows(images, (rank(), world_size()))]
    grids = [cache.grid(i) for i in positions]
    options = dict(precision=checkpoint.denoise.precision)
    paint(checkpoint, grids, list(range(len(grids))), steps=1, **options)
    barrier()
    start = time.perf_counter()
    paint(checkpoint, grids, list(range(len(grids))), steps=EVALUATIONS, **options)
    barrier()
    return time.perf_counter() - start


def work(folder, out, presets, steps):
    "Measure in this process, or together with others; the main one writes what it found."
    from cmr_diffusion.core import hold_memory
    from cmr_diffusion.processes import is_main, several
    hold_memory()
    found = {}
    with several('cpu'):
        for preset in presets:
            times, learn = training_times(folder, preset, steps)
            found[preset] = dict(train=times, paint=[painting_time(learn, preset, IMAGES[preset])],
                                 precision=learn.checkpoint.denoise.precision)
        if is_main(): Path(out).write_text(json.dumps(found))


@contextmanager
def timed(*methods):
    "Seconds of each call of some methods, given as (class, name), by the name of the class and its method."
    seconds = defaultdict(list)
    def measure(owner, name, method):
        def call(*args, **options):
            start = time.perf_counter()
            try: return method(*args, **options)
            finally: seconds[f'{owner.__name__}.{name}'].append(time.perf_counter() - start)
        return call
    before = [(owner, name, getattr(owner, name)) for owner, name in methods]
    for owner, name, method in before: setattr(owner, name, measure(owner, name, method))
    try: yield seconds
    finally:
        for owner, name, method in before: setattr(owner, name, method)


def costs(folder, out, presets, steps):
    "Measure what a training does beside its steps, in one process and a store of runs of its own."
    from fastai.learner import Learner
    from cmr_diffusion.training import checks
    from cmr_diffusion.training.learner import train, TrainConfig
    from cmr_diffusion.training.stopping import ResumeWriter
    found = {}
    for preset in presets:
        cache, config = open_cache(folder, preset), TrainConfig(preset, steps=steps, batch_size=BATCH[preset], checks=1)
        with timed((checks.TrackingCallback, 'log_training'), (checks.DivergenceGuard, 'look'),
                   (checks.TrackingCallback, 'after_epoch'), (Learner, '_do_epoch_train'),
                   (Learner, '_do_epoch_validate'), (checks.SampleGrid, 'after_epoch'),
                   (checks.CheckpointWriter, 'after_epoch'), (ResumeWriter, 'write')) as seconds:
            train(cache, config, 'processes', device='cpu')
        found[preset] = dict(seconds)
    Path(out).write_text(json.dumps(found))


# In the process that was started

def make_caches(folder, sizes):
    "Caches of drawn hearts, half of them to train on, by the size of the grid."
    from cmr_diffusion import Geometry, prepare, read_cohort
    from cmr_diffusion.toy import toy_cohort
    cohort = toy_cohort(folder/'cohort', patients=48, splits=('train', 'val'), shape=(144, 160), spacings=(1.2, 1.4))
    table = read_cohort(cohort, 'csv')
    for size in sizes:
        spacing = (1.5, 2.5) if size < 128 else (1.0, 1.3)
        prepare(table, folder/str(size), Geometry(size, spacing, 'heart'))


def start(folder, what, processes, threads, presets, steps):
    "Start a measurement in processes of its own, and return what it found."
    out = folder/'found.json'
    words = [str(Path(__file__)), '--work', what, str(folder), str(out), '--steps', str(steps), '--presets', *presets]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), MLFLOW_DISABLE_TELEMETRY='true',
                            MLFLOW_TRACKING_URI=f'sqlite:///{folder}/mlruns/mlflow.db', TQDM_DISABLE='1')
    command = (torchrun if processes > 1 else [sys.executable]) + words
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(out.read_text())


def rates(folder, presets, rounds, steps):
    "Images per second: (preset, setting) -> training, painting; and the precision of each preset."
    times, precision = defaultdict(list), {}
    for _ in range(rounds):
        for setting, (processes, threads) in SETTINGS.items():
            print(f'{setting} ...', file=sys.stderr, flush=True)
            found = start(folder, 'rates', processes, threads, presets, steps)
            for preset, one in found.items():
                precision[preset] = one['precision']
                for kind in ('train', 'paint'): times[preset, setting, kind] += one[kind]
    def rate(preset, setting, kind):
        return dict(train=BATCH, paint=IMAGES)[kind][preset] / statistics.median(times[preset, setting, kind])
    return {(p, s): (rate(p, s, 'train'), rate(p, s, 'paint')) for p in presets for s in SETTINGS}, precision


def rate_table(found, presets, precision):
    "Lines of the table of images per second."
    yield '| preset, size, precision | | training | times | painting | times |'
    yield '|---|---|---|---|---|---|'
    for preset in presets:
        base = found[preset, next(iter(SETTINGS))]
        for setting in SETTINGS:
            trained, painted = found[preset, setting]
            about = f'{preset}, {SIZES[preset]} x {SIZES[preset]}, {precision[preset]}'
            if found[preset, setting] != base: about = ''
            yield (f'| {about} | {setting} | {trained:.2f} | {trained/base[0]:.2f} '
                   f'| {painted:.2f} | {painted/base[1]:.2f} |')


def cost_table(found, presets):
    "Lines of the table of what a training does beside its steps."
    middle = statistics.median
    names = ('preset', 'entry of losses, ms', 'validation, s', 'samples, s', 'checkpoint, s', 'resume point, s',
             'share of logging', 'of checks and resume points', 'together')
    yield f'| {" | ".join(names)} |'
    yield '|---' * len(names) + '|'
    for preset in presets:
        s, batch = found[preset], BATCH[preset]
        entry = middle(s['TrackingCallback.log_training']) + middle(s['DivergenceGuard.look'])
        steps = sum(s['Learner._do_epoch_train'])
        per_step = steps / found['steps']
        valid, grid = middle(s['Learner._do_epoch_validate']), s['SampleGrid.after_epoch'][-1]
        checkpoint, point = middle(s['CheckpointWriter.after_epoch']), middle(s['ResumeWriter.write'])
        logged = entry / (20 * per_step)
        checked = (CHECKS * (valid + grid + checkpoint + point) + grid + HOUR // SAVE_EVERY * point) / HOUR
        yield (f'| {preset}, {batch} slices per step of {per_step:.2f} s | {1000*entry:.0f} | {valid:.1f} '
               f'| {grid:.1f} | {checkpoint:.2f} | {point:.2f} | {100*logged:.1f} % | {100*checked:.1f} % '
               f'| {100*(logged + checked):.1f} % |')


def import_table(rounds):
    "Lines of the table of processor time that imports take."
    yield '| import | processor time, s |'
    yield '|---|---|'
    for name, code in IMPORTS.items():
        script = f'import time\nstart = time.process_time()\n{code}\nprint(time.process_time() - start)'
        runs = [subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True, cwd=ROOT)
                for _ in range(rounds)]
        yield f'| {name} | {statistics.median(float(run.stdout) for run in runs):.2f} |'


def report(args):
    "The parts of the report, as they come."
    import torch
    rounds, steps = (1, 2) if args.quick else (2, 4)
    words = ' '.join(sys.argv[1:])
    yield f'# Several processes: {processor()}, {os.cpu_count()} cores'
    load = f'load of the machine before: {os.getloadavg()[0]:.1f}'
    yield f'{time.strftime("%Y-%m-%d")}, torch {torch.__version__}; {load}. `python benchmarks/processes.py {words}`'
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        make_caches(folder, sorted({SIZES[preset] for preset in args.presets}))
        found, precision = rates(folder, args.presets, rounds, steps)
        yield '## Images per second'
        about = ', '.join(f'{preset} {BATCH[preset]}' for preset in args.presets)
        yield (f'Slices per step, of all processes together: {about}. A training step loads its batch and averages the '
               f'weights. An image is painted in {EVALUATIONS} evaluations of the network; the processes share the '
               f'images. Medians of {rounds * steps} steps and of {rounds} paintings; all settings took turns. *Times* '
               'compares with one process of one thread.')
        yield '\n'.join(rate_table(found, args.presets, precision))
        print('costs ...', file=sys.stderr, flush=True)
        beside = start(folder, 'costs', 1, 2, args.presets, steps + 2) | dict(steps=steps + 2)
    yield '## What a training does beside its steps'
    yield ('One process with two threads. The shares are those of a training by default: an entry every 20 steps, '
           f'{CHECKS} checks in an hour and a grid of samples before the first step, a resume point at each check and '
           f'every {SAVE_EVERY // 60} minutes. An entry of losses includes the look for divergence. A check takes as '
           'long in a training of a day, where its share is a 24th.')
    yield '\n'.join(cost_table(beside, args.presets))
    yield '## What an import costs'
    yield '\n'.join(import_table(1 if args.quick else 3))


def processor():
    "Name of the processor."
    if Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'): return f'{line.split(":")[1].strip()} ({platform.machine()})'
    return platform.machine()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help='one turn of few steps')
    p.add_argument('--presets', nargs='+', default=list(SIZES), choices=list(SIZES))
    p.add_argument('--out', type=Path, default=None)
    p.add_argument('--work', nargs=3, help=argparse.SUPPRESS)  # what to measure, folder, file for what was found
    p.add_argument('--steps', type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        what, folder, out = args.work
        return dict(rates=work, costs=costs)[what](folder, out, args.presets, args.steps)
    out = args.out or Path(__file__).parent/'results'/f'processes_{platform.machine()}_{os.cpu_count()}cores.md'
    print_and_keep(report(args), out)


if __name__ == '__main__': main()
