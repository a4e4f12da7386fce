"""The masks of some patients of a cache, to be painted by the other benchmarks."""
from dataclasses import dataclass

import pandas as pd

from cmr_diffusion.core import CMRError, Slice
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.grid.loaders import evenly


@dataclass
class SomePatients:
    "The masks of some patients of a cache, as `synthesize` takes masks."
    cache: CohortCache
    usable: pd.DataFrame  # the rows of these patients

    @property
    def fingerprint(self) -> str: return f'{self.cache.fingerprint}, {len(self.usable)} slices'
    def slice(self, position: int) -> Slice: return self.cache.slice(position)


def some_patients(cache, split, n):
    "Take the masks of `n` patients of a split, evenly spread."
    rows = cache.usable[cache.usable.split == split]
    if not len(rows): raise CMRError(f'{cache.folder}: no slice of split {split!r}; give another --split')
    names = rows.patient.unique()
    return SomePatients(cache, rows[rows.patient.isin(evenly(names, n))])
