"""The commands as one program, which torchrun can start in several processes: `python -m cmr_diffusion train CACHE`.

Written by hand: in a notebook `__name__ == '__main__'` is true, too, so none can make this module."""
import contextlib, io, logging, os, sys, time, warnings
from importlib import import_module

from . import __version__
from .interrupts import catch_early
from .processes import is_lost, rank, world_size

COMMANDS = {  # name -> module of its function, `cmr_<name>`; it says what the command does
    'phantom': 'cli', 'check': 'cli', 'prepare': 'cli', 'train': 'cli', 'sample': 'cli', 'evaluate': 'cli',
    'demo': 'cli', 'sync': 'run_commands', 'ui': 'run_commands', 'compare': 'run_commands'}
SEVERAL = ('train', 'sample')  # these can be started in several processes
PATIENCE = 10  # seconds in which torchrun ends this process where the main one, which says why, has failed


def help_text():
    "What `--help` prints."
    lines = ['usage: python -m cmr_diffusion COMMAND ...']
    lines += ['       torchrun --nproc-per-node N -m cmr_diffusion COMMAND ...', '']
    for name in COMMANDS: lines.append(f'  {name:<10}{(function(name).__doc__ or "").partition("Example:")[0].strip()}')
    several = ' and '.join(SEVERAL)
    return '\n'.join([*lines, '', f'COMMAND --help lists the options of a command. torchrun is for {several}.'])


def function(name):
    "The function of a command."
    return getattr(import_module(f'cmr_diffusion.{COMMANDS[name]}'), f'cmr_{name}')


def wrong_call(message):
    "Say what is wrong, and return the exit code of a wrong call."
    print(f'cmr_diffusion: {message}; see python -m cmr_diffusion --help', file=sys.stderr)
    return 2


def call(name, words):
    "Call a command with the words that were typed after its name, and return its exit code."
    sys.argv = [f'cmr_{name}', *words]
    catch_early()
    try: return function(name)()
    except SystemExit as e: return e.code


def quiet_call(name, words, number):
    "The same in a process that does not speak for all; only an error that the main process does not have is said."
    logging.basicConfig(handlers=[logging.NullHandler()])
    warnings.simplefilter('ignore')
    os.environ['TQDM_DISABLE'] = '1'
    with open(os.devnull, 'w') as nothing, contextlib.redirect_stdout(nothing):
        with contextlib.redirect_stderr(io.StringIO()) as said: code = call(name, words)
    if code and code < 128:  # more: a signal, which all have heard
        time.sleep(PATIENCE)
        print(f'process {number}: {said.getvalue().strip()}', file=sys.stderr)
    return code


def main():
    "Run what was typed, and return its exit code."
    number = rank()
    name, *words = sys.argv[1:] or ['--help']
    if name in ('--help', '-h', '--version'):
        if number == 0: print(f'cmr_diffusion {__version__}' if name == '--version' else help_text())
        return 0
    name = name.removeprefix('cmr_')
    if name not in COMMANDS: return wrong_call(f'{name!r} is no command') if number == 0 else 2
    if world_size() == 1: return call(name, words)
    if name not in SEVERAL: return wrong_call(f'{name} runs in one process, without torchrun') if number == 0 else 2
    try: return quiet_call(name, words, number) if number else call(name, words)
    except Exception as e:
        if number: time.sleep(PATIENCE)
        elif is_lost(e):
            print(f'cmr_{name}: ended, since another process has', file=sys.stderr)
            return 1
        raise


if __name__ == '__main__': sys.exit(main())
