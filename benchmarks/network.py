"""Milliseconds and ratios of the network: its speed-ups one by one, its peers, and the machine's own limit, in one run.

    python benchmarks/network.py [--width 64] [--sizes 64 128] [--batch 4] [--repeats 5] [--compile]

Every row is timed in this one process, in turns. Only ratios within the run mean something, since machines are noisy.
The first row, the plain network of chapter 30 in float32, is the published mathematics written plainly, and stands in
for the original. The rows after it exchange the layers of one speed-up each (chapters 30b and 31). Peers that are not
installed (the `bench` extra) are named as missing. The report goes to
`benchmarks/results/network_<device>_<width>.md`."""
import argparse, functools, math, platform, statistics, subprocess, sys, time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cmr_diffusion.core import hold_memory
from cmr_diffusion.grid.condition import Condition
from cmr_diffusion.model.adm import Attention, GroupNorm, Resample
from cmr_diffusion.model.edm import EDMDenoiser, Guided
from cmr_diffusion.model.fast_spade import FastSDM, FastSPADE, compile_network, exchange, fast, number_spades
from cmr_diffusion.model.fused_layers import FastAttention, FastGroupNorm, FastResample, FastResBlock, with_time
from cmr_diffusion.model.neighbourhoods import LOOKUP_COST, find_neighbourhoods
from cmr_diffusion.model.samplers import sample
from cmr_diffusion.model.sdm import SDM, SPADE, ResBlock, SDMConfig

from writing import print_and_keep

CLASSES, GUIDANCE, STEPS, PUBLISHED_STEPS = 7, 1.5, 20, 1000
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LAST = dict(memory_format=torch.channels_last)


def hearts(size, n, seed=0):
    "Class numbers (n, size, size): background, a ring, its cavity, some padding."
    rng, (r, c) = np.random.default_rng(seed), np.mgrid[:size, :size] / size
    maps = np.ones((n, size, size), np.uint8)
    for m in maps:
        d = np.hypot((r - rng.uniform(.4, .6)) * rng.uniform(.9, 1.1), c - rng.uniform(.4, .6))
        m[d < .25] = 2
        m[d < .17] = 3
        m[:, int(size * rng.uniform(.9, 1)):] = 0
    return torch.from_numpy(maps)


class LookUpSPADE(FastSPADE):
    "SPADE with the table of neighbourhoods and no other speed-up: norm, scale and shift with torch's own gradients."
    def forward(self, x, labels, scale=0., shift=0.):
        level = labels.levels[tuple(x.shape[2:])]
        if isinstance(level, torch.Tensor): return super().forward(x, labels, scale, shift)
        table = with_time(self.table(level), scale, shift, level.pixels)
        read = F.embedding(level.pixels.index, table).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        factor, summand = read.chunk(2, 1)
        return F.silu(torch.addcmul(summand.to(x.dtype), self.norm(x), factor.to(x.dtype)))


LOOK_UP = {SDM: FastSDM, SPADE: LookUpSPADE}
NORMS = {GroupNorm: FastGroupNorm, Attention: FastAttention}  # with attention in three plain steps
ONE_STEP = {ResBlock: FastResBlock, Resample: FastResample}


class Variant:
    "The SDM with some of its speed-ups."
    def __init__(self, width, classes=None, all_of_them=False, last=False, bf16=False, hold=False, compiled=False,
                 checkpointing=False, spacing=False):
        torch.manual_seed(0)
        model = SDM(SDMConfig(label_channels=CLASSES, width=width, multipliers=(1, 2, 3, 4), blocks=2, attention=(4, 8),
                              spacing=spacing))
        for p in model.parameters():
            if not p.any(): nn.init.normal_(p, std=.02)  # no layer at zero
        self.model = model.to(DEVICE, **(LAST if last else {}))
        if all_of_them: fast(self.model)
        if classes: exchange(self.model, classes)
        if classes == LOOK_UP:
            self.model.measured = {}
            number_spades(self.model)
        self.model.checkpointing = checkpointing
        self.last, self.bf16, self.hold = last, bf16, hold
        self.parameters = list(self.model.parameters())
        if compiled: compile_network(self.model)

    def __call__(self, x, t, y):
        hold_memory(self.hold)
        if self.last: x = x.contiguous(**LAST)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            labels = self.model.prepare(Condition(y, torch.zeros(len(y), device=y.device), CLASSES))
            return self.model(x, t, labels).float()


ALL = dict(all_of_them=True, last=True, hold=True)
PLAIN, FAST = 'SDM dense, float32, written plainly', 'all, bfloat16'
VARIANTS = {
    PLAIN: {}, '+ look-up of neighbourhoods': dict(classes=LOOK_UP), '+ norms that read tables': dict(classes=NORMS),
    '+ up-sampling convolutions in one step': dict(classes=ONE_STEP), '+ channels last': dict(last=True),
    '+ memory held': dict(hold=True), '+ bfloat16': dict(bf16=True), 'all, float32': ALL, FAST: ALL | dict(bf16=True)}


class Peer:
    "A network of another project at the same width, as it comes but for channels last."
    def __init__(self, build, bf16):
        self.model, self.run = build()
        self.parameters, self.bf16 = list(self.model.parameters()), bf16

    def __call__(self, x, t, y):
        hold_memory(False)
        one_hot = F.one_hot(y.long(), CLASSES).movedim(-1, 1).float()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16): return self.run(x, t, one_hot).float()


def peers(width):
    "Name and constructor of each peer; None where the package is missing."
    widths = tuple(width*m for m in (1, 2, 3, 4))
    def concatenation():
        from diffusers import UNet2DModel
        down = ('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D')
        up = ('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D')
        unet = UNet2DModel(in_channels=1 + CLASSES, out_channels=1, block_out_channels=widths, layers_per_block=2,
                           attention_head_dim=64, down_block_types=down, up_block_types=up).to(DEVICE, **LAST)
        return unet, lambda x, t, y: unet(torch.cat([x, y], 1).contiguous(**LAST), t).sample
    def monai():
        from monai.networks.nets import SPADEDiffusionModelUNet
        unet = SPADEDiffusionModelUNet(spatial_dims=2, in_channels=1, out_channels=1, label_nc=CLASSES,
                                       num_res_blocks=2, channels=widths, attention_levels=(False, False, True, True),
                                       num_head_channels=math.gcd(64, widths[2]), norm_num_groups=32).to(DEVICE)
        return unet, unet
    builders = {'diffusers UNet2DModel, mask concatenated': concatenation, 'MONAI SPADEDiffusionModelUNet': monai}
    for name, build in builders.items():
        try: build()
        except ImportError:
            yield f'{name} (not installed)', None
            continue
        for precision in ('float32', 'bfloat16'):
            yield f'{name}, {precision}', functools.partial(Peer, build, precision == 'bfloat16')


def constructors(args):
    "All rows of the table."
    rows = {name: functools.partial(Variant, args.width, **settings) for name, settings in VARIANTS.items()}
    compiled = functools.partial(Variant, args.width, **ALL, bf16=True, compiled=True)
    if args.compile: rows['all, bfloat16, compiled'] = compiled
    return rows | dict(peers(args.width))


def wait():
    if DEVICE == 'cuda': torch.cuda.synchronize()


def clock(functions, repeats):
    """Median milliseconds of each function, taken in turns. A call without a clock comes before each timed one, so that
    caches and memory are those of repeated calls."""
    times = {name: [] for name in functions}
    for turn in range(repeats):
        for name, f in functions.items():
            f()
            wait()
            start = time.perf_counter()
            f()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: 1000*statistics.median(t) for name, t in times.items()}


def limits(batch):
    """Best measured GFLOP/s of a convolution and of a matrix product, by precision, and how many multiplications take
    the time of moving one number."""
    best, layers = {}, ((128, 64), (256, 32), (512, 16))  # channels, size
    for dtype in (torch.float32, torch.bfloat16):
        def random(*shape): return torch.randn(*shape, device=DEVICE, dtype=dtype)
        def convolution(c, s):
            conv, x = nn.Conv2d(c, c, 3, padding=1).to(DEVICE, dtype, **LAST), random(batch, c, s, s).contiguous(**LAST)
            return lambda: conv(x)
        a, table, index = random(2048, 2048), random(1152, 256), torch.randint(1152, (2048, 9), device=DEVICE)
        runs = {(c, s): convolution(c, s) for c, s in layers}
        runs |= {'mm': lambda: a @ a, 'move': lambda: F.embedding_bag(index, table, mode='sum')}
        with torch.no_grad(): ms = clock(runs, 7)
        convolution = max(2*9*c*c*s*s*batch/ms[c, s]/1e6 for c, s in layers)
        best[dtype] = convolution, 2*2048**3/ms['mm']/1e6, convolution/2*ms['move']*1e6/(index.numel()*table.shape[1])
    return best


def counted(f):
    "Arithmetic really done, in GFLOP."
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()/1e9


def step(network, x, t, y):
    "Forward and backward, from no gradients."
    for p in network.parameters: p.grad = None
    network(x, t, y).square().mean().backward()


def inputs(size, batch):
    torch.manual_seed(1)
    x, t = torch.randn(batch, 1, size, size, device=DEVICE), torch.rand(batch, device=DEVICE)*1000
    return x, t, hearts(size, batch).to(DEVICE)


def peak(name, size, args):
    "Memory in MB that a step takes beyond the network and its inputs, in a process of its own."
    numbers = dict(sizes=size, width=args.width, batch=args.batch)
    options = [word for key, value in numbers.items() for word in (f'--{key}', str(value))]
    command = [sys.executable, __file__, '--peak', name, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(args):
    settings = VARIANTS | {'all, bfloat16, checkpointing': ALL | dict(bf16=True, checkpointing=True)}
    if args.peak in settings:
        network = Variant(args.width, **settings[args.peak])
        network.hold = False  # memory held is not memory needed
    else: network = dict(peers(args.width))[args.peak]()
    x, t, y = inputs(args.sizes[0], args.batch)
    def used():
        if DEVICE == 'cuda': return torch.cuda.max_memory_allocated()/1e6
        status = Path('/proc/self/status').read_text()
        return int(status.split('VmHWM:')[1].split()[0])/1e3  # largest resident size so far
    with torch.no_grad(): network(x[:1, ..., :32, :32], t[:1], y[:1, :32, :32])  # kernels and code that stay
    if DEVICE == 'cpu': Path('/proc/self/clear_refs').write_text('5')  # so far: from now
    before = used()
    step(network, x, t, y)
    print(f'{used() - before:.0f}')


KINDS = {
    'convolutions': ('convolution', 'conv_transpose'), 'products': ('mm', 'bmm', 'baddbmm'),
    'normalise': ('group_norm',),
    'look-ups and their sums': ('index_select', 'embedding_bag'),
    'scale, shift, SiLU, softmax, sums': ('addcmul', 'silu', 'mul', 'add', 'add_', 'sum', 'softmax', 'div', 'neg',
                                          'avg_pool2d', 'upsample'),
    'copies and casts': ('copy_', 'cat', 'fill_', 'clone'),
    'search of neighbourhoods': ('sort', 'unique', 'bincount', 'cumsum', 'repeat_interleave')}


def profiled(network, x, t, y):
    "Share of a step's time by kind of operation."
    step(network, x, t, y)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*(DEVICE == 'cuda')
    with profile(activities=activities) as p: step(network, x, t, y)
    shares, total = dict.fromkeys(KINDS, 0.), 0.
    for e in p.key_averages():
        spent = e.self_device_time_total if DEVICE == 'cuda' else e.self_cpu_time_total
        total += spent
        name = e.key.removeprefix('aten::')
        for kind, parts in KINDS.items():
            if name in parts or any(len(part) > 4 and part in name for part in parts):
                shares[kind] += spent
                break
    shares['the rest: calls, autograd'] = total - sum(shares.values())
    return {kind: spent/total for kind, spent in shares.items()}


def training_table(size, args, peak_rates):
    "The table of forward and backward at one size, and lines about it."
    x, t, y = inputs(size, args.batch)
    rows = constructors(args)
    missing = [n for n, f in rows.items() if f is None]
    networks = {n: f() for n, f in rows.items() if f is not None}
    with torch.no_grad(): forward = clock({n: (lambda f=f: f(x, t, y)) for n, f in networks.items()}, args.repeats)
    both = clock({n: (lambda f=f: step(f, x, t, y)) for n, f in networks.items()}, args.repeats)
    work = {n: counted(lambda f=f: step(f, x, t, y)) for n, f in networks.items() if 'compiled' not in n}
    others = [n for n in networks if n not in VARIANTS and 'compiled' not in n]
    memory = {n: f'{peak(n, size, args):.0f}' for n in (PLAIN, 'all, float32', FAST, *others)}
    head = ('network', 'forward, ms', 'times faster', 'forward + backward, ms', 'times faster', 'GFLOP', 'GFLOP/s',
            'memory, MB')
    lines = ['| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|']
    for n in networks:
        rate = f'{work[n]:.0f} | {work[n]/both[n]*1e3:.0f}' if n in work else ' | '
        times = f'{forward[n]:.0f} | {forward[PLAIN]/forward[n]:.2f} | {both[n]:.0f} | {both[PLAIN]/both[n]:.2f}'
        lines.append(f'| {n} | {times} | {rate} | {memory.get(n, "")} |')
    lines += [f'| {n} | | | | | | | |' for n in missing]
    def search(): return [find_neighbourhoods(y[:, ::2**i, ::2**i], CLASSES) for i in range(4)]
    searched = clock({'search': search}, args.repeats)['search']
    same, half = (f'{both[PLAIN]/both[n]:.2f}' for n in ('all, float32', FAST))
    precisions = {'all, float32': torch.float32, FAST: torch.bfloat16}
    rates = {n: work[n]/both[n]*1e3/peak_rates[dtype][0] for n, dtype in precisions.items()}
    least = peak('all, bfloat16, checkpointing', size, args)
    lines += ['', f'A training step is {same} times faster at equal precision and {half} times with bfloat16. '
              f'Share of the measured convolution rate: {rates["all, float32"]:.0%} in float32, '
              f'{rates[FAST]:.0%} in bfloat16. '
              f'The search for neighbourhoods takes {searched:.1f} ms of a step. '
              f'With checkpointing as well, a step takes {least:.0f} MB.', '',
              '| time of a step | ' + ' | '.join([*KINDS, 'the rest: calls, autograd']) + ' |',
              '|---' * (len(KINDS) + 2) + '|']
    for n in rates:
        shares = (f'{share:.0%}' for share in profiled(networks[n], x, t, y).values())
        lines.append(f'| {n} | ' + ' | '.join(shares) + ' |')
    return lines


def sampling_table(size, args):
    "The table of guided evaluations and whole images at one size."
    x, _, y = inputs(size, args.batch)
    t, null = torch.full((args.batch,), 500., device=DEVICE), torch.full_like(y, CLASSES)
    condition = Condition(y, torch.zeros(args.batch, device=DEVICE), CLASSES)
    def twice(network):
        other = null if isinstance(network, Variant) else y  # a peer's null condition costs the same
        return lambda: (network(x, t, y), network(x, t, other))
    def ours(bf16, spacing=False):
        variant = Variant(args.width, **ALL, spacing=spacing)
        inner = EDMDenoiser(variant.model.eval(), precision='bfloat16' if bf16 else 'float32')
        denoise = Guided(inner, GUIDANCE)
        known = Condition(y, torch.full((args.batch,), 1.5, device=DEVICE), CLASSES) if spacing else condition
        with torch.no_grad(): prepared = denoise.prepare(known)
        def evaluate():
            hold_memory(True)
            return denoise(x, 1., prepared)
        def image():
            hold_memory(True)
            return sample(denoise, inner.sigmas(STEPS), known, range(args.batch), (1, size, size), device=DEVICE)
        return evaluate, image
    names = {'ours, float32': ours(False), 'ours, bfloat16': ours(True),
             'ours, bfloat16, spacing known (no encoder pass shared)': ours(True, True)}
    rows = {PLAIN + ', two passes': twice(Variant(args.width))} | {n: f[0] for n, f in names.items()}
    rows |= {n + ', two passes': twice(f()) for n, f in peers(args.width) if f is not None}
    with torch.no_grad():
        ms = clock(rows, args.repeats)
        images = clock({n: f[1] for n, f in names.items()}, 1)
    plain = ms[PLAIN + ', two passes']
    published = plain*PUBLISHED_STEPS/args.batch
    lines = [f'| guided evaluation, batch {args.batch} | ms | times faster | one image, ms ({STEPS} evaluations) '
             f'| times cheaper than {PUBLISHED_STEPS} plain ones |', '|---|---|---|---|---|']
    for n in rows:
        image = images[n]/args.batch if n in images else ms[n]*STEPS/args.batch
        source = '' if n in images else ' (from evaluations)'
        lines.append(f'| {n} | {ms[n]:.0f} | {plain/ms[n]:.2f} | {image:.0f}{source} | {published/image:.0f} |')
    own = images['ours, bfloat16']/args.batch
    summary = (f'The published default, {PUBLISHED_STEPS} steps of two plain passes, takes {published/1000:.0f} s '
               f'per image (from the timed evaluations); ours, measured from noise to image, {own/1000:.2f} s: '
               f'{published/own:.0f} times cheaper.')
    return lines + ['', summary]


def report(args):
    name = torch.cuda.get_device_name() if DEVICE == 'cuda' else f'{processor()}, {torch.get_num_threads()} threads'
    rates = limits(args.batch)
    (conv32, mm32, move32), (conv16, mm16, move16) = rates[torch.float32], rates[torch.bfloat16]
    yield f'# Network benchmark: {name}'
    today, words = time.strftime('%Y-%m-%d'), ' '.join(sys.argv[1:])
    yield (f'{today}. Base width {args.width}, multipliers (1, 2, 3, 4), 2 blocks, attention at the last two levels, '
           f'{CLASSES} classes, 1 channel, batch {args.batch}; torch {torch.__version__}. Medians of {args.repeats} '
           f'(images: 1), all rows of a table in turns in one process. `python benchmarks/network.py {words}`')
    yield (f'The machine in the same run: convolutions {conv32:.0f} GFLOP/s in float32 and {conv16:.0f} in bfloat16, '
           f'matrix products {mm32:.0f} and {mm16:.0f}; {move32:.0f} and {move16:.0f} multiplications of a convolution '
           f'in the time of moving one number (`LOOKUP_COST` is {LOOKUP_COST}).')
    for size in args.sizes:
        yield f'## {size} x {size}'
        yield '\n'.join(training_table(size, args, rates))
        yield '\n'.join(sampling_table(size, args))


def processor():
    "Name of the processor."
    if Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'): return f'{line.split(":")[1].strip()} ({platform.machine()})'
    return platform.machine()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--width', type=int, default=64)
    p.add_argument('--sizes', type=int, nargs='+', default=[64, 128])
    p.add_argument('--batch', type=int, default=4)
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--compile', action='store_true', help='also time torch.compile (minutes of compilation on a CPU)')
    p.add_argument('--peak', help=argparse.SUPPRESS)
    p.add_argument('--out', type=Path, default=None)
    args = p.parse_args()
    if args.peak: return print_peak(args)
    out = args.out or Path(__file__).parent/'results'/f'network_{DEVICE}_{args.width}.md'
    print_and_keep(report(args), out)


if __name__ == '__main__': main()
