"""What the data layer costs: cache against plain decoding, memory of a loader worker, a fed step, preparing.

    python benchmarks/data.py [--slices 600] [--folder DIR]

Everything is measured in this one run on the machine at hand, on phantom data made first. The results go to
`benchmarks/results/data_<device>.md`."""
import argparse, logging, multiprocessing, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import pandas as pd
import torch

from cmr_diffusion.cohort.files import load_slice
from cmr_diffusion.cohort.layouts import COLUMNS
from cmr_diffusion.cohort.phantom import make_phantom
from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import Slice
from cmr_diffusion.grid.cache import CohortCache, prepare
from cmr_diffusion.grid.geometry import Geometry, place
from cmr_diffusion.grid.loaders import make_dataloaders

GEOMETRY = Geometry(128, (1.2, 1.8), 'heart', jitter=4)


class Plain(torch.utils.data.Dataset):
    "What one would write first: decode the DICOM file and draw the contours for every item."
    def __init__(self, cache, rows): self.cache, self.rows = cache, rows
    def __len__(self): return len(self.rows)

    def __getitem__(self, i):
        g = place(load_slice(self.rows.iloc[i]), GEOMETRY, np.random.default_rng(i))
        image = self.cache.values[g.type].forward(g.pixels)[None]
        return image, self.cache.spec.encode(g.labels, g.type), g.mean_spacing


def seconds(function, repeat=3):
    "The best time of a few."
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


class Report:
    "Lines of name, value and note, printed as they come and written at the end."
    def __init__(self): self.lines = []

    def say(self, name, value, note=''):
        self.lines.append((name, value, note))
        print(f'{name:64} {value:>12}  {note}', flush=True)

    def write(self):
        device = f'{platform.machine()}_{os.cpu_count()}cores'
        title = f'# Data layer on {device}, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}'
        rows = [f'| {name} | {value} | {note} |' for name, value, note in self.lines]
        results = Path(__file__).parent/'results'
        results.mkdir(exist_ok=True)
        text = '\n'.join([title, '', '| what | measured | |', '|---|---|---|', *rows])
        (results/f'data_{device}.md').write_text(text + '\n')


def load_noise(row):
    "A made-up slice in place of a file: noise about a ring."
    rng = np.random.default_rng(int(row['slice']))
    r = np.hypot(*(np.indices((128, 128)) - 64))
    labels = np.where(r < 15, 2, r < 20).astype(np.uint8)
    return Slice(rng.integers(0, 2000, (128, 128)).astype(np.float32), (1.5, 1.5), 'T1', labels)


def noise_cache(folder, n):
    "A cache of n made-up slices."
    known = dict(COLUMNS, type='T1', split='train', usable=True, rows=128, columns=128, row_spacing=1.5,
                 column_spacing=1.5, structures='background,myocardium,left_ventricle')
    rows = [dict(known, id=str(i), patient=f'Patient ({i//6})', slice=str(i), image=f'{i}.npy') for i in range(n)]
    return prepare(pd.DataFrame(rows), folder, GEOMETRY, load=load_noise)


def worker_memory(folder):
    "Private memory (MB) that a loader worker has written, at the end of an epoch."
    loader = make_dataloaders(CohortCache.load(folder), 16, num_workers=1, device='cpu').train
    for _, _ in zip(range(len(loader)), loader):
        worker, = multiprocessing.active_children()
        text = Path(f'/proc/{worker.pid}/smaps_rollup').read_text()
        dirty = next(line for line in text.splitlines() if line.startswith('Private_Dirty'))
    return int(dirty.split()[1])/1024


def step_time(cache, num_workers, step=.02):
    "Milliseconds per step when the device needs 20 ms (a sleep), once the workers run."
    loader, times = make_dataloaders(cache, 16, num_workers=num_workers, device='cpu').train, []
    epoch = iter(loader)
    for _ in range(len(loader)):
        start = time.perf_counter()
        next(epoch)
        time.sleep(step)
        times.append(time.perf_counter() - start)
    return 1e3*float(np.median(times[len(times)//4:]))


def measure_preparing(report, folder, patients):
    "Phantom, table and cache, with label maps and with contours alone; the cache and its table."
    taken = seconds(lambda: make_phantom(folder/'phantom', patients=patients), 1)
    report.say('phantom made', f'{6*patients/taken:.0f}/s', f'{6*patients} slices')
    for what in ('label maps beside the contours', 'contours to draw'):
        if what == 'contours to draw':  # contours only, as scanners' exports are
            for path in (folder/'phantom').rglob('labels.png'): path.unlink()
        taken = seconds(lambda: read_cohort(folder/'phantom'), 1)
        table = read_cohort(folder/'phantom')
        report.say(f'cohort table read, {what}', f'{len(table)/taken:.0f}/s',
                   'every slice is decoded once, to examine it')
        cache = folder/f'cache of {what}'
        taken = seconds(lambda: prepare(table, cache, GEOMETRY), 1)
        report.say(f'prepare, {what}', f'{len(table)/taken:.0f}/s', f'goal 300/s on two cores; here {os.cpu_count()}')
    report.say('prepare again, nothing changed', f'{1e3*seconds(lambda: prepare(table, cache, GEOMETRY)):.0f} ms')
    return CohortCache.load(cache), table


def measure_epochs(report, cache):
    "Samples per second, decoded each time and from the cache."
    plain, rng = Plain(cache, cache.usable), np.random.default_rng(0)
    decoding = seconds(lambda: [plain[i] for i in range(len(plain))], 2)
    cached = seconds(lambda: [cache.sample(i, rng) for i in range(len(cache))])
    report.say('epoch, plain Dataset (decode, draw, place)', f'{len(plain)/decoding:.0f}/s')
    report.say('epoch, cache (place)', f'{len(cache)/cached:.0f}/s', f'{decoding/cached:.1f} times faster')


def measure_memory(report, folder, sizes=(1000, 10000)):
    "Memory of a loader worker for a small and a large cache, each in a process of its own."
    memory = {}
    for n in sizes:
        noise_cache(folder/f'noise{n}', n)
        os.sync()  # mapped pages of the cache that are not on disk yet would count as the worker's
        command = [sys.executable, __file__, '--worker-memory', folder/f'noise{n}']
        memory[n] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    small, large = memory.values()
    report.say('private memory of a loader worker, 1k slices', f'{small:.0f} MB')
    report.say('private memory of a loader worker, 10k slices', f'{large:.0f} MB', f'{large - small:+.1f} MB')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--slices', type=int, default=600)
    parser.add_argument('--folder', default=None)
    parser.add_argument('--worker-memory', help=argparse.SUPPRESS)  # a cache to measure in a process of its own
    args = parser.parse_args()
    if args.worker_memory: return print(worker_memory(args.worker_memory))
    logging.disable(logging.WARNING)
    report = Report()
    report.lines.append(('load of the machine before (1 = one busy core)', f'{os.getloadavg()[0]:.1f}', ''))
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        cache, table = measure_preparing(report, Path(room), -(-args.slices//6))
        measure_epochs(report, cache)
        measure_memory(report, Path(room))
        for workers in (0, 1, 2):
            report.say(f'step of 20 ms, batch 16 at 128 px, {workers} workers', f'{step_time(cache, workers):.1f} ms')
    report.write()


if __name__ == '__main__': main()
