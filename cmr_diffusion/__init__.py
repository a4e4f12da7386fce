"""Synthetic short-axis cardiac MR with a semantic diffusion model."""
__version__ = "0.1.0"

# The main way through the package, by name. A chapter is imported when a name of it is first used, so that
# `import cmr_diffusion` does not wait for PyTorch.
_CHAPTERS = {
    'CMRError': 'core', 'Slice': 'core', 'make_phantom': 'phantom', 'read_cohort': 'cohort', 'Geometry': 'transform',
    'CohortCache': 'data', 'prepare': 'data', 'SDM': 'sdm', 'load_checkpoint': 'checkpoint', 'TrainConfig': 'training', 'train': 'training',
    'synthesize': 'synthesis', 'evaluate': 'report',
}
__all__ = list(_CHAPTERS)


def __getattr__(name):
    if name not in _CHAPTERS: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_CHAPTERS[name]}'), name)


def __dir__(): return sorted([*globals(), *__all__])
