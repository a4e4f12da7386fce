"""Ctrl-C ends a command in one line that says what was kept and how to go on; a second one ends it at once."""
import os, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest

from conftest import Workplace


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a small cache."
    from cmr_diffusion import Geometry, prepare, read_cohort
    from cmr_diffusion.toy import toy_cohort
    place = Workplace(tmp_path_factory.mktemp('interrupts').resolve())
    toy_cohort(place.folder/'cohort')
    prepare(read_cohort(place.folder/'cohort', 'csv'), place.folder/'cache', Geometry(32, (3., 4.), 'heart'), workers=0)
    return place


def interrupt(place, words, moment, again=None):
    """Press Ctrl-C as a terminal does, for all processes of a command: after so many seconds, or when it says a text.

    Return the exit code and the lines that come after it."""
    command = [Path(sys.executable).with_name(words[0]), *map(str, words[1:])]
    def listening(): signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    process = subprocess.Popen(command, cwd=place.folder, env=place.env | dict(PYTHONUNBUFFERED='1'), text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=listening)
    lines, said = [], threading.Event()
    def read():
        for line in process.stderr:
            lines.append(line.rstrip('\n'))
            if isinstance(moment, str) and moment in line: said.set()
    reader = threading.Thread(target=read)
    reader.start()
    if isinstance(moment, str): assert said.wait(240), lines
    else: time.sleep(moment)
    for wait in (0, *([again] if again is not None else [])):
        time.sleep(wait)
        if process.poll() is None: os.killpg(process.pid, signal.SIGINT)
    try: code = process.wait(240)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
        reader.join()
    assert not any('Traceback' in line or 'Exception ignored' in line for line in lines), '\n'.join(lines)
    return code, lines


def loaded(seconds): return seconds * max(1., os.getloadavg()[0] / (os.cpu_count() or 1))  # on a busy machine


WORDS = {
    'cmr_phantom': ['new', '--patients', 300], 'cmr_check': ['cohort', '--layout', 'csv', '--out', 'new'],
    'cmr_prepare': ['cohort', 'new', '--layout', 'csv', '--size', 32, '--spacing', '3-4'], 'cmr_sync': [],
    'cmr_sample': ['no_run', '--masks', 'cache', 'new'], 'cmr_train': ['cache', '--preset', 'tiny', '--device', 'cpu'],
    'cmr_evaluate': ['cache', 'cohort'], 'cmr_demo': ['--out', 'new', '--minutes', 1]}


@pytest.mark.parametrize('command', WORDS)
def test_while_it_starts(place, command):
    code, lines = interrupt(place, [command, *WORDS[command]], loaded(.3))
    assert code in (130, -signal.SIGINT, 0, 2), lines  # a short one may have ended by then
    if code == 130: assert len(lines) == 1 and lines[0].startswith(f'{command}: stopped'), lines
    assert not [f for f in place.folder.iterdir() if f.name == 'new' or f.name.startswith('.')]


def test_nothing_half_made_is_left_of_a_phantom(place):
    code, lines = interrupt(place, ['cmr_phantom', *WORDS['cmr_phantom']], loaded(2.))
    assert code == 130 and lines[-1].endswith('nothing was written; the same command begins again'), lines
    assert not [f for f in place.folder.iterdir() if f.name == 'new' or f.name.startswith('.')]


@pytest.mark.parametrize('again', (None, 1.5))
def test_a_training_names_the_step_and_the_line_that_goes_on(place, again):
    words = ['cmr_train', *WORDS['cmr_train'], '--steps', 100_000, '--checks', 2, '--batch-size', 4]
    code, lines = interrupt(place, words, 'look at it', again)
    early = again is not None and lines[-1].endswith('no further step is kept; the same command begins again')
    assert code == 130 and (early or ' go on with: cmr_train ' in lines[-1] and ' --resume ' in lines[-1]), lines
    assert early or 'stopped after step' in lines[-1] or 'of the training is kept' in lines[-1], lines
