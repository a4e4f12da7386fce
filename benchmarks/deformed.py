"""Do images in deformed label maps help a segmentation network more than images in the maps as they are?

    python benchmarks/deformed.py CHECKPOINT CACHE WORK [--fractions 10 100] [--steps 20] [--seed 0] [--threads 1]

Segmentation networks are trained on synthetic images alone and tested on the real test patients. The masks are those
of a fraction of the training patients. The first arm has one image for each mask, the second two (so that more images
alone do not count as a gain), the third one image for the mask and one for the mask deformed. All networks take the
same number of steps. The generator has seen all training patients: only the masks are fewer. The results go to
`benchmarks/results/deformed.md`; painted cohorts and networks stay in WORK, and are found again there."""
import argparse, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from cmr_diffusion.core import CMRError
from cmr_diffusion.evaluation.overlap import dice_table, row_names
from cmr_diffusion.evaluation.report import read_synthetic
from cmr_diffusion.evaluation.segmentation import cached_segmentation, SegConfig, segment
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.grid.loaders import grid_slices
from cmr_diffusion.synthesis.cohort import synthesize
from masks import described, some_patients
from writing import print_and_keep


def fraction_of(cache, percent):
    "Take the training masks of some of the training patients, evenly spread."
    patients = cache.usable.patient[cache.usable.split == 'train'].nunique()
    return some_patients(cache, 'train', max(1, round(patients * percent / 100)))


def painted(checkpoint, masks, root, args, **options):
    "Paint the masks, or read what was painted before with the same settings."
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        synthesize(checkpoint, masks, root, **dict(steps=args.steps, seed=args.seed, device=args.device) | options)
    return read_synthetic(root, masks.cache)


def arms_of(checkpoint, masks, folder, args):
    "The training sets of one fraction by name."
    first = painted(checkpoint, masks, folder/'first', args)
    second = dict(seed=args.seed + 1)  # other tissue values and other noise, in both of the arms that are compared
    again = painted(checkpoint, masks, folder/'again', args, **second)
    deformed = painted(checkpoint, masks, folder/'deformed', args, **second, deform=True)
    return {'synthetic': first, 'synthetic, two per mask': first + again, 'synthetic + deformed': first + deformed}


def report(args):
    "Paint, train, test, and yield the parts of the report."
    cache, config = CohortCache.load(args.cache), SegConfig()
    test, networks = grid_slices(cache, 'test'), Path(args.work)/'networks'
    yield (f'# Deformed label maps\n{described(args.checkpoint)} '
           f'Dice on {len(test)} real test images of U-Nets ({config.steps} steps, one seed) '
           'that were trained on synthetic images alone.')
    for percent in args.fractions:
        masks = fraction_of(cache, percent)
        kept = f'{args.checkpoint.strip("/").replace("/", "_")}_{args.steps}_steps_seed_{args.seed}'
        arms = arms_of(args.checkpoint, masks, Path(args.work)/kept/f'{percent:g}', args)
        lines, head = [], ''
        for name, slices in arms.items():
            model = cached_segmentation(networks, slices, config, args.device, f'U-Net: {name}')
            table = dice_table(segment(model, test.images), test)
            head = ' | '.join(row_names(table))
            lines.append(f'| {name} | {len(slices)} | ' + ' | '.join(f'{v:.3f}' for v in table.dice) + ' |')
        rule = '|---' * (2 + head.count('|') + 1) + '|'
        yield '\n'.join([f'## Masks of {masks.usable.patient.nunique()} patients ({percent:g} %)',
                         f'| trained on | images | {head} |', rule, *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='folder of a checkpoint, or an MLflow run')
    parser.add_argument('cache', help='cache of the real cohort')
    parser.add_argument('work', help='folder for painted cohorts and trained networks')
    parser.add_argument('--fractions', type=float, nargs='+', default=[10., 100.], help='percent of the patients')
    parser.add_argument('--steps', type=int, default=20, help='of sampling')
    parser.add_argument('--seed', type=int, default=0, help='of the painting')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--device', help='cpu or cuda; None: a GPU where there is one')
    parser.add_argument('--out', default=ROOT/'benchmarks'/'results'/'deformed.md', help='where the report is kept')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try: print_and_keep(report(args), args.out)
    except CMRError as e:
        print(e, file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': main()
