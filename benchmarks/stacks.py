"""Do the slices of a painted stack belong together? Each slice has noise of its own, or all share its coarse part.

    python benchmarks/stacks.py CHECKPOINT CACHE [--split test] [--patients 15] [--steps 20] [--seed 0] [--out FILE]

The label maps of some patients are painted twice, with `stacks=False` and with `stacks=True` of `synthesize`;
everything else is the same, the tissue values included. The correlation of the backgrounds of neighbouring slices is
compared with that of the real slices of the same patients, and its floor is the correlation between different patients.
The intraclass correlation of the structures and the spread between slices say whether the shared noise does harm
elsewhere. The results go to `benchmarks/results/stacks.md`."""
import argparse, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cmr_diffusion.core import CMRError
from cmr_diffusion.evaluation.fidelity import value_table
from cmr_diffusion.evaluation.overlap import row_names
from cmr_diffusion.evaluation.patients import icc_table, neighbour_table
from cmr_diffusion.evaluation.report import read_synthetic
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.grid.loaders import grid_slices
from cmr_diffusion.synthesis.cohort import synthesize
from masks import described, some_patients
from writing import print_and_keep

ARMS = {'noise of its own': False, 'shared noise': True}  # how a slice is painted: `stacks` of `synthesize`


def painted(checkpoint, masks, stacks, args):
    "Paint the masks into a temporary cohort, and read it back."
    with tempfile.TemporaryDirectory() as room:
        root = Path(room)/'cohort'
        synthesize(checkpoint, masks, root, steps=args.steps, seed=args.seed, stacks=stacks)
        return read_synthetic(root, masks.cache)


def cells(row): return '| ' + ' | '.join(row) + ' |'


def table(head, rows):
    "Write a Markdown table."
    return '\n'.join(map(cells, [head, ['---'] * len(head), *rows]))


def backgrounds(real, arms):
    "The correlation of neighbouring backgrounds by type, and which arm is nearer to the real one."
    found = {name: neighbour_table(slices).set_index('type') for name, slices in {'real': real, **arms}.items()}
    rows = []
    for image_type in found['real'].index:
        each = {name: own.loc[image_type] for name, own in found.items()}
        nearest = min(arms, key=lambda name: abs(each[name].correlation - each['real'].correlation))
        numbers = [f'{own.correlation:.2f} ({own.floor:.2f})' for own in each.values()]
        rows.append([image_type, f'{each["real"].pairs:.0f}', *numbers, nearest])
    return table(['type', 'pairs', *(f'{name} (floor)' for name in found), 'nearer to real'], rows)


def harm(real, arms, transforms):
    "Intraclass correlation and ratios of spread by structure, for each arm."
    icc = {name: icc_table(real, slices, transforms) for name, slices in arms.items()}
    spread = {name: value_table(real, slices, transforms) for name, slices in arms.items()}
    rows = []
    for n, name in enumerate(row_names(icc[next(iter(arms))])):
        each = [(icc[arm].icc[n], spread[arm].within[n], spread[arm].between[n]) for arm in arms]
        numbers = [' · '.join(f'{number:.2f}' for number in own) for own in each]
        rows.append([name, f'{icc[next(iter(arms))].real_icc[n]:.2f}', *numbers])
    return table(['structure', 'real', *(f'{arm}: ICC · within · between' for arm in arms)], rows)


def report(args):
    "Paint, measure, and yield the parts of the report."
    cache = CohortCache.load(args.cache)
    masks = some_patients(cache, args.split, args.patients)
    names = set(masks.usable.patient)
    yield (f'# Stacks\n{described(args.checkpoint)} '
           f'{len(masks.usable)} slices of {len(names)} {args.split} patients, {args.steps} steps, seed '
           f'{args.seed}. A correlation is the mean over pairs of slices.')
    real = grid_slices(cache, args.split)
    real = real[real.rows.patient.isin(names).to_numpy()]
    arms = {name: painted(args.checkpoint, masks, stacks, args) for name, stacks in ARMS.items()}
    yield '## Backgrounds of neighbouring slices\n' + backgrounds(real, arms)
    yield '## Structures\n' + harm(real, arms, cache.values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='folder of a checkpoint, or an MLflow run')
    parser.add_argument('cache', help='cache of the real cohort')
    parser.add_argument('--split', default='test', help='of the patients whose label maps are painted')
    parser.add_argument('--patients', type=int, default=15, help='how many patients, evenly spread')
    parser.add_argument('--steps', type=int, default=20, help='of sampling')
    parser.add_argument('--seed', type=int, default=0, help='of the painting')
    parser.add_argument('--out', default=ROOT/'benchmarks'/'results'/'stacks.md', help='where the report is kept')
    args = parser.parse_args()
    try: print_and_keep(report(args), args.out)
    except CMRError as e:
        print(e, file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': main()
