"""What the benchmarks share: their parts are printed as they come, and kept in a file at the end."""
from cmr_diffusion.output import atomic_path


def print_and_keep(parts, path):
    "Print each part of a report when it is there; write all of them to a file, whole or not at all."
    kept = []
    for part in parts:
        kept.append(part)
        print(part, end='\n\n', flush=True)
    with atomic_path(path) as new: new.write_text('\n\n'.join(kept) + '\n')
    print(path)
