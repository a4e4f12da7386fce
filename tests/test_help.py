"""What `--help` prints is read by people who do not know the code, in a terminal of 80 columns, on any Python."""
import os, re, subprocess, sys
from pathlib import Path

import pytest

from cmr_diffusion.__main__ import COMMANDS

DEBIAN = Path('/usr/bin/python3.11')  # 3.11.2, whose argparse changes metavars in parentheses


def helps(python=sys.executable, columns=80):
    "The help of all commands, printed by one process."
    script = """
import io, sys
from contextlib import redirect_stdout, suppress
from cmr_diffusion.__main__ import COMMANDS, function
for name in COMMANDS:
    sys.argv = [f'cmr_{name}', '--help']
    with suppress(SystemExit): function(name)()
    print('-' * 9)
print(sorted({'torch', 'fastai', 'pandas', 'mlflow', 'matplotlib'} & set(sys.modules)))
"""
    env = os.environ | dict(COLUMNS=str(columns), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run([python, '-c', script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    *found, heavy = done.stdout.split('-' * 9 + '\n')
    assert heavy == '[]\n', heavy
    return dict(zip(COMMANDS, found, strict=True))


@pytest.fixture(scope='module')
def here(): return helps()


def test_the_first_line_is_short_and_names_what_has_to_be_typed(here):
    first = {name: text.splitlines()[0] for name, text in here.items()}
    assert first['train'] == 'usage: cmr_train CACHE [options]'
    assert first['sample'] == 'usage: cmr_sample RUN --masks MASKS OUT [options]'
    assert all(line.endswith('[options]') and len(line) < 80 for line in first.values()), first


def test_lines_fit_and_name_no_type_of_python(here):
    for name, text in here.items():
        assert all(len(line) <= 79 for line in text.splitlines()), text
        for word in ('None', 'True', 'False', '(str', '(int', '(float', '(default: )', '(default)'):
            assert word not in text, (name, word)


def test_every_option_says_what_it_takes_and_does(here):
    for name, text in here.items():
        for option in re.split(r'^  (?=-)', text.partition('\n\n')[2], flags=re.M)[1:]:
            named = re.match(r'(?:-h, )?--[a-z-]+(?: (?:[A-Z=,]+|\{[a-z0-9_,]+\}))?(?: {2,}|\n +)\S', option)
            assert named, (name, option)


def test_an_example_is_a_right_call(here):
    "The example of a command is understood by its parser."
    import shlex
    from cmr_diffusion.__main__ import function
    from cmr_diffusion.command_line import check_limits, typed_arguments
    found = re.findall(r'^example:\n  (.*)', '\n'.join(here.values()), re.M)
    assert len(found) >= 7
    for line in found:
        command, *words = shlex.split(line)
        func = function(command.removeprefix('cmr_'))
        check_limits(func, typed_arguments(func, words))


def test_defaults_are_those_of_the_function(here):
    said = ' '.join(here['train'].split())
    for part in ('(default: 60 without --steps)', '(default: 0.0004)', '(default: small)', '(default: 16)'):
        assert part in said


def test_the_same_on_debian(here):
    version = subprocess.run([DEBIAN, '-V'], capture_output=True, text=True).stdout if DEBIAN.exists() else ''
    if not version.startswith('Python 3.11.'): pytest.skip(f'{DEBIAN} is not Python 3.11')
    if sys.version_info[:2] != (3, 11): pytest.skip('the installed packages are for another Python than 3.11')
    assert helps(DEBIAN) == here
