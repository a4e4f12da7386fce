"""Every message that a user can meet is in docs/messages.md, and a new one is provoked by a test before it is there.

The list of provoked messages comes from a run of the tests in which they are recorded (tests/recording): set
CMR_RECORD_MESSAGES to a file and put tests/recording on PYTHONPATH, run the tests, then call
`python docs/messages.py record FILE`."""
import os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'docs'))
import messages as catalogue


def test_the_page_is_in_step_with_the_code():
    page = (ROOT/'docs'/'messages.md').read_text(encoding='utf-8')
    assert page == catalogue.page(), 'docs/messages.md is out of step: python docs/messages.py'


def test_a_message_is_provoked_or_listed_with_a_reason():
    known, provoked = catalogue.names(), set(catalogue.names_in(catalogue.PROVOKED))
    waiting = set(catalogue.names_in(catalogue.WAITING))
    new = known - provoked - waiting
    assert not new, 'no test provokes these; record one that does (see this file): ' + '; '.join(sorted(new))
    gone = (provoked | waiting) - known
    assert not gone, 'these are no longer in the code; remove them from the lists: ' + '; '.join(sorted(gone))
    assert not provoked & waiting, provoked & waiting


def test_each_that_is_not_provoked_has_a_reason():
    lines = catalogue.WAITING.read_text(encoding='utf-8').splitlines()
    assert all(line.partition('\t')[2] for line in lines if line and not line.startswith('#'))


def test_what_is_met_is_recorded(tmp_path):
    script = """
from cmr_diffusion.core import CMRError, logger, type_named
from cmr_diffusion.validation import check_value
for wrong in (lambda: type_named('a b'), lambda: check_value('seed', 'x', int)):
    try: wrong()
    except CMRError: pass
"""
    path = os.pathsep.join([str(ROOT/'tests'/'recording'), str(ROOT)])
    env = os.environ | dict(PYTHONPATH=path, CMR_RECORD_MESSAGES=str(tmp_path/'met.txt'))
    subprocess.run([sys.executable, '-c', script], env=env, check=True)
    places = [line.rsplit(':', 1) for line in (tmp_path/'met.txt').read_text().splitlines()]
    found = [m.function for module, n in places for m in catalogue.messages()
             if m.module == module and m.line <= int(n) <= m.last]
    assert found == ['type_named', 'check_value']


def test_wording():
    import ast
    def worded(line, **names):
        call = ast.parse(line).body[0].value
        return catalogue.worded(call, {name: ast.parse(text).body[0].value for name, text in names.items()})
    assert worded("CMRError(f'{path}: no {kind} here')") == '…: no … here'
    assert worded("refuse(place, 'is full', 'make room')") == '…: is full; make room'
    assert worded("logger.warning('%s: %d left, 5 %%', a, b)") == '…: … left, 5 %'
