"""The sources of the documentation site, laid out in a folder: README, guide, chapters, and a page per module.

No notebook is executed: a chapter is shown with the outputs that are stored in it. `docs/make_site.py` builds the site.
(mkdocs-jupyter was tried: 0.9 MB per chapter, a script from outside for equations, and links that nobody checks.)"""
import ast, base64, json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

from contents import ROOT, WINGS, defined, first_cell, module_of, table_in, wing_of

HIDDEN = re.compile(r'^#\|\s*(hide|default_exp)\b', re.M)  # cells that a reader does not see
EXPORTED = re.compile(r'^#\|\s*exports?\b', re.M)  # cells that make the module
GUIDE = 'installing ssh data training painting evaluation runs python'.split()  # docs/NAME.md, in this order
FOLDED = '??? quote "Imports"\n\n'
CHAPTER = re.compile(r'(?<!\[)(`(?:nbs/)?(\d\d\w*_[\w.]+?)(?:\.ipynb)?`)')
LINK = re.compile(r'(\]\()([^)\s#]+)([^)]*\))')


def fence(text, language):
    "A block of code, within a fence that is longer than any in it."
    marks = '`' * max([3, *(len(found) + 1 for found in re.findall(r'`{3,}', text))])
    return f'{marks}{language}\n{text.rstrip()}\n{marks}\n'


def spaced(text):
    "Markdown as GitHub reads it, for a reader that wants an empty line before a list and before a table."
    out, inside = [], False
    for line in text.splitlines():
        if re.match(r'\s*(```|~~~)', line): inside = not inside
        before = out[-1] if out else ''
        begins = re.match(r'\s*([*+-]|\d+\.)\s', line) or line.startswith('|')
        goes_on = re.match(r'\s*([*+-]|\d+\.)\s', before) or before.startswith(('|', ' ', '\t'))
        if begins and before.strip() and not goes_on and not inside: out.append('')
        out.append(line)
    return '\n'.join(out) + '\n'


def with_chapters(text, page):
    "Markdown in which `30_model.sdm` or `nbs/30_model.sdm.ipynb` is a link to that chapter, but for blocks of code."
    def link(found):
        stem = found.group(2)
        if not (ROOT/'nbs'/f'{stem}.ipynb').exists(): return found.group(0)
        return f'[{found.group(1)}]({os.path.relpath(f"nbs/{stem}.md", Path(page).parent)})'
    out, inside = [], False
    for line in text.splitlines():
        if re.match(r'\s*(```|~~~)', line): inside = not inside
        out.append(line if inside or line.startswith('    ') else CHAPTER.sub(link, line))
    return '\n'.join(out) + '\n'


def output_text(output, place, name):
    "One output of a cell as Markdown; a picture goes into `place`, the folder of figures, under `name`."
    data = output.get('data', {})
    if 'image/png' in data:
        place.mkdir(exist_ok=True)
        (place/f'{name}.png').write_bytes(base64.b64decode(''.join(data['image/png'])))
        return f'![What the cell above shows]({place.name}/{name}.png){{ .output }}\n'
    if 'text/html' in data:
        html = re.sub(r'<style scoped>.*?</style>', '', ''.join(data['text/html']), flags=re.S)
        return f'<div class="output">{" ".join(html.split())}</div>\n'
    for kind in ('text/markdown', 'text/plain'):
        if kind in data: return fence(''.join(data[kind]), '{ .text .output .no-copy }')
    if output['output_type'] == 'stream': return fence(''.join(output['text']), '{ .text .output .no-copy }')
    return ''


def is_imports(code):
    "Whether a cell imports something, and does hardly anything else: it is folded."
    try: statements = ast.parse(code).body
    except SyntaxError: return False
    count = sum(isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements)
    return count > len(statements)/2


def chapter(path, place):
    "A notebook as Markdown, its pictures in the folder `place`."
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())['cells']):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(with_chapters(spaced(source), f'nbs/{path.name}'))
        if cell['cell_type'] != 'code' or HIDDEN.search(source): continue
        code = '\n'.join(line for line in source.splitlines() if not line.startswith('#|')).strip()
        kind = ' .exported' if EXPORTED.search(source) else ''
        if code and is_imports(code):
            if not parts[-1].startswith(FOLDED): parts.append(FOLDED)
            parts[-1] += indent(fence(code, '{ .python }'), '    ')
        elif code: parts.append(fence(code, f'{{ .python{kind} }}'))
        for k, output in enumerate(cell['outputs']):
            parts.append(output_text(output, place, f'{path.stem}-{number:02d}-{k}'))
    return '\n'.join(parts)


def notebooks():
    "All chapters, in order."
    return sorted((ROOT/'nbs').glob('*.ipynb'))


def guide():
    "The pages of the guide, those of docs/ in the order of `GUIDE` and then all others; the messages stand elsewhere."
    found = {page.stem: page for page in sorted((ROOT/'docs').glob('*.md')) if page.stem != 'messages'}
    return [found[name] for name in [*GUIDE, *sorted(set(found) - set(GUIDE))] if name in found]


def navigation():
    "The pages of the site in their order, as mkdocs wants them; the paths are those below the folder of the pages."
    nav = [{'Home': 'README.md'}]
    tutorials = [{first_cell(n)[0]: f'nbs/{n.stem}.md'} for n in notebooks() if n.stem[0] == '8']
    chapters, modules = ['nbs/README.md'], []
    for wing, heading in WINGS.items():
        here = [n for n in notebooks() if wing_of(n) == wing and n.stem[0] != '8']
        title = 'Commands' if wing == 'end' else heading
        chapters.append({title: [{f'{n.stem.split("_")[0]} {first_cell(n)[0]}': f'nbs/{n.stem}.md'} for n in here]})
        named = [m for n in here if (m := module_of(n))]
        modules.append({title: [{m: f'modules/{m}.md'} for m in named]})
    commands = [{'All options': 'commands.md'}]
    if (ROOT/'docs'/'messages.md').exists(): commands.append({'Messages': 'docs/messages.md'})
    nav += [{'Guide': [f'docs/{page.name}' for page in guide()]}] + ([{'Tutorials': tutorials}] if tutorials else [])
    nav += [{'Chapters': chapters}, {'Modules': [{'The main names': 'modules/README.md'}, *modules]}]
    project = [{'Changes': 'CHANGELOG.md'}, {'Contributing': 'CONTRIBUTING.md'}]
    if not guide(): nav.pop(1)
    return nav + [{'Commands': commands}, {'Results': 'RESULTS.md'}, {'Project': project}]


def linked(text, page, folder):
    "Markdown whose links lead to pages of the site; files that are no pages are copied beside them."
    def changed(found):
        before, target, after = found.groups()
        if re.match(r'[a-z]+:', target): return found.group(0)
        file = (ROOT/page).parent/target
        if target.endswith('.ipynb') and file.exists(): return before + target[:-6] + '.md' + after
        within = os.path.relpath(file, ROOT)
        if file.is_file() and file.suffix != '.md' and not within.startswith('..') and not (folder/within).exists():
            (folder/within).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder/within)
        return found.group(0)
    return LINK.sub(changed, text)


def help_page():
    "All options of all commands, as `--help` prints them."
    commands = table_in('__main__.py', 'COMMANDS')
    env = {**os.environ, 'COLUMNS': '100', 'PYTHONPATH': str(ROOT)}

    def printed(name):
        words = [sys.executable, '-m', 'cmr_diffusion', name, '--help']
        return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    with ThreadPoolExecutor(2) as pool: texts = list(pool.map(printed, commands))
    parts = ['# Commands', 'What each command prints for `--help`.\n']
    for name, text in zip(commands, texts): parts += [f'## cmr_{name}\n', fence(text, '{ .text .no-copy }')]
    return '\n'.join(parts)


def module_page(module, path):
    "The page of one module, which mkdocstrings fills, and its chapter."
    title, _ = first_cell(path)
    return (f'# {module}\n\nMade from the chapter [{title}](../nbs/{path.stem}.md).\n\n'
            f'::: cmr_diffusion.{module}\n')


def main_names():
    "The page of the names that `import cmr_diffusion` gives, each with the module that has it."
    names = {name: defined(name, module) for name, module in table_in('__init__.py', '_CHAPTERS').items()}
    lines = ['# Modules', '', 'These names can be imported from `cmr_diffusion` itself. The page of a module lists '
             'all that is public in it: arguments with their types, their defaults, and the notes that stand beside '
             'them in the source, which `help()` does not show.', '', '| name | what it is | module |', '|---|---|---|']
    for name, (module, says) in names.items():
        lines.append(f'| [`{name}`]({module}.md#cmr_diffusion.{module}.{name}) | {says} | [`{module}`]({module}.md) |')
    return '\n'.join(lines) + '\n'


def write_pages(folder):
    "Lay out all sources of the site in a folder, and return their navigation."
    def write(name, text):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(text)
    nav = navigation()
    for page in [p for p in files_of(nav) if (ROOT/p).exists()]:
        text = with_chapters(spaced(linked((ROOT/page).read_text(), page, folder)), page)
        write(page, '---\nhide: [navigation]\n---\n' + text if page == 'README.md' else text)
    for path in notebooks():
        module = module_of(path)
        text = linked(chapter(path, folder/'nbs'/'figures'), f'nbs/{path.name}', folder)
        if module: text += f'\n---\n\nAll arguments of what is public here: [`{module}`](../modules/{module}.md).\n'
        write(f'nbs/{path.stem}.md', text)
        if module: write(f'modules/{module}.md', module_page(module, path))
    write('modules/README.md', main_names())
    write('commands.md', help_page())
    for name in ('style.css', 'iframe-worker.js'): write(f'assets/{name}', (ROOT/'docs'/'site'/name).read_text())
    index = (ROOT/'llms.txt').read_text().replace('README.md', 'index.html')
    write('llms.txt', re.sub(r'\.(ipynb|md)\)', '.html)', index))
    return nav


def files_of(nav):
    "The pages that a navigation names."
    for entry in nav:
        if isinstance(entry, str): yield entry
        elif isinstance(entry, dict):
            for value in entry.values(): yield from [value] if isinstance(value, str) else files_of(value)
