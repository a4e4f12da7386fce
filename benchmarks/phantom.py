"""How fast the phantom is: slices a second, and each part against its plain counterpart, from one run on this machine.

    python benchmarks/phantom.py [--patients 10]

Rates are given by wall clock and by processor time, which tells what two free cores would make of it: other programs do
not count there.
"""
import argparse
import os
import platform
import time

import numpy as np
from scipy.optimize import curve_fit

from cmr_diffusion.cohort.anatomy import regions
from cmr_diffusion.cohort.patient import draw_patient, SUBSTANCE
from cmr_diffusion.cohort.phantom import phantom_slices
from cmr_diffusion.cohort.relaxometry import fit_t1, fit_t2, magnitude, molli, partial_volume

MATRIX = (192, 256)  # rows and columns of the slice that is measured
PIXELS = 150  # fitted one by one with scipy


def clock(f, repeats=3):
    "Best wall and processor time of a call, in seconds."
    times = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        f()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(min(t) for t in zip(*times))


def recovery(t, a, b, tau): return a - b*np.exp(-t/tau)


def plain_fit(images, times, pixels):
    "T1 pixel by pixel with scipy; the sign is restored by trying both sides of the smallest magnitude."
    order = np.argsort(times)
    for s in images.reshape(len(times), -1)[order][:, pixels].T:
        for k in (s.argmin() - 1, s.argmin(), s.argmin() + 1):
            signed, start = np.where(np.arange(len(s)) < k, -s, s), (s.max(), 2*s.max(), 1000.)
            try: curve_fit(recovery, times[order], signed, start, maxfev=200)
            except RuntimeError: pass  # noise


def time_parts(patient, drawn, signals, clean, images, times, rng):
    "Print what each part of a slice takes; the processor times by name."
    parts = {
        'draw 576 x 768 points': lambda: regions(patient),
        'MOLLI signals of all tissues': lambda: molli(patient.tissue, np.full(10, 900.)),
        'average to pixels': lambda: partial_volume(drawn, signals),
        'noise, 8 images': lambda: magnitude(clean, 0.005, rng),
        'fit T1': lambda: fit_t1(images, times),
        'fit T2': lambda: fit_t2(images[:3])}
    cost = {}
    for name, f in parts.items():
        wall, cost[name] = clock(f)
        print(f'  {name:32s}{1000*wall:9.1f}{1000*cost[name]:9.1f}')
    return cost


def time_ratios(cost, drawn, signals, images, times, rng):
    "Print how much the two fast parts save."
    rows, columns = MATRIX

    def at_every_point():
        return signals.astype(np.float32)[SUBSTANCE[drawn]].reshape(rows, 3, columns, 3, -1).mean((1, 3))

    saved = clock(at_every_point)[1]/cost['average to pixels']
    print(f'  signals at every point, then averaged : averaged where a pixel is mixed  {saved:8.1f}')
    pixels = rng.choice(rows*columns, PIXELS, replace=False)
    plain = clock(lambda: plain_fit(images, times, pixels), 1)[1]*rows*columns/PIXELS
    saved = plain/cost['fit T1']
    print(f'  scipy pixel by pixel ({plain:.0f} s, from {PIXELS} pixels) : vectorised fit   {saved:8.0f}')


def time_cohort(patients):
    "Print the rate of whole slices, in one process and in two."
    list(phantom_slices(1))
    for workers in (1, 2):
        wall, cpu = clock(lambda: list(phantom_slices(patients, workers=workers)), 1)
        n, processes = 6*patients, 'process' if workers == 1 else 'processes'
        own = f'; {1000*cpu/n:.1f} ms of processor time each' if workers == 1 else ''  # children are not counted
        print(f'{n} slices, {workers} {processes}: {n/wall:.0f} a second by wall clock{own} (goal: 40)')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--patients', type=int, default=10)
    patients = parser.parse_args().patients
    patient = next(p for p in map(draw_patient, range(1, 100)) if p.matrix == MATRIX)
    drawn, rng = regions(patient), np.random.default_rng(0)
    signals, times = molli(patient.tissue, np.full(10, 60000/patient.heart_rate))
    clean = partial_volume(drawn, signals)
    images = magnitude(clean, 0.005, rng)
    machine = platform.processor() or platform.machine()
    print(f'{machine}, {os.cpu_count()} cores; one {MATRIX[0]} x {MATRIX[1]} slice, ms (wall, processor)')
    cost = time_parts(patient, drawn, signals, clean, images, times, rng)
    print('ratios, processor time')
    time_ratios(cost, drawn, signals, images, times, rng)
    time_cohort(patients)


if __name__ == '__main__': main()
