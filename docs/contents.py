"""Writes nbs/README.md, the table of contents, from the first cell of every notebook, with one picture of each of the five main chapters.

    python docs/contents.py        # after a notebook's first cell, or one of these pictures, has changed"""
import base64, json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = {  # notebook -> which of its pictures (from 0) stands here, and what is in it
    '19_explore': (0, 'what a cohort looks like'),
    '21_grid.condition': (0, 'a label map as channels'),
    '30_model.sdm': (0, 'the network'),
    '41_training.learner': (0, 'a training'),
    '66_evaluation.report': (0, 'an evaluation'),
}
WINGS = {
    'The ground floor': '0', 'Cohort: from files to a table': '1', 'Grid: from a table to batches': '2', 'Model: the network and how it paints': '3',
    'Training': '4', 'Synthesis': '5', 'Evaluation': '6', 'Commands and tutorials': '78',
}


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
    text = ['# Chapters', '', 'Each chapter is a notebook, and most notebooks make a module of the package. A chapter imports only from chapters with a lower number.',
            'Begin with the five main chapters; each of them can be read on its own.', '']
    for stem, (_, alt) in MAIN.items():
        title, sentence = first_cell(ROOT/'nbs'/f'{stem}.ipynb')
        text += [f'## [{title}]({stem}.ipynb)', '', sentence, '', f'![{alt}](../docs/chapters/{stem}.png)', '']
    text += ['# All chapters', '']
    for wing, numbers in WINGS.items():
        text += [f'## {wing}', '', '| chapter | what it does |', '|---|---|']
        for path in (n for n in notebooks if n.name[0] in numbers):
            title, sentence = first_cell(path)
            text.append(f'| [`{path.stem}`]({path.name}) {title} | {sentence} |')
        text.append('')
    return '\n'.join(text)


if __name__ == '__main__':
    (ROOT/'docs'/'chapters').mkdir(exist_ok=True)
    for stem, (number, _) in MAIN.items():
        (ROOT/'docs'/'chapters'/f'{stem}.png').write_bytes(list(pictures(ROOT/'nbs'/f'{stem}.ipynb'))[number])
    (ROOT/'nbs'/'README.md').write_text(contents())
