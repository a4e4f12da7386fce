"""How fast the phantom is: slices a second, and each part against its plain counterpart, from one run on this machine.

    python benchmarks/phantom.py [--patients 10]

Rates are given by wall clock and by processor time (what two free cores would make of it: other programs do not count).
"""
import argparse, os, platform, time

import numpy as np
from scipy.optimize import curve_fit

from cmr_diffusion import phantom as P

def clock(f, repeats=3):
    "Best wall and processor time of a call, in seconds."
    times = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        f()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(min(t) for t in zip(*times))

def plain_fit(images, times, pixels):
    "T1 pixel by pixel with scipy, polarity by trying both sides of the smallest."
    order = np.argsort(times)
    t, model = times[order], lambda t, a, b, tau: a - b*np.exp(-t/tau)
    for s in images.reshape(len(times), -1)[order][:, pixels].T:
        for k in (s.argmin() - 1, s.argmin(), s.argmin() + 1):
            try: curve_fit(model, t, np.where(np.arange(len(t)) < k, -s, s), (s.max(), 2*s.max(), 1000.), maxfev=200)
            except RuntimeError: pass  # noise

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--patients', type=int, default=10)
    patients = parser.parse_args().patients
    p = next(q for q in map(P.draw_patient, range(1, 100)) if q.matrix == (192, 256))
    drawn, rng = P.regions(p), np.random.default_rng(0)
    signals, times = P.molli(p.tissue, np.full(10, 60000/p.heart_rate))
    clean = P.partial_volume(drawn, signals)
    images = P.magnitude(clean, 0.005, rng)
    print(f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores; one 192 x 256 slice, ms (wall, processor)')
    parts = {'draw 576 x 768 points': lambda: P.regions(p), 'MOLLI signals of all tissues': lambda: P.molli(p.tissue, np.full(10, 900.)),
             'average to pixels': lambda: P.partial_volume(drawn, signals), 'noise, 8 images': lambda: P.magnitude(clean, 0.005, rng),
             'fit T1': lambda: P.fit_t1(images, times), 'fit T2': lambda: P.fit_t2(images[:3])}
    cost = {}
    for name, f in parts.items():
        wall, cpu = clock(f)
        cost[name] = cpu
        print(f'  {name:32s}{1000*wall:9.1f}{1000*cpu:9.1f}')

    print('ratios, processor time')
    points = lambda: signals.astype(np.float32)[P.SUBSTANCE[drawn]].reshape(192, 3, 256, 3, -1).mean((1, 3))
    pixels = rng.choice(192*256, 150, replace=False)
    plain = clock(lambda: plain_fit(images, times, pixels), 1)[1]*192*256/len(pixels)
    print(f'  signals at every point, then averaged : averaged where a pixel is mixed  {clock(points)[1]/cost["average to pixels"]:8.1f}')
    print(f'  scipy pixel by pixel ({plain:.0f} s, from {len(pixels)} pixels) : vectorised fit   {plain/cost["fit T1"]:8.0f}')

    list(P.phantom_slices(1))
    for workers in (1, 2):
        wall, cpu = clock(lambda: list(P.phantom_slices(patients, workers=workers)), 1)
        n = 6*patients
        own = f'; {1000*cpu/n:.1f} ms of processor time each' if workers == 1 else ''  # children are not counted
        print(f'{n} slices, {workers} process{"es"*(workers > 1)}: {n/wall:.0f} a second by wall clock{own} (goal: 40)')

if __name__ == '__main__': main()
