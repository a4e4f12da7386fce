"""What the data layer costs: cache against plain decoding, memory of a loader worker, a fed step, preparing.

    python benchmarks/data.py [--slices 600] [--folder DIR]

Everything is measured in this one run on the machine at hand, on phantom data made first. Results: `benchmarks/results/data_<device>.md`."""
import argparse, logging, multiprocessing, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import Slice
from cmr_diffusion.grid.cache import CohortCache, prepare
from cmr_diffusion.grid.loaders import make_dataloaders
from cmr_diffusion.cohort.layouts import COLUMNS
from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.phantom import make_phantom
from cmr_diffusion.grid.geometry import Geometry, place

GEOMETRY = Geometry(128, (1.2, 1.8), 'heart', jitter=4)


class Plain(torch.utils.data.Dataset):
    "What one would write first: decode the DICOM file and draw the contours for every item."
    def __init__(self, cache, rows): self.cache, self.rows = cache, rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, i):
        g = place(load_slice(self.rows.iloc[i]), GEOMETRY, np.random.default_rng(i))
        return self.cache.values[g.type].forward(g.pixels)[None], self.cache.spec.encode(g.labels, g.type), g.mean_spacing


def seconds(function, repeat=3):
    "Best of a few."
    times = []
    for _ in range(repeat):
        start = time.perf_counter(); function(); times.append(time.perf_counter() - start)
    return min(times)


def dotted(i):
    "Made-up slice number i: noise about a ring."
    rng = np.random.default_rng(i)
    r = np.hypot(*(np.indices((128, 128)) - 64))
    return Slice(rng.integers(0, 2000, (128, 128)).astype(np.float32), (1.5, 1.5), 'T1', np.where(r < 15, 2, r < 20).astype(np.uint8))

def load_dotted(row): return dotted(int(row['slice']))

def dotted_cache(folder, n):
    "A cache of n made-up slices."
    import pandas as pd
    known = dict(type='T1', split='train', usable=True, rows=128, columns=128, row_spacing=1.5, column_spacing=1.5, robust_max=float('nan'), structures='background,myocardium,left_ventricle')
    table = pd.DataFrame([dict(COLUMNS, **known, id=str(i), patient=f'Patient ({i//6})', slice=str(i), image=f'{i}.npy') for i in range(n)])
    return prepare(table, folder, GEOMETRY, load=load_dotted)

def worker_memory(folder):
    "Private memory (MB) that a loader worker has written, at the end of an epoch."
    loader = make_dataloaders(CohortCache.load(folder), 16, num_workers=1, device='cpu').train
    for _, _ in zip(range(len(loader)), loader):
        worker, = multiprocessing.active_children()
        text = Path(f'/proc/{worker.pid}/smaps_rollup').read_text()
        memory = next(int(line.split()[1])/1024 for line in text.splitlines() if line.startswith('Private_Dirty'))
    return memory

def step_time(cache, num_workers, step=.02):
    "Milliseconds a step when the device needs 20 ms (a sleep), once the workers run."
    loader, times = make_dataloaders(cache, 16, num_workers=num_workers, device='cpu').train, []
    epoch = iter(loader)
    for _ in range(len(loader)):
        start = time.perf_counter(); next(epoch); time.sleep(step); times.append(time.perf_counter() - start)
    return 1e3*float(np.median(times[len(times)//4:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--slices', type=int, default=600); parser.add_argument('--folder', default=None)
    parser.add_argument('--worker-memory', help=argparse.SUPPRESS)  # a cache to measure in a process of its own
    args = parser.parse_args()
    if args.worker_memory: return print(worker_memory(args.worker_memory))
    logging.disable(logging.WARNING)
    room = tempfile.TemporaryDirectory(dir=args.folder); folder = Path(room.name)
    lines = [('load of the machine before (1 = one busy core)', f'{os.getloadavg()[0]:.1f}', '')]
    def say(name, value, note=''):
        lines.append((name, value, note)); print(f'{name:64} {value:>12}  {note}', flush=True)

    patients = -(-args.slices//6)
    taken = seconds(lambda: make_phantom(folder/'phantom', patients=patients), 1)
    say('phantom made', f'{6*patients/taken:.0f}/s', f'{6*patients} slices')
    for drawn in (False, True):
        if drawn:  # contours only, as scanners' exports are
            for p in (folder/'phantom').rglob('labels.png'): p.unlink()
        what = 'contours to draw' if drawn else 'label maps beside the contours'
        taken = seconds(lambda: read_cohort(folder/'phantom'), 1); table = read_cohort(folder/'phantom')
        say(f'cohort table read, {what}', f'{len(table)/taken:.0f}/s', 'every slice is decoded once, to examine it')
        taken = seconds(lambda: prepare(table, folder/f'cache{drawn}', GEOMETRY), 1)
        say(f'prepare, {what}', f'{len(table)/taken:.0f}/s', f'goal 300/s on two cores; here {os.cpu_count()}')
    cache = CohortCache.load(folder/'cacheTrue')
    say('prepare again, nothing changed', f'{1e3*seconds(lambda: prepare(table, folder/"cacheTrue", GEOMETRY)):.0f} ms')

    plain = Plain(cache, cache.usable)
    rng = np.random.default_rng(0)
    a = seconds(lambda: [plain[i] for i in range(len(plain))], 2); b = seconds(lambda: [cache.sample(i, rng) for i in range(len(cache))])
    say('epoch, plain Dataset (decode, draw, place)', f'{len(plain)/a:.0f}/s')
    say('epoch, cache (place)', f'{len(cache)/b:.0f}/s', f'{a/b:.1f} times faster')

    memory = {}
    for n in (1000, 10000):
        dotted_cache(folder/f'dotted{n}', n)
        os.sync()  # mapped pages of the cache that are not on disk yet would count as the worker's
        fresh = subprocess.run([sys.executable, __file__, '--worker-memory', folder/f'dotted{n}'], capture_output=True, text=True, check=True)
        memory[n] = float(fresh.stdout)
    say('private memory of a loader worker, 1k slices', f'{memory[1000]:.0f} MB')
    say('private memory of a loader worker, 10k slices', f'{memory[10000]:.0f} MB', f'{memory[10000] - memory[1000]:+.1f} MB')

    for workers in (0, 1, 2): say(f'step of 20 ms, batch 16 at 128 px, {workers} workers', f'{step_time(cache, workers):.1f} ms')

    device = f'{platform.machine()}_{os.cpu_count()}cores'
    results = Path(__file__).parent/'results'; results.mkdir(exist_ok=True)
    (results/f'data_{device}.md').write_text('\n'.join([f'# Data layer on {device}, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}', '', '| what | measured | |', '|---|---|---|',
                                                         *(f'| {n} | {v} | {w} |' for n, v, w in lines)]) + '\n')
    room.cleanup()


if __name__ == '__main__': main()
