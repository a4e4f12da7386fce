"""Milliseconds and ratios of the network: its speed-ups one by one, its peers, and the machine's own limit, in one run.

    python benchmarks/network.py [--width 64] [--sizes 64 128] [--batch 4] [--repeats 5] [--quick]

Every row is timed in this one process, in turns, and only ratios within the run mean something: machines are shared and noisy.
The first row, dense and float32, is the published mathematics written plainly; it stands in for the original. Peers that are
not installed (the `bench` extra) are named as missing. The table goes to `benchmarks/results/network_<device>.md`."""
import argparse, platform, statistics, time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cmr_diffusion import sdm
from cmr_diffusion.condition import Condition
from cmr_diffusion.diffusion import EDM, Denoiser, guided
from cmr_diffusion.samplers import sample

CLASSES, OWN_GROUP_NORM = 7, sdm.group_norm


def hearts(size, n, seed=0):
    "Label classes (n, size, size): background, a ring, its cavity, some padding."
    rng, (r, c) = np.random.default_rng(seed), np.mgrid[:size, :size]/size
    maps = np.ones((n, size, size), np.uint8)
    for m in maps:
        d = np.hypot((r - rng.uniform(.4, .6))*rng.uniform(.9, 1.1), c - rng.uniform(.4, .6))
        m[d < .25] = 2; m[d < .17] = 3; m[:, int(size*rng.uniform(.9, 1)):] = 0
    return torch.from_numpy(maps)


def network(args, device):
    "The SDM of the comparison, no layer at zero."
    torch.manual_seed(0)
    model = sdm.SDM(sdm.SDMConfig(label_channels=CLASSES, width=args.width, multipliers=(1, 2, 3, 4), blocks=2, attention=(4, 8), spacing=False))
    for p in model.parameters():
        if not p.any(): nn.init.normal_(p, std=.02)
    return model.to(device)


class Variant:
    "The SDM with some of its speed-ups."
    def __init__(self, name, args, device, spade='dense', norm=False, last=False, bf16=False, compiled=False):
        self.name, self.norm, self.bf16, self.model = name, norm, bf16, network(args, device)
        self.model.spade = spade
        if last: self.model = self.model.to(memory_format=torch.channels_last)
        self.last, self.run = last, torch.compile(self.model) if compiled else self.model

    def __call__(self, x, t, y):
        sdm.group_norm = OWN_GROUP_NORM if self.norm else lambda x, groups=32, eps=1e-5: F.group_norm(x, groups, eps=eps)
        if self.last: x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16): return self.run(x, t, y).float()


def peers(args, device):
    "(name, callable(x, t, y)) of networks of other projects at the same width; a missing one is a name and None."
    widths = tuple(args.width*m for m in (1, 2, 3, 4))
    try:
        from diffusers import UNet2DModel
        for bf16 in (False, True):
            unet = UNet2DModel(in_channels=1 + CLASSES, out_channels=1, block_out_channels=widths, layers_per_block=2, attention_head_dim=64,
                               down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
                               up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D')).to(device, memory_format=torch.channels_last)
            def concatenated(x, t, y, unet=unet, bf16=bf16):
                one_hot = F.one_hot(y.long(), CLASSES).movedim(-1, 1).float()
                x = torch.cat([x, one_hot], 1).contiguous(memory_format=torch.channels_last)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): return unet(x, t).sample.float()
            yield f'diffusers UNet2DModel, mask concatenated, {"bfloat16" if bf16 else "float32"}', concatenated
    except ImportError: yield 'diffusers UNet2DModel (not installed)', None
    try:
        from monai.networks.nets import SPADEDiffusionModelUNet
        net = SPADEDiffusionModelUNet(spatial_dims=2, in_channels=1, out_channels=1, label_nc=CLASSES, num_res_blocks=2, channels=widths,
                                      attention_levels=(False, False, True, True), num_head_channels=64, norm_num_groups=32).to(device)
        yield 'MONAI SPADEDiffusionModelUNet, float32', lambda x, t, y: net(x, t, F.one_hot(y.long(), CLASSES).movedim(-1, 1).float())
    except ImportError: yield 'MONAI SPADEDiffusionModelUNet (not installed)', None


def clock(functions, repeats, device):
    "Median milliseconds of each function, taken in turns after one warm-up."
    wait = torch.cuda.synchronize if device == 'cuda' else (lambda: None)
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, f in functions.items():
            wait(); start = time.perf_counter(); f(); wait()
            if turn: times[name].append(time.perf_counter() - start)
    return {name: 1000*statistics.median(t) for name, t in times.items()}


def limits(device, batch):
    "Best measured GFLOP/s of a convolution and a matrix product, by precision."
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        layers = {(c, s): (nn.Conv2d(c, c, 3, padding=1).to(device, dtype, memory_format=torch.channels_last),
                           torch.randn(batch, c, s, s, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)) for c, s in ((128, 64), (256, 32), (512, 16))}
        with torch.no_grad():
            ms = clock({k: (lambda conv=conv, x=x: conv(x)) for k, (conv, x) in layers.items()}, 5, device)
            conv = max(2*9*c*c*s*s*batch/ms[c, s]/1e6 for c, s in layers)
            a = torch.randn(2048, 2048, device=device, dtype=dtype)
            product = 2*2048**3/clock({'mm': lambda: a @ a}, 5, device)['mm']/1e6
        best[dtype] = conv, product
    return best


def counted(f):
    "Arithmetic really done, in GFLOP."
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()/1e9


def step(model, x, t, y):
    "Forward and backward."
    out = model(x, t, y).square().mean()
    out.backward()


def table_for(size, args, device):
    "Rows of the table at one size."
    x, t, y = torch.randn(args.batch, 1, size, size, device=device), torch.rand(args.batch, device=device)*1000, hearts(size, args.batch).to(device)
    variants = [Variant('SDM dense, float32, written plainly', args, device),
                Variant('+ neighbourhoods', args, device, spade='auto'), Variant('+ channels last', args, device, last=True),
                Variant('+ own group norm', args, device, norm=True), Variant('+ bfloat16', args, device, bf16=True),
                Variant('all, float32', args, device, 'auto', True, True), Variant('all, bfloat16', args, device, 'auto', True, True, True)]
    if args.compile: variants.append(Variant('all, bfloat16, compiled', args, device, 'auto', True, True, True, True))
    named = {v.name: v for v in variants} | dict(peers(args, device))
    missing = [n for n, f in named.items() if f is None]
    named = {n: f for n, f in named.items() if f is not None}
    with torch.no_grad(): forward = clock({n: (lambda f=f: f(x, t, y)) for n, f in named.items()}, args.repeats, device)
    both = clock({n: (lambda f=f: step(f, x, t, y)) for n, f in named.items()}, args.repeats, device)
    first, work = variants[0].name, {n: counted(lambda f=f: step(f, x, t, y)) for n, f in named.items() if 'compiled' not in n}
    rows = [[n, f'{forward[n]:.0f}', f'{forward[first]/forward[n]:.2f}', f'{both[n]:.0f}', f'{both[first]/both[n]:.2f}',
             f'{work[n]/both[n]*1e3:.0f}' if n in work else ''] for n in named]
    return rows, missing, {n: work[n]/both[n]*1e3 for n in work}


def sampling(size, args, device):
    "Milliseconds of one guided evaluation and of one image, against two dense passes in turn and 1000 steps of them."
    plain, fast = Variant('plain', args, device), Variant('fast', args, device, 'auto', True, True, True)
    x, t = torch.randn(args.batch, 1, size, size, device=device), torch.full((args.batch,), 500., device=device)
    y = hearts(size, args.batch).to(device)
    condition, null = Condition(y, torch.zeros(args.batch, device=device), CLASSES), torch.full_like(y, CLASSES)
    denoise = guided(Denoiser(fast.model, EDM(), 'bfloat16'), 1.5)
    prepared = denoise.prepare(condition)
    def published(): plain(x, t, y); plain(x, t, null)
    with torch.no_grad():
        ms = clock({'published': published, 'ours': lambda: denoise(x, 1., prepared)}, args.repeats, device)
        sdm.group_norm = OWN_GROUP_NORM
        image = clock({'image': lambda: sample(denoise, EDM().sigmas(20), condition, range(args.batch), (1, size, size), device=device)}, 1, device)['image']
    return ms['published'], ms['ours'], 1000*ms['published']/args.batch, image/args.batch


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--width', type=int, default=64); p.add_argument('--sizes', type=int, nargs='+', default=[64, 128])
    p.add_argument('--batch', type=int, default=4); p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--compile', action='store_true', help='also time torch.compile (minutes of compilation)')
    p.add_argument('--out', type=Path, default=None)
    args = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else f'{platform.machine()}, {torch.get_num_threads()} threads'
    peak = limits(device, args.batch)
    lines = [f'# Network benchmark: {name}', '', f'Base width {args.width}, multipliers (1, 2, 3, 4), 2 blocks, attention at the last two levels, 7 classes, batch {args.batch}; '
             f'torch {torch.__version__}. Medians of {args.repeats}, taken in turns.', '',
             f'The machine: convolutions {peak[torch.float32][0]:.0f} GFLOP/s in float32, {peak[torch.bfloat16][0]:.0f} in bfloat16; '
             f'matrix products {peak[torch.float32][1]:.0f} and {peak[torch.bfloat16][1]:.0f}.', '']
    for size in args.sizes:
        rows, missing, rates = table_for(size, args, device)
        lines += [f'## {size} x {size}', '', '| network | forward, ms | times faster | forward + backward, ms | times faster | GFLOP/s done |', '|---|---|---|---|---|---|']
        lines += ['| ' + ' | '.join(r) + ' |' for r in rows] + [f'| {m} | | | | | |' for m in missing]
        share = rates['all, bfloat16']/peak[torch.bfloat16][0]
        published, ours, theirs, image = sampling(size, args, device)
        lines += ['', f'Share of the measured convolution rate, all, bfloat16: {share:.0%}. One guided evaluation: {ours:.0f} ms against {published:.0f} ms for two dense float32 passes, '
                  f'{published/ours:.1f} times faster. One image at the default sampler (20 evaluations): {image:.0f} ms against {theirs/1000:.0f} s for 1000 guided steps '
                  f'(extrapolated), {theirs/image:.0f} times cheaper.', '']
        print('\n'.join(lines), flush=True)
    out = args.out or Path(__file__).parent/'results'/f'network_{device}_{args.width}.md'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text('\n'.join(lines) + '\n')
    print(out)


if __name__ == '__main__': main()
