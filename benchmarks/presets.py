"""What each preset costs: parameters, size of a checkpoint, memory and time of the training, time of a painted image.

    python benchmarks/presets.py [--threads 2] [--steps 6] [--only tiny small]

Each preset trains for a few steps through the `Learner` that `cmr_train` uses, in a process of its own, at the image
size that it is meant for and with the batch size of the table. The first two steps are not counted, and the median of
the others is taken. The results go to `benchmarks/results/presets_<device>.md`."""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {'tiny': (64, 16), 'small': (64, 16), 'base': (128, 16), 'paper': (256, 1)}  # preset -> pixels per side, batch
COUNTED_FROM, SAMPLING = 2, 20  # steps that are not counted; evaluations of the network per painted image


def memory(device):
    "The most memory so far, in MB: of the GPU, or of this process."
    import torch
    if device == 'cuda': return torch.cuda.max_memory_allocated()/1e6
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1e3


def measure(preset, steps, threads, work):
    "Train a preset for a few steps and paint with it; print the numbers as JSON."
    import torch
    from fastai.callback.core import Callback, CancelFitException
    from cmr_diffusion.cohort.table import read_cohort
    from cmr_diffusion.core import choose_device
    from cmr_diffusion.grid.cache import prepare
    from cmr_diffusion.grid.geometry import Geometry
    from cmr_diffusion.grid.loaders import make_dataloaders
    from cmr_diffusion.model.painting import paint
    from cmr_diffusion.toy import toy_cohort
    from cmr_diffusion.training.learner import sdm_learner
    torch.set_num_threads(threads)
    size, batch = SIZES[preset]
    device = str(choose_device())
    patients = -(-batch*(steps + COUNTED_FROM + 1)//4)
    cohort = toy_cohort(work/'cohort', patients=patients, splits=('train',)*(patients - 1) + ('val',), levels=(0, 1))
    cache = prepare(read_cohort(cohort, 'csv'), work/'cache', Geometry(size, (1.5, 2.5), 'heart'))
    learn = sdm_learner(make_dataloaders(cache, batch_size=batch, device=device), preset)
    seconds = []

    class Clock(Callback):
        "Notes how long each step takes."
        order = 90
        def before_batch(self): self.start = time.perf_counter()
        def after_batch(self):
            if device == 'cuda': torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)
            if len(seconds) >= steps + COUNTED_FROM: raise CancelFitException
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Clock()])
    checkpoint = learn.checkpoint
    precision, grids = checkpoint.info['precision'], [cache.grid(0)]
    times = []
    for seed in (0, 1):  # the first call prepares the fast layers
        start = time.perf_counter()
        paint(checkpoint, grids, [seed], steps=SAMPLING, precision=precision)
        times.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    print(json.dumps(dict(
        parameters=parameters, checkpoint_mb=parameters*4/1e6, memory_mb=memory(device), precision=precision,
        step=statistics.median(seconds[COUNTED_FROM:]), image=times[-1], device=device)))


def in_process(preset, args):
    "The numbers of a preset, measured in a process of its own."
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, '--measure', preset, '--threads', args.threads, '--steps', args.steps]
        env = {**os.environ, 'OMP_NUM_THREADS': str(args.threads)}
        done = subprocess.run([*map(str, command), '--work', work], env=env, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'{preset}: {done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def table(found):
    "The table, line by line."
    yield '| preset | parameters | checkpoint | trained at | memory | 1,000 training steps | one image, 20 steps |'
    yield '|---|---|---|---|---|---|---|'
    for preset, n in found.items():
        size, batch = SIZES[preset]
        minutes, parameters = n['step']*1000/60, n['parameters']/1e6
        took = f'{minutes:.0f} min' if minutes < 100 else f'{minutes/60:.1f} h'
        trained = f'{size} px, {batch} slice{"s"*(batch > 1)} per step'
        yield (f'| `{preset}` | {parameters:.1f} million | {n["checkpoint_mb"]:.0f} MB | {trained} | '
               f'{n["memory_mb"]/1e3:.1f} GB | {took} | {n["image"]:.1f} s |')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--steps', type=int, default=6, help='of the training that are counted')
    p.add_argument('--only', nargs='+', choices=SIZES, default=list(SIZES))
    p.add_argument('--measure', help=argparse.SUPPRESS)
    p.add_argument('--work', type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure: return measure(args.measure, args.steps, args.threads, args.work)
    found = {}
    for preset in args.only:
        found[preset] = in_process(preset, args)
        print(preset, found[preset], flush=True)
    one = next(iter(found.values()))
    import torch
    where = f'{platform.machine()}, {args.threads} threads' if one['device'] == 'cpu' else torch.cuda.get_device_name()
    title = f'# Presets on {where}, {one["precision"]}, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}'
    out = ROOT/'benchmarks'/'results'/f'presets_{one["device"]}.md'
    lines = [title, '', *table(found), '']
    lines.append('Memory: on a CPU that of the whole process, on a GPU that of the tensors.')
    new = out.with_suffix('.tmp')
    new.write_text('\n'.join(lines) + '\n')
    os.replace(new, out)
    print('\n'.join(lines))


if __name__ == '__main__': main()
