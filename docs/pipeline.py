"""Draw docs/pipeline.svg: the way from a cohort to an evaluated synthetic cohort, with the command of each step.

    python docs/pipeline.py

The colours follow the reader's light or dark mode; the picture has its own background, so it is never unreadable."""
from html import escape
from pathlib import Path

FILE = Path(__file__).with_name('pipeline.svg')
STEPS = [  # icon, name, what it holds, the command that leads to the next one
    ('folder', 'your cohort', 'images and masks', 'cmr_check'),
    ('table', 'table', 'slices and findings', 'cmr_prepare'),
    ('cache', 'cache', 'slices on the grid', 'cmr_train'),
    ('network', 'model', 'checkpoint, MLflow run', 'cmr_sample'),
    ('hearts', 'synthetic cohort', 'DICOM with contours', 'cmr_evaluate'),
    ('page', 'evaluation', 'report.html', ''),
]
WIDTH, HEIGHT, BOX, GAP, TOP = 920, 176, 70, 88, 44  # of the picture; of a box, and between two
STYLE = '''
  .ground { fill: #ffffff; stroke: #d0d7de } .box { fill: #f3f6fb; stroke: #8aa0c0; stroke-width: 1.5 }
  .name { fill: #1f2328; font: 600 13px sans-serif } .about { fill: #59636e; font: 11.5px sans-serif }
  .command { fill: #0b57a4; font: 600 11px ui-monospace, Menlo, Consolas, monospace }
  .arrow { stroke: #59636e; stroke-width: 2; fill: none } .head { fill: #59636e }
  .ink { stroke: #40587c; stroke-width: 2; fill: none } .full { fill: #40587c }
  .wall { fill: #e69f00 } .left { fill: #56b4e9 } .right { fill: #cc79a7 } .dark { fill: #202428 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; stroke: #30363d } .box { fill: #161d29; stroke: #5c7298 }
    .name { fill: #f0f6fc } .about { fill: #a3adb8 } .command { fill: #79b8ff }
    .arrow { stroke: #a3adb8 } .head { fill: #a3adb8 } .ink { stroke: #9db4d8 } .full { fill: #9db4d8 }
  }'''


def text(x, y, words, kind):
    "A line of text about x."
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" class="{kind}">{escape(words)}</text>'


def heart(x, y, size, wall='wall', left='left', right='right'):
    "A short-axis slice: the right ventricle beside the ring of the wall; the parts are classes or greys."
    def fill(part): return f'style="fill:{part}"' if part.startswith('#') else f'class="{part}"'
    r = size / 4
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="2" class="dark"/>']
    for cx, radius, part in ((.36, 1.12, right), (.58, 1.2, wall), (.58, .74, left)):
        parts.append(f'<circle cx="{x + cx*size:g}" cy="{y + size/2:g}" r="{radius*r:g}" {fill(part)}/>')
    return ''.join(parts)


def icon(name, x, y):
    "What is drawn in a box whose centre is x, y."
    if name == 'folder':
        return f'<path class="ink" d="M{x-24} {y-14} v34 h48 v-28 h-26 l-5 -6 z"/>' + heart(x - 10, y - 3, 20)
    if name == 'table':
        lines = ''.join(f'M{x-22} {y-16+8*k} h44 ' for k in range(6)) + f'M{x-8} {y-16} v40 M{x+8} {y-16} v40'
        return f'<path class="ink" style="stroke-width:1.5" d="M{x-22} {y-16} v40 h44 v-40 {lines}"/>'
    if name == 'cache':
        drums = ''.join(f'M{x-20} {y-14+11*k} a20 6 0 0 0 40 0 ' for k in range(4))
        return f'<path class="ink" d="M{x-20} {y-14} a20 6 0 0 1 40 0 v33 M{x-20} {y-14} v33 {drums}"/>'
    if name == 'network':
        bars = zip((-26, -15, -4, 7, 18), (42, 28, 16, 28, 42))
        return ''.join(f'<rect class="full" x="{x+dx}" y="{y-h/2:g}" width="8" height="{h}" rx="2"/>' for dx, h in bars)
    if name == 'hearts':
        greys = [('#8a8a8a', '#d8d8d8', '#bdbdbd'), ('#6f6f6f', '#ececec', '#a8a8a8')]
        return heart(x - 27, y - 22, 32, *greys[1]) + heart(x - 5, y - 10, 32, *greys[0])
    bars = zip((-12, -3, 6), (10, 18, 14))
    chart = ''.join(f'<rect class="full" x="{x+dx}" y="{y+17-h}" width="6" height="{h}"/>' for dx, h in bars)
    return f'<path class="ink" d="M{x-18} {y-25} h25 l11 11 v38 h-36 z M{x-11} {y-12} h14 M{x-11} {y-6} h20"/>' + chart


def pipeline():
    "The picture as SVG."
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    about = 'role="img" aria-label="From a cohort to an evaluated synthetic cohort"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {about}>', f'<style>{STYLE}</style>',
             f'<rect class="ground" x=".5" y=".5" width="{WIDTH-1}" height="{HEIGHT-1}" rx="8"/>']
    left = (WIDTH - 6*BOX - 5*GAP) / 2
    for k, (drawn, name, about, command) in enumerate(STEPS):
        x, middle = left + k*(BOX + GAP), TOP + BOX/2
        parts += [f'<rect class="box" x="{x:g}" y="{TOP}" width="{BOX}" height="{BOX}" rx="8"/>',
                  icon(drawn, x + BOX/2, middle), text(x + BOX/2, TOP + BOX + 22, name, 'name'),
                  text(x + BOX/2, TOP + BOX + 39, about, 'about')]
        if not command: continue
        start, end, centre = x + BOX + 6, x + BOX + GAP - 6, x + BOX + GAP/2
        parts += [f'<path class="arrow" d="M{start:g} {middle:g} H{end-7:g}"/>',
                  f'<path class="head" d="M{end:g} {middle:g} l-10 -6 v12 z"/>']
        parts.append(text(centre, middle - (34 if command == 'cmr_sample' else 12), command, 'command'))
        if command == 'cmr_sample':
            parts += [heart(centre - 11, middle - 28, 22), text(centre, middle + 17, 'into', 'about'),
                      text(centre, middle + 29, 'label maps', 'about')]
    return '\n'.join([*parts, '</svg>']) + '\n'


if __name__ == '__main__': FILE.write_text(pipeline())
