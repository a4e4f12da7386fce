"""The table of `arms.py`: JSON files of single arms become one page of Markdown."""
import json, os, platform, re

import pandas as pd

from cmr_diffusion.evaluation.agreement import difference_interval
from cmr_diffusion.evaluation.floors import verdict
from cmr_diffusion.output import atomic_path

COLUMNS = ('arm', 'what it is', 'steps x batch, time, threads', 'bias', 'within / real', 'between / real',
           'loss by quarter', 'values told', 'adherence', 'apex (real)', 'edge / real, apex', 'utility, % of real',
           's per image')
MARGIN = .5  # Dice points, by which two ways to paint may differ and be called equal
AGAINST = ('arm', 'against', 'masks', 'mean of structures', f'within {MARGIN} points?', 'structures', 'over pixels')
ASKED = ('arm', 'values', 'structure', 'slope', 'r', 'mean error', 'residual sd', 'ICC', 'ICC of real')


def plain_json(content):
    "The content as it is when it has been written and read."
    return json.loads(json.dumps(content))


def read_json(path):
    "The content of a file; None where there is none."
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path, content):
    "Write a file whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as new: new.write_text(json.dumps(content, indent=1))


# --- cells ---

def line(cells): return f'| {" | ".join(cells)} |'


def head(columns): return [line(columns), '|' + '---|' * len(columns)]


def short(value, digits=3, sign=False):
    "A number without its leading zero, as .095 or +.003; a stroke for none."
    if value is None or value != value: return '-'
    text = f'{value:+.{digits}f}' if sign else f'{value:.{digits}f}'
    return re.sub(r'^([+-]?)0\.', r'\1.', text)


def cell(said, column, digits=2, sign=False):
    "One column of the table of values: the structures in their order, image types separated by a slash."
    types = {}
    for row in said['values']: types.setdefault(row['type'], []).append(short(row[column], digits, sign))
    return ' / '.join(' '.join(numbers) for numbers in types.values())


def dice_cell(rows, images=''):
    "Dice of the structures of one set of images."
    return ' '.join(short(row['dice']) for row in rows if row.get('images', images) == images)


def length_cell(said):
    "How long an arm was trained."
    t = said['training']
    return f'{t["steps"]} x {said["settings"]["config"]["batch_size"]}, {t["seconds"] / 60:.0f} min, {t["threads"]}'


def apex_cell(said):
    "Dice of painted apical slices, and of real ones in brackets."
    own = said['by_level'].get('apical')
    return f'{dice_cell(own["synthetic"])} ({dice_cell(own["real"])})' if own else '-'


def edge_cell(said):
    "Width of the endocardial border, painted to real: of all slices, and of apical ones; by image type."
    ratios = {}
    for row in said.get('edges', []):
        if row['level'] in ('all', 'apical'): ratios.setdefault(row['type'], []).append(short(row['ratio'], 2))
    return ' / '.join(' '.join(pair) for pair in ratios.values()) or '-'


def losses_cell(said, name): return ' '.join(short(v) for v in said.get(name, [])) or '-'


def utility_cell(said):
    "Dice on real test slices after training on painted images, in percent of that after training on real ones."
    rows = said.get('utility')
    if not rows: return 'not run'
    painted, real = ([r['dice'] for r in rows if r['trained_on'] == name] for name in ('synthetic', 'real'))
    return ' '.join(f'{100 * a / b:.1f}' for a, b in zip(painted, real))


# --- rows ---

def row_of(arm, work):
    "A row of the table."
    said, failed = read_json(work/f'{arm.slug}.json'), read_json(work/arm.slug/'failed.json')
    if not said:
        state = 'trained, not measured' if (work/arm.slug/'training.json').is_file() else 'not run'
        if failed: state = f'failed: {failed["why"]}'
        return line([arm.name, arm.what, state] + [''] * (len(COLUMNS) - 3))
    changed = '' if said['settings'] == arm.settings() else ' (measured with other settings)'
    digits = 3 if said['values'][0]['unit'] == 'rel' else 0
    return line([arm.name, arm.what + changed, length_cell(said), cell(said, 'bias', digits, True),
                 cell(said, 'within'), cell(said, 'between'), losses_cell(said, 'losses'),
                 losses_cell(said, 'losses_told'), dice_cell(said['adherence'], 'synthetic'), apex_cell(said),
                 edge_cell(said), utility_cell(said), f'{said["seconds_per_image"]:.2f}'])


def asked_rows(arm, work):
    "Rows of the table of tissue values, one per structure."
    said = read_json(work/f'{arm.slug}.json') or {}
    for r in said.get('asked', []):
        name = f'{r["type"]} {r["structure"]}'
        digits = 3 if r['unit'] == 'rel' else 1
        yield line([arm.name, said['settings']['painting']['values'], name, f'{r["slope"]:.2f}',
                    f'{r["correlation"]:.2f}',
                    f'{r["error"]:+.{digits}f}', f'{r["residual"]:.{digits}f}', short(said['icc'].get(name), 2),
                    short(said['icc_real'].get(name), 2)])


# --- one arm against another ---

def points(said, reading='dice'):
    "Dice of each test patient, in points: one column per type and structure, and their mean."
    table = pd.DataFrame(said['patients']).pivot(index='patient', columns=['type', 'structure'], values=reading)
    table = 100 * table[list(dict.fromkeys((r['type'], r['structure']) for r in said['patients']))]
    return table.assign(mean=table.mean(axis=1))


def differences(said, other, reading='dice'):
    "Difference of two arms in each structure, and in the mean of the structures at the end: with intervals."
    own, known = points(said, reading), points(other, reading)
    return [difference_interval(own[name], known[name], True, 10_000) for name in own]


def point_cell(difference, low, high): return f'{difference:+.2f} [{low:+.2f}, {high:+.2f}]'


def comparable(said, reference):
    "Whether two arms painted into the same test masks, and patients were measured in both."
    images = [[(r['structure'], r['volumes'], r['slices']) for r in of['adherence'] if r['images'] == 'real']
              for of in (said, reference)]
    return images[0] == images[1] and said['cache'] == reference['cache'] and 'patients' in said and (
        'patients' in reference)


def against_row(arm, reference, work):
    "A row of the table of differences; None where an arm has no reference."
    if reference is None: return None
    said, other = (read_json(work/f'{a.slug}.json') for a in (arm, reference))
    lacks = 'not run' if not said or not other else 'not comparable' if not comparable(said, other) else ''
    if lacks: return line([arm.name, reference.name, lacks] + [''] * (len(AGAINST) - 3))
    found, pooled = differences(said, other), differences(said, other, 'dice_pooled')
    masks = next(r['slices'] for r in said['adherence'] if r['images'] == 'real')
    return line([arm.name, reference.name, f'{masks} ({len(points(said))} patients)', point_cell(*found[-1]),
                 verdict(*found[-1][1:], MARGIN), '; '.join(point_cell(*row) for row in found[:-1]),
                 point_cell(*pooled[-1])])


AGAINST_TEXT = (
    'Differences of adherence in Dice points (arm - reference), patient by patient, with 95 % intervals (bootstrap by '
    f'patient). "within": the whole interval lies within {MARGIN} points on both sides; "beyond": all of it lies '
    'outside; "open": this many patients do not tell. Adherence is the mean over the volumes of a patient; "over '
    'pixels" counts all pixels of a patient together, which says more where few slices of each were painted. Patients '
    'are the same in both arms, and so are the first noise and the tissue values unless the arm says otherwise.')


def introduction(done, arms, cache):
    "What the columns mean."
    names, real = '-', '-'
    if done:
        names = ', '.join(f'{r["type"]} {r["structure"]}' for r in done[0]['values'])
        real = dice_cell(done[0]['adherence'], 'real')
    return (f'{len(done)} of {len(arms)} arms were run, on {platform.processor() or platform.machine()}, '
            f'{os.cpu_count()} cores. Cache: {cache.folder.name}. Values are in the order {names}; within and between '
            'are ratios, painted to real, of the standard deviations within slices and between them. Losses are those '
            'of validation slices at noise levels that are the same for all arms, by quarter from the lowest, without '
            'tissue values, then told those of the slice. Adherence is the Dice of each structure but the background '
            f'in painted test masks (real images: {real}).')


def write_table(work, cache, arms):
    "Write all that is there as Markdown."
    done = [said for said in (read_json(work/f'{arm.slug}.json') for arm in arms) if said]
    lines = ['# Arms', '', introduction(done, arms, cache), '', *head(COLUMNS), *(row_of(arm, work) for arm in arms)]
    by_name = {arm.name: arm for arm in arms}
    rows = (against_row(arm, by_name.get(arm.reference), work) for arm in arms)
    lines += ['', '## Against a reference', '', AGAINST_TEXT, '', *head(AGAINST), *filter(None, rows)]
    lines += ['', '## Asked for and painted', '', *head(ASKED), *(row for arm in arms for row in asked_rows(arm, work))]
    with atomic_path(work/'arms.md') as new: new.write_text('\n'.join(lines) + '\n')
