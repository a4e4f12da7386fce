"""The documentation: every chapter and every public argument has its place in it, and the site needs no network.

The site itself is built where its tools are installed (`make docs` does that); the other tests need none of them."""
import ast, html, importlib, importlib.util, json, re, subprocess, sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'docs'))
from argument_notes import arguments_of, comments_of, notes_of, patched_class, public_functions  # noqa: E402
from contents import llms, module_of, table_in  # noqa: E402
from make_site import PYTHON_PAGES, settings  # noqa: E402
from pipeline import pipeline  # noqa: E402
from site_pages import chapter, files_of, linked, navigation, notebooks, spaced, with_chapters  # noqa: E402

TOOLS = 'mkdocs', 'material', 'mkdocstrings_handlers.python', 'griffe', 'pymdownx', 'latex2mathml'
MADE = [n for n in notebooks() if module_of(n)]


def lacking():
    "The first tool of the site that is not installed."
    def is_here(name):
        try: return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError: return False
    return next((name for name in TOOLS if not is_here(name)), None)


def source(module):
    return (ROOT/'cmr_diffusion'/f'{module.replace(".", "/")}.py').read_text()


# What needs no tools

def test_every_chapter_and_every_module_is_in_the_navigation():
    pages = list(files_of(navigation()))
    assert {f'nbs/{n.stem}.md' for n in notebooks()} <= set(pages)
    assert {f'modules/{module_of(n)}.md' for n in MADE} <= set(pages)
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT/'docs').glob('*.md')} <= set(pages)
    assert len(pages) == len(set(pages)), 'a page stands twice in the navigation'


def test_pages_that_the_repository_has_are_there():
    made = 'nbs/README.md', 'modules/', 'commands.md'
    for page in files_of(navigation()):
        if page.startswith('nbs/'): assert page == 'nbs/README.md' or (ROOT/page).with_suffix('.ipynb').exists(), page
        elif not page.startswith(made): assert (ROOT/page).exists(), page


def test_notes_are_found_beside_below_and_at_the_return():
    code = '''def f(
    x: int,  # what x is
    y=[1,  # the list
       2],  # its end
    *args,  # the rest
    one, two,
) -> int:  # the sum
    "Add."
    return x  # no note of an argument

@patch
def g(self: Net, z): return z  # no note either

class Net:
    "A network."
    width: int = 3  # channels
    deep = False
    # a remark
'''
    tree, comments = ast.parse(code), comments_of(code)
    f, g, net = tree.body
    assert notes_of(f, comments) == dict(x='what x is', y='the list its end', args='the rest', **{'return': 'the sum'})
    assert notes_of(g, comments) == {} and patched_class(g) == 'Net' and patched_class(f) is None
    assert notes_of(net, comments) == dict(width='channels')
    assert [name for name, _ in public_functions(code)] == ['f', 'Net.g']


def test_notes_are_those_that_nbdev_reads():
    from fastcore.docments import docments
    compared = 0
    for module in ('core', 'cohort.rows', 'cohort.table', 'cohort.contours', 'grid.geometry'):
        code, live = source(module), importlib.import_module(f'cmr_diffusion.{module}')
        comments = comments_of(code)
        for name, node in public_functions(code):
            if '.' in name or node.decorator_list: continue
            theirs = docments(getattr(live, name), args_kwargs=True)
            for argument, note in notes_of(node, comments).items():
                if argument != 'return' and theirs.get(argument):
                    assert ' '.join(theirs[argument].split()) == note, f'{module}.{name}: {argument}'
                    compared += 1
    assert compared > 60


def test_nearly_every_public_argument_has_a_note():
    without, count = [], 0
    for path in MADE:
        code = source(module_of(path))
        comments = comments_of(code)
        for name, node in public_functions(code):
            notes = notes_of(node, comments)
            told = [a.arg for a in arguments_of(node) if a.arg not in ('self', 'cls')]
            count += len(told)
            without += [f'{module_of(path)}: {name}({a})' for a in told if a not in notes]
    assert count > 2000 and len(without) < count/25, '\n'.join(without)


def test_hidden_cells_stay_hidden_and_outputs_are_shown(tmp_path):
    cell = lambda kind, text, **more: dict(cell_type=kind, source=text.splitlines(True), **more)
    stream = dict(output_type='stream', name='stdout', text=['```\n', 'two\n'])
    style, rows = '<style scoped>a</style>', '<table>\n\n<tr></tr></table>'
    table = dict(output_type='display_data', data={'text/html': [style + rows]})
    cells = [cell('markdown', '# Title\n> Says it.\n* a list'), cell('code', '#| hide\nsecret()', outputs=[]),
             cell('code', '#| default_exp x', outputs=[]), cell('code', 'import a\nimport b', outputs=[]),
             cell('code', '#| export\ndef f(): pass', outputs=[]), cell('code', 'f()', outputs=[stream, table])]
    (tmp_path/'99_x.ipynb').write_text(json.dumps(dict(cells=cells)))
    text = chapter(tmp_path/'99_x.ipynb', tmp_path/'figures')
    assert 'secret' not in text and '#|' not in text and 'scoped' not in text
    assert '??? quote "Imports"\n\n    ```{ .python }\n    import a' in text
    assert '```{ .python .exported }\ndef f(): pass\n```' in text
    assert '````{ .text .output .no-copy }\n```\ntwo\n````' in text and '<table> <tr></tr></table>' in text


def test_lists_get_the_empty_line_that_the_site_wants():
    assert spaced('text\n* one\n* two\n    more\n* three') == 'text\n\n* one\n* two\n    more\n* three\n'
    assert spaced('a\n| b |\n|---|') == 'a\n\n| b |\n|---|\n'
    assert spaced('```\na\n* b\n```') == '```\na\n* b\n```\n'


def test_names_of_chapters_are_links():
    said = 'see `00_core` and `nbs/00_core.ipynb`, [`00_core`](x), `00_nothing`\n\n    `00_core`'
    text = with_chapters(said, 'docs/x.md')
    one, two = '[`00_core`](../nbs/00_core.md)', '[`nbs/00_core.ipynb`](../nbs/00_core.md)'
    assert text == f'see {one} and {two}, [`00_core`](x), `00_nothing`\n\n    `00_core`\n'
    assert with_chapters('```\n`00_core`\n```', 'README.md') == '```\n`00_core`\n```\n'
    assert with_chapters('`00_core`', 'nbs/01_figures.ipynb') == '[`00_core`](00_core.md)\n'


def test_links_to_notebooks_lead_to_pages_and_other_files_come_along(tmp_path):
    text = linked('[a](nbs/00_core.ipynb), [b](LICENSE), [c](https://example.org/x.ipynb)', 'README.md', tmp_path)
    assert text == '[a](nbs/00_core.md), [b](LICENSE), [c](https://example.org/x.ipynb)'
    assert (tmp_path/'LICENSE').exists()


def test_settings_name_nothing_outside():
    said = json.dumps(settings(navigation(), 'pages', 'site'))
    assert 'http' not in said and '"font": false' in said
    assert PYTHON_PAGES['extensions'][0].keys() == {str(ROOT/'docs'/'argument_notes.py') + ':ArgumentNotes'}


def test_llms_txt_links_to_files_that_exist():
    links = re.findall(r'\]\(([^)]+)\)', llms())
    assert len(links) > 100
    for link in links: assert (ROOT/link).exists(), link


def test_the_drawing_of_the_pipeline_is_in_step_and_names_commands():
    drawn = pipeline()
    assert (ROOT/'docs'/'pipeline.svg').read_text() == drawn, 'python docs/pipeline.py'
    named = re.findall(r'>cmr_(\w+)<', drawn)
    assert len(named) == 5 and set(named) <= set(table_in('__main__.py', 'COMMANDS'))
    ET.fromstring(drawn)


def test_citation_and_changes_are_of_this_version():
    from cmr_diffusion import __version__
    assert f'\nversion: {__version__}\n' in (ROOT/'CITATION.cff').read_text()
    assert f'\n## {__version__}' in (ROOT/'CHANGELOG.md').read_text()


def test_contributing_names_what_there_is():
    "Every chapter, file and name of the package that the page sends a contributor to."
    text = (ROOT/'CONTRIBUTING.md').read_text()
    code = ''.join(p.read_text() for p in (ROOT/'cmr_diffusion').rglob('*.py'))
    for name in re.findall(r'`(\d\d[a-z]*_[\w.]+)`', text):
        if name != '14d_cohort.mine': assert (ROOT/'nbs'/f'{name}.ipynb').exists() or name in ('80_', '89_'), name
    for name in re.findall(r'`((?:tests|docs|nbs)/[\w./]+\.\w+)`', text): assert (ROOT/name).exists(), name
    for name in ('LAYOUTS', 'SAMPLERS', 'REMEMBERED', 'COMMANDS', 'ABOUT', 'Sampler', 'questions'):
        assert f'`{name}`' in text and re.search(rf'^ *{name}\b.*=', code, re.M), name
    for name in ('slice_row', 'sdm_learner', 'run_callbacks', 'evaluation_parts', 'seeded', 'layout', 'command'):
        assert name in text and f'def {name}(' in code, name


def test_the_examples_in_python_run(tmp_path):
    "One after the other, as the page says; then the layout reads a folder, and the names that were made are used."
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT/'docs'/'python.md').read_text(), re.M | re.S)
    assert len(blocks) == 6
    more = """
import nibabel
import numpy as np
from pathlib import Path
from cmr_diffusion.toy import toy_slice
Path('flat').mkdir()
for patient in range(3):
    drawn = toy_slice('T1', patient)
    for name, pixels in (('', drawn.pixels), ('_gt', drawn.labels)):
        volume = nibabel.Nifti1Image(pixels.T[..., None].astype('float32'), np.diag([1.5, 1.5, 8, 1]))
        nibabel.save(volume, f'flat/p{patient}_T1_Mid{name}.nii.gz')
read = read_cohort('flat', layout='flat')
assert list(read.patient) == ['p0', 'p1', 'p2'] and read.usable.all(), read.reason
assert len(keep.losses) == 5 and milliseconds.shape == train.images.shape and 200 < milliseconds.mean() < 3000
assert np.isfinite(images[0].pixels).all()
"""
    (tmp_path/'example.py').write_text('\n'.join([*blocks, more]))
    done = subprocess.run([sys.executable, 'example.py'], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# The site

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built into a temporary folder."
    if name := lacking(): pytest.skip(f'{name} is not installed: make docs installs it')
    place = tmp_path_factory.mktemp('docs')/'site'
    done = subprocess.run([sys.executable, ROOT/'docs'/'make_site.py', place], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'http.server' in done.stdout
    return place


def test_the_site_asks_nothing_of_the_network(site):
    loads = re.compile(r'''<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^"'> ]+''')
    for page in site.rglob('*.html'):
        found = [f for f in loads.findall(page.read_text()) if 'rel="canonical"' not in f]
        assert not found, f'{page.relative_to(site)}: {found[:3]}'
    for sheet in site.rglob('*.css'):
        assert not re.search(r'''(url\(|@import\s)["']?(https?:)?//''', sheet.read_text()), sheet


def test_every_public_argument_is_on_the_page_of_its_module(site):
    missing, count = [], 0
    for path in MADE:
        module = module_of(path)
        page = (site/'modules'/f'{module}.html').read_text()
        for name, node in public_functions(source(module)):
            if name.endswith('__init__'): name = name.removesuffix('.__init__')
            own = page.partition(f'id="cmr_diffusion.{module}.{name}"')[2].partition('>')[2]
            own = re.split('<h[2-6] id="', own)[0]
            for argument in arguments_of(node):
                if argument.arg in ('self', 'cls'): continue
                count += 1
                if not re.search(rf'<code>\*{{0,2}}{argument.arg}</code>', own):
                    missing.append(f'{module}.{name}: {argument.arg}')
    assert count > 2000 and not missing, '\n'.join(missing)


def test_a_note_stands_beside_its_argument(site):
    page = (site/'modules'/'model.samplers.html').read_text()
    row = re.search(r'<code>sigmas</code>.*?</tr>', page, re.S).group(0)
    assert 'falling, the last 0' in html.unescape(row)


def test_equations_are_mathml(site):
    page = (site/'nbs'/'33_model.edm.html').read_text()
    assert page.count('<math') > 20 and 'class="arithmatex"' not in page
    for path in site.rglob('*.html'): assert 'class="arithmatex"' not in path.read_text(), path


def test_search_works_from_the_disk(site):
    assert (site/'search'/'search_index.js').read_text().startswith('var __index = ')
    assert 'assets/iframe-worker.js' in (site/'index.html').read_text()


def test_the_index_for_language_models_is_at_the_root(site):
    for link in re.findall(r'\]\(([^)]+)\)', (site/'llms.txt').read_text()): assert (site/link).exists(), link
