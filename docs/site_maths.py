"""A hook of mkdocs: equations become MathML when the site is built, so that browsers show them without a script."""
import html, re

EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
WORDS = {  # what latex2mathml does not know, or sets too tightly -> what means the same to it
    r'\\[lr]Vert': r'\\|', r'\\[td]frac': r'\\frac', r'\\varnothing': r'\\emptyset',
    r'\\(?:big|Big|bigg|Bigg)(?=[()])': '', r'\\mathbb E': r'\\mathbb{E}', r'\\mathcal N': r'\\mathcal{N}',
    r'(?<=[\w}])\s*(?=\\(?:sin|cos|ln|log))': r'\\,',
}


def mathml(tex, display):
    "One equation of LaTeX as MathML."
    from latex2mathml.converter import convert
    for pattern, word in WORDS.items(): tex = re.sub(pattern + r'(?![A-Za-z])', word, tex)
    return convert(tex, display='block' if display else 'inline')


def on_page_content(content, **kwargs):
    "Replace the equations that pymdownx.arithmatex has marked."
    def replaced(found):
        tex = html.unescape(found.group(2)).strip()
        return mathml(tex[2:-2].strip(), tex.startswith('\\['))
    return EQUATION.sub(replaced, content)
