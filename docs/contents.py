"""Write nbs/README.md, the table of contents with a picture of each of the five main chapters, and llms.txt.

    python docs/contents.py        # after a notebook's first cell, one of these pictures, or a docstring has changed"""
import ast, base64, json, re
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


def module_of(path):
    "The module that a chapter makes, as `model.edm`, or None."
    found = re.search(r'#\|\s*default_exp\s+([\w.]+)', path.read_text())
    return found.group(1) if found else None


def defined(name, module):
    "The module in which a function or class of the package is defined, and the first line of what it says of itself."
    def look(path):
        if not re.search(rf'^(def|class) {name}\b', path.read_text(), re.M): return None
        node = next(n for n in ast.parse(path.read_text()).body if getattr(n, 'name', '') == name)
        module = '.'.join(path.relative_to(ROOT/'cmr_diffusion').with_suffix('').parts)
        return module, (ast.get_docstring(node) or '').split('\n')[0]
    package = ROOT/'cmr_diffusion'
    first = package/f'{module.replace(".", "/")}.py'
    paths = [first, *sorted(package.rglob('*.py'))]
    return next((found for path in paths if (found := look(path))), (module, ''))


def table_in(path, name):
    "A dictionary of constants that a module file of the package assigns to a name."
    for node in ast.parse((ROOT/'cmr_diffusion'/path).read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name: return ast.literal_eval(node.value)


def llms():
    "The text of llms.txt (llmstxt.org), in the form that nbdev gives it where a project has an index notebook."
    description = re.search('^description = (.+)$', (ROOT/'settings.ini').read_text(), re.M).group(1)
    about = re.search(r'^# .+?\n\n(.+?)\n\n', (ROOT/'README.md').read_text(), re.S).group(1)
    text = ['# cmr_diffusion', '', f'> {description}', '', ' '.join(about.split()), '', '## Pages', '']
    pages = [ROOT/name for name in ('README.md', 'RESULTS.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'nbs/README.md')]
    for page in [p for p in [*pages, *sorted((ROOT/'docs').glob('*.md'))] if p.exists()]:
        title = page.read_text().split('\n')[0].removeprefix('# ')
        text.append(f'- [{title}]({page.relative_to(ROOT).as_posix()})')
    text += ['', '## Commands', '']
    for name, module in table_in('__main__.py', 'COMMANDS').items():
        text.append(f'- `cmr_{name}`: {defined(f"cmr_{name}", module)[1]}')
    text += ['', '## Names of `import cmr_diffusion`', '']
    for name, module in table_in('__init__.py', '_CHAPTERS').items():
        text.append('- `{}` (`{}`): {}'.format(name, *defined(name, module)))
    notebooks = {path: module_of(path) for path in sorted((ROOT/'nbs').glob('*.ipynb'))}
    text += ['', '## Modules, each made from the notebook that is linked', '']
    text += [f'- [{module}](nbs/{n.name}): {first_cell(n)[1]}' for n, module in notebooks.items() if module]
    text += ['', '## Notebooks that make no module', '']
    text += [f'- [{first_cell(n)[0]}](nbs/{n.name}): {first_cell(n)[1]}' for n in notebooks if not notebooks[n]]
    return '\n'.join(text) + '\n'


if __name__ == '__main__':
    (ROOT/'docs'/'chapters').mkdir(exist_ok=True)
    for stem, (number, _) in MAIN.items():
        (ROOT/'docs'/'chapters'/f'{stem}.png').write_bytes(picture(stem, number))
    (ROOT/'docs'/'first_image.png').write_bytes(picture(*FIRST_IMAGE))
    (ROOT/'nbs'/'README.md').write_text(contents())
    (ROOT/'llms.txt').write_text(llms())
