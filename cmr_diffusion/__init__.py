"""Synthetic short-axis cardiac MR with a semantic diffusion model."""
__version__ = "0.1.0"

# The main way through the package, by name. A chapter is imported when a name of it is first used, so that
# `import cmr_diffusion` does not wait for PyTorch.
_CHAPTERS = {
    'CMRError': 'core', 'Slice': 'core', 'make_phantom': 'cohort.phantom', 'read_cohort': 'cohort.table',
    'Geometry': 'grid.geometry', 'CohortCache': 'grid.cache', 'prepare': 'grid.cache', 'SDM': 'model.published',
    'load_checkpoint': 'model.checkpoint', 'paint': 'model.painting', 'paint_label_map': 'model.one_image',
    'toy_label_map': 'toy', 'TrainConfig': 'training.learner',
    'sdm_learner': 'training.learner', 'train': 'training.learner', 'synthesize': 'synthesis.cohort',
    'evaluate': 'evaluation.report', 'compare_runs': 'evaluation.compare',
}
__all__ = list(_CHAPTERS)


def __getattr__(name):
    if name not in _CHAPTERS: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_CHAPTERS[name]}'), name)


def __dir__(): return sorted([*globals(), *__all__])
