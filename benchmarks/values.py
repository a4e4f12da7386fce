"""Does a model paint the tissue values that it is asked for, within the training range and somewhat beyond it?

    python benchmarks/values.py CHECKPOINT CACHE [--images 24] [--steps 20] [--beyond .1] [--held .1 ...]
        [--picture FILE] [--out FILE]

For each type and structure, images are painted into masks of the test patients in which it has 20 pixels or more. It
is asked for values that are evenly spread over the training range and `--beyond` times its width to both sides of it;
the other structures are drawn in accordance with it, as `cmr_sample --values` does. The table compares painted with
asked means: slope, mean error, residual. Several `--held` compare several values of `held_above`. The results go to
`benchmarks/results/values_NAME.md`, where NAME is that of the cache.

`--picture` draws one label map with walls of six values, and one synthetic heart in all its slices and types: for a
model that was trained on phantoms only, since pictures of others may show patients."""
import argparse, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import torch

from cmr_diffusion.core import choose_precision, CMRError, GridSlices, MYOCARDIUM, stable_seed, STRUCTURES
from cmr_diffusion.evaluation.tissue import ASKED, tissue_table
from cmr_diffusion.figures import image_grid
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.grid.tissue import in_units, sizes_of
from cmr_diffusion.model.checkpoint import load_checkpoint
from cmr_diffusion.model.painting import HELD_ABOVE, paint
from cmr_diffusion.tracking import resolve_run
from masks import described
from writing import print_and_keep

LEAST = 20  # pixels of a structure that is asked for
WALLS = 900., 980., 1060., 1140., 1220., 1300.  # ms, of the picture


def wishes_for(checkpoint, grids, column, values, seed):
    "What to ask for in each slice: one structure has a given value, the others are drawn in accordance with it."
    spec, tissue = checkpoint.spec, checkpoint.tissue
    classes = torch.from_numpy(np.stack([spec.encode(g.labels, g.type) for g in grids]))
    sizes, wishes = sizes_of(classes, spec, [g.mean_spacing for g in grids]), []
    for n, (g, value) in enumerate(zip(grids, values)):
        rng, asked = np.random.default_rng(stable_seed(seed, column, n)), {column: (value, value)}
        drawn = tissue.draw_slice(rng, tissue.draw_patient(rng, asked), asked, sizes[n])
        wishes.append(in_units(drawn, spec, checkpoint.values, g.type))
    return wishes


def painted(checkpoint, grids, wishes, seed, held, args):
    "Paint label maps, 32 at a time."
    images, precision = [], choose_precision('auto', 'cpu')
    for start in range(0, len(grids), 32):
        some = slice(start, start + 32)
        seeds = [stable_seed(seed, n) % 2**31 for n in range(start, start + len(grids[some]))]
        images += paint(checkpoint, grids[some], seeds, steps=args.steps, precision=precision, values=wishes[some],
                        held_above=held)
    return images


def as_slices(checkpoint, images, patients):
    "Painted slices in network units, with a row for each; intervals go by the patients whose masks they are."
    units = np.stack([checkpoint.values[g.type].forward(g.pixels)[None] for g in images])
    rows = pd.DataFrame(dict(patient=patients, type=[g.type for g in images], structures=','.join(STRUCTURES)))
    return GridSlices(units.astype(np.float32), np.stack([g.labels for g in images]), rows)


def swept(checkpoint, cache, held, args):
    "Compare painted with asked values for each type and structure."
    spec, tissue, found = checkpoint.spec, checkpoint.tissue, []
    for image_type, structures in spec.types:
        rows = cache.usable.iloc[cache.rows('test', image_type)]
        every = [(cache.grid(int(row.position)), row.patient) for row in rows.itertuples()]
        for n, structure in enumerate(structures):
            column = spec.first(image_type) + n
            fit = [pair for pair in every if (pair[0].labels == STRUCTURES.index(structure)).sum() >= LEAST]
            if not tissue.known[column] or not fit: continue
            grids, patients = zip(*(fit[i % len(fit)] for i in range(args.images)))
            extra = args.beyond * (tissue.high[column] - tissue.low[column])
            values = np.linspace(tissue.low[column] - extra, tissue.high[column] + extra, args.images)
            order = np.random.default_rng(args.seed).permutation(args.images)
            wishes = wishes_for(checkpoint, grids, column, values[order].clip(-1, 1), args.seed)
            slices = as_slices(checkpoint, painted(checkpoint, list(grids), wishes, args.seed, held, args), patients)
            asked = pd.DataFrame([{f'asked_{structure}': w[structure]} for w in wishes], columns=ASKED)
            found.append(tissue_table(slices, asked, checkpoint.values, draws=500))
    if not found: raise CMRError(f'{cache.folder}: no test slice of a type that the model knows values of')
    return pd.concat(found, ignore_index=True)


def row_of(r):
    "One line of the table."
    digits = 3 if r.unit == 'rel' else 1
    return (f'| {r.type} {r.structure} | {r.low:.{digits}f} to {r.high:.{digits}f} | {r.slope:.2f} [{r.slope_low:.2f}, '
            f'{r.slope_high:.2f}] | {r.error:+.{digits}f} | {r.residual:.{digits}f} | {r.correlation:.2f} |')


def report(checkpoint, cache, args):
    "Paint, measure, and yield the parts of the report."
    yield (f'# Asked for and painted: {cache.folder.name}\n{described(args.checkpoint)} {args.images} images for each '
           f'structure, into masks of test patients, {args.steps} steps, seed {args.seed}. What is asked for covers '
           f'the training range and {args.beyond:.0%} of its width more on both sides; errors are in the unit of the '
           'type.')
    for held in args.held:
        lines = ['| structure | asked for | slope [95 %] | mean error | residual | correlation |', '|---' * 6 + '|']
        lines += [row_of(r) for r in swept(checkpoint, cache, held, args).itertuples()]
        yield f'## held_above = {held:g}\n' + '\n'.join(lines)


def picture(checkpoint, cache, args):
    "One label map with walls of six values; one synthetic heart in all its slices and types."
    rows = cache.usable.iloc[cache.rows('test')]
    of_type = rows[rows.type == 'T1']
    if not len(of_type): raise CMRError(f'{cache.folder}: no test slice of type T1, which the picture shows')
    grids = {row.position: cache.grid(int(row.position)) for row in rows.itertuples()}
    first = max(of_type.position, key=lambda i: (grids[i].labels == MYOCARDIUM).sum())
    wishes = [{STRUCTURES[MYOCARDIUM]: value} for value in WALLS]
    walls = paint(checkpoint, [grids[first]] * 6, [args.seed] * 6, steps=args.steps, values=wishes)
    own = rows[rows.patient == rows.patient[rows.position == first].item()].sort_values(['type', 'slice'])
    heart, patient = [grids[i] for i in own.position], checkpoint.tissue.draw_patient(np.random.default_rng(args.seed))
    values = [in_units(patient, checkpoint.spec, checkpoint.values, g.type) for g in heart]
    seeds = [args.seed + n for n in range(len(heart))]
    slices = paint(checkpoint, heart, seeds, steps=args.steps, values=values)
    fig = image_grid([walls, slices], [f'{value:g} ms' for value in WALLS], ('T1 of the wall', 'one heart'), cell=1.2)
    columns = max(len(WALLS), len(heart))
    for ax, image_type, name in zip(fig.axes[columns:], own.type, own.slice):
        ax.set_title(f'{image_type} {name}', fontsize=8)
    fig.savefig(args.picture, dpi=90)
    print(f'{args.picture}: ' + ', '.join(f'{g.pixels[g.labels == MYOCARDIUM].mean():.0f}' for g in walls) + ' ms')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='folder of a checkpoint, or an MLflow run')
    parser.add_argument('cache', help='cache whose test masks are painted')
    parser.add_argument('--images', type=int, default=24, help='for each structure')
    parser.add_argument('--steps', type=int, default=20, help='of sampling')
    parser.add_argument('--beyond', type=float, default=.1, help='share of the training range, on both sides')
    parser.add_argument('--held', type=float, nargs='+', default=[HELD_ABOVE], help='values of held_above')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--picture', help='PNG file of the picture; phantoms only')
    parser.add_argument('--out', help='where the report is kept')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        checkpoint, cache = load_checkpoint(resolve_run(args.checkpoint)), CohortCache.load(args.cache)
        if checkpoint.tissue is None: raise CMRError(f'{args.checkpoint}: this model takes no tissue values')
        out = args.out or ROOT/'benchmarks'/'results'/f'values_{cache.folder.name}.md'
        print_and_keep(report(checkpoint, cache, args), out)
        if args.picture: picture(checkpoint, cache, args)
    except CMRError as e:
        print(e, file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': main()
