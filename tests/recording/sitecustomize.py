"""Where the folder of this file is on PYTHONPATH and CMR_RECORD_MESSAGES names a file, every Python process, also that
of a command or a notebook, writes there which messages of the package it has met: module and line, one per line.

`python docs/messages.py record FILE` takes them into tests/messages_provoked.txt."""
import importlib.abc, importlib.machinery, os, sys

TARGET = os.environ.get('CMR_RECORD_MESSAGES')
PASSING = ('refuse', 'emit')  # which make a message of what they are given, as an error's own `__init__` does


def note(path, line):
    "Write down a place in the package."
    _, found, module = path.replace(os.sep, '/').rpartition('/cmr_diffusion/')
    if not found: return
    file = os.open(TARGET, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, f'{module}:{line}\n'.encode())
    os.close(file)


def record(core):
    "Let errors and warnings of the package be noted."
    import logging
    before = core.CMRError.__init__

    def __init__(self, *args, **kwargs):
        def passes_on(frame):
            if frame.f_code.co_name in PASSING: return True
            return frame.f_code.co_name == '__init__' and isinstance(frame.f_locals.get('self'), core.CMRError)
        frame = sys._getframe(1)
        while frame and passes_on(frame): frame = frame.f_back
        if frame: note(frame.f_code.co_filename, frame.f_lineno)
        before(self, *args, **kwargs)
    core.CMRError.__init__ = __init__

    def seen(entry):
        if entry.levelno == logging.WARNING: note(entry.pathname, entry.lineno)
        return True
    core.logger.addFilter(seen)


class Finder(importlib.abc.MetaPathFinder):
    "Finds the module that has the errors, as always, and calls `record` when it is loaded."
    def find_spec(self, name, path, target=None):
        if name != 'cmr_diffusion.core': return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            record(module)
        spec.loader.exec_module = exec_module
        return spec


if TARGET: sys.meta_path.insert(0, Finder())
