"""Writes nbs/README.md, the table of contents, with a picture of each of the five main chapters.

    python docs/contents.py        # after a notebook's first cell, or one of these pictures, has changed"""
import base64, json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = {  # notebook -> which of its pictures (from 0) stands here, and what is in it
    '19_explore': (0, 'what a cohort looks like'),
    '21_grid.condition': (2, 'a label map as channels'),
    '30_model.sdm': (0, 'the network'),
    '41_training.learner': (0, 'a training'),
    '66_evaluation.report': (0, 'an evaluation'),
}
FIRST_IMAGE = '37b_model.one_image', 0  # its picture is that of the README
WINGS = {  # where a module lies -> heading
    '': 'The ground floor', 'cohort': 'Cohort: from files to a table', 'grid': 'Grid: from a table to batches',
    'model': 'Model: the network and how it paints', 'training': 'Training', 'synthesis': 'Synthesis',
    'evaluation': 'Evaluation',
    'end': 'Commands and tutorials',
}


def wing_of(path):
    "The wing of a notebook, by its name: `30_model.sdm` belongs to `model`."
    number, _, module = path.stem.partition('_')
    if '.' in module: return module.split('.')[0]
    if module == 'explore': return 'cohort'
    return 'end' if number >= '69' else ''


def first_cell(path):
    "Title and sentence of a notebook."
    lines = [line.strip() for line in json.loads(path.read_text())['cells'][0]['source']]
    return lines[0].removeprefix('# '), next(line.removeprefix('> ') for line in lines if line.startswith('> '))


def pictures(path):
    "The PNG pictures among the outputs of a notebook."
    for cell in json.loads(path.read_text())['cells']:
        for output in cell.get('outputs', []):
            if 'image/png' in output.get('data', {}): yield base64.b64decode(''.join(output['data']['image/png']))


def contents():
    "The text of nbs/README.md."
    notebooks = sorted((ROOT/'nbs').glob('*.ipynb'))
    text = ['# Chapters', '', 'Each chapter is a notebook, and most notebooks make a module of the package.',
            'A chapter imports only from chapters with a lower number.',
            'Begin with the five main chapters; each of them can be read on its own.', '']
    for stem, (_, alt) in MAIN.items():
        title, sentence = first_cell(ROOT/'nbs'/f'{stem}.ipynb')
        text += [f'## [{title}]({stem}.ipynb)', '', sentence, '', f'![{alt}](../docs/chapters/{stem}.png)', '']
    text += ['# All chapters', '']
    for wing, heading in WINGS.items():
        text += [f'## {heading}', '', '| chapter | what it does |', '|---|---|']
        for path in (n for n in notebooks if wing_of(n) == wing):
            title, sentence = first_cell(path)
            text.append(f'| [`{path.stem}`]({path.name}) {title} | {sentence} |')
        text.append('')
    return '\n'.join(text)


def picture(stem, number):
    "One of the pictures of a notebook."
    return list(pictures(ROOT/'nbs'/f'{stem}.ipynb'))[number]


if __name__ == '__main__':
    (ROOT/'docs'/'chapters').mkdir(exist_ok=True)
    for stem, (number, _) in MAIN.items():
        (ROOT/'docs'/'chapters'/f'{stem}.png').write_bytes(picture(stem, number))
    (ROOT/'docs'/'first_image.png').write_bytes(picture(*FIRST_IMAGE))
    (ROOT/'nbs'/'README.md').write_text(contents())
