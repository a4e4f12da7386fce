"""Work that lasts shows how far it is: a bar on a terminal, plain lines in a log, and nothing where nobody looks."""
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

WORK = """
import time
from cmr_diffusion.output import progress
for _ in progress(range(40), description='painting', unit='image', every=.2, delay=.1): time.sleep(.02)
with progress(total=2, description='training', unit='%', every=None, delay=0) as bar:
    for step in (1, 2):
        bar.update()
        bar.set_postfix_str('loss 0.2')
        bar.say(f'step {step}')
for _ in progress(range(3), description='quick', unit='image'): pass
"""
LOGGED = """
import sys, time
from cmr_diffusion.command_line import command
from cmr_diffusion.core import logger
from cmr_diffusion.output import progress
@command
def cmr_work():
    "Work."
    for n in progress(range(30), description='painting', unit='image', delay=0):
        time.sleep(.02)
        if n == 15: logger.warning('the server is away')
sys.exit(cmr_work())
"""


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'RANK', 'TQDM_DISABLE')}
    return kept | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path))) | more


def program(folder, script):
    "The command line that runs a script."
    file = Path(folder)/'cmr_work.py'
    file.write_text(script)
    return [sys.executable, str(file)]


def piped(command, **more):
    "What a command writes into a pipe, as into the log of a batch system."
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=120)
    assert done.returncode == 0 and not done.stdout, (done.stdout, done.stderr)
    return done.stderr


def on_terminal(command):
    "What it writes onto a terminal of 40 rows and 100 columns."
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('4H', 40, 100, 0, 0))
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment())
    os.close(its)
    parts = []
    try:
        while part := os.read(ours, 4096): parts.append(part)
    except OSError: pass  # Linux: the other end is closed
    os.close(ours)
    assert process.wait(60) == 0
    return b''.join(parts).decode().replace('\r\n', '\n')


def test_a_log_has_plain_lines(tmp_path):
    lines = piped(program(tmp_path, WORK)).splitlines()
    number = r'[\d.]+'
    assert re.fullmatch(rf'painting: \d+ of 40 images \(\d+ %\), {number} images/s, 00:0\d left', lines[0]), lines
    assert re.fullmatch(rf'painting: 40 of 40 images in 00:0\d, {number} images/s', lines[-3]), lines
    assert lines[-2:] == ['training: step 1', 'training: step 2'] and 4 <= len(lines) <= 9, lines
    assert not any('\r' in line or '\x1b' in line for line in lines)


def test_a_terminal_has_a_bar(tmp_path):
    seen = on_terminal(program(tmp_path, WORK))
    assert seen.count('\r') > 5 and '|' in seen and ' images/s' in seen and 'loss 0.2' in seen, seen
    assert 'step 1' not in seen and 'quick' not in seen and 'left' not in seen, seen
    assert seen.rpartition('\r')[2].strip() == '', seen  # the bars have gone


@pytest.mark.parametrize('more', (dict(IN_TEST='1'), dict(RANK='1', WORLD_SIZE='2'), dict(TQDM_DISABLE='1')), ids=str)
def test_silence(tmp_path, more):
    assert piped(program(tmp_path, WORK), **more) == ''


def test_what_is_logged_stands_above_the_bar(tmp_path):
    seen = on_terminal(program(tmp_path, LOGGED))
    (line,) = [line for line in seen.split('\n') if 'away' in line]
    assert line.rpartition('\r')[2] == 'the server is away', seen
    assert 'the server is away\n' in piped(program(tmp_path, LOGGED))


def test_no_chapter_has_a_bar_of_its_own():
    "Bars are made in one place, so that they behave alike."
    import cmr_diffusion
    for module in Path(cmr_diffusion.__file__).parent.rglob('*.py'):
        if module.name in ('output.py', '_modidx.py'): continue
        text = module.read_text()
        assert not re.search(r'^\s*(from|import) (tqdm|fastprogress|rich)\b', text, re.M), module
