"""The documentation as a site: chapters, modules, commands, results, in one folder that needs no network.

    python docs/make_site.py [FOLDER]        # FOLDER: site

Needs the packages of `docs_requirements` in settings.ini; `make docs` installs them and calls this script."""
import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

from site_pages import ROOT, write_pages

DOCS = ROOT/'docs'
PYTHON_PAGES = dict(  # how mkdocstrings shows a module
    show_root_heading=False, show_root_toc_entry=False, show_root_docstring=False, members_order='source',
    heading_level=2, filters=['!^_'], show_if_no_docstring=False, docstring_section_style='table',
    separate_signature=True, show_signature_annotations=False, show_source=True, show_symbol_type_toc=True,
    docstring_style='google', group_by_category=False, docstring_options=dict(warnings=False), summary=False,
    merge_init_into_class=True,
    show_labels=False, extensions=[dict([(str(DOCS/'argument_notes.py') + ':ArgumentNotes', {})])],
)


def settings(nav, pages, site):
    "What mkdocs.yml says. Fonts, scripts and styles come from the theme alone, none from outside."
    light = dict(media='(prefers-color-scheme: light)', scheme='default', primary='indigo',
                 toggle=dict(icon='material/weather-night', name='Dark'))
    dark = dict(media='(prefers-color-scheme: dark)', scheme='slate', primary='indigo',
                toggle=dict(icon='material/weather-sunny', name='Light'))
    theme = dict(name='material', font=False, palette=[light, dark], language='en', features=[
        'navigation.tabs', 'navigation.prune', 'navigation.indexes', 'navigation.top', 'navigation.footer',
        'content.code.copy', 'search.highlight', 'toc.follow'])
    python = dict(paths=[str(ROOT)], options=PYTHON_PAGES)
    plugins = ['search', 'offline', {'mkdocstrings': dict(handlers=dict(python=python), enable_inventory=False)}]
    extensions = ['tables', 'attr_list', 'md_in_html', 'admonition', dict(toc=dict(permalink=True, toc_depth=3)),
                  {'pymdownx.highlight': dict(use_pygments=True)}, 'pymdownx.superfences', 'pymdownx.details',
                  'pymdownx.inlinehilite',
                  {'pymdownx.arithmatex': dict(generic=True)}]
    extra = dict(polyfills=['assets/iframe-worker.js'])
    checks = dict(links=dict(anchors='warn', unrecognized_links='warn', absolute_links='warn', not_found='warn'),
                  nav=dict(omitted_files='warn', not_found='warn'))
    return dict(site_name='cmr_diffusion', docs_dir=str(pages), site_dir=str(site), nav=nav, theme=theme, extra=extra,
                plugins=plugins, markdown_extensions=extensions, extra_css=['assets/style.css'], validation=checks,
                hooks=[str(DOCS/'site_maths.py')])


def make_site(site):
    "Write the site into a folder, which is replaced, and return the exit code of mkdocs."
    with tempfile.TemporaryDirectory(prefix='cmr_docs_') as scratch:
        pages, built = Path(scratch)/'pages', Path(scratch)/'site'
        nav = write_pages(pages)
        config = Path(scratch)/'mkdocs.yml'  # JSON is YAML, too
        config.write_text(json.dumps(settings(nav, pages, built), indent=1))
        words = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--config-file', str(config)]
        code = subprocess.run(words, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1', 'PYTHONPATH': str(ROOT)}).returncode
        if code: return code
        if Path(site).exists(): shutil.rmtree(site)
        shutil.copytree(built, site)
    return 0


if __name__ == '__main__':
    site = Path(sys.argv[1] if sys.argv[1:] else os.path.relpath(ROOT/'site'))
    code = make_site(site)
    if code == 0: print(f'Open {site/"index.html"} in a browser. Over SSH: python -m http.server -d {site} 8000')
    sys.exit(code)
