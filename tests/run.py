"""All tests of the repository: notebooks clean and in step with the modules, every notebook, the end-to-end tests.

Ends with `N passed, N failed, N skipped`, alone on its line, and exit code 1 where something failed.
`tests/run.py checks`, `notebooks` or `pytest` runs that part alone."""
import filecmp, os, re, shutil, subprocess, sys, tempfile, time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CORES = os.cpu_count() or 1
WORKERS = min(2, CORES)


def call(*command, cwd=ROOT, threads=1, **kw):
    "A command with this repository's package first on the path and a fixed number of threads."
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'MKL_NUM_THREADS': str(threads), 'OMP_WAIT_POLICY': 'PASSIVE', 'MPLBACKEND': 'Agg', 'PYTHONUNBUFFERED': '1',
           'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])), 'MLFLOW_DISABLE_TELEMETRY': 'true'}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, **kw)


def report(name, problems):
    "A line for a check that passed, a paragraph for one that failed."
    print(f"{'failed' if problems else 'passed'}: {name}", *problems, sep='\n    ', flush=True)
    return not problems


def checks(scratch):
    "Clean, in step, no orphan: what nbdev makes of a copy must be what lies here."
    copy = scratch/'copy'
    for folder in ('nbs', 'cmr_diffusion'):
        shutil.copytree(ROOT/folder, copy/folder, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_modidx.py'))
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/name, copy)
    notebooks = sorted((ROOT/'nbs').glob('*.ipynb'))

    done = call(BIN/'nbdev-clean', cwd=copy, capture_output=True, text=True)
    unclean = [f'nbs/{n.name} is not clean: nbdev_clean' for n in notebooks if not filecmp.cmp(n, copy/'nbs'/n.name, shallow=False)]
    yield report('notebooks are clean', unclean + ([done.stderr] if done.returncode else []))

    for module in (copy/'cmr_diffusion').glob('*.py'):
        if module.name != '__init__.py': module.unlink()  # what export does not make again has no notebook
    done = call(BIN/'nbdev-export', cwd=copy, capture_output=True, text=True)
    def modules(root): return {m.relative_to(root).as_posix(): m for m in sorted((root/'cmr_diffusion').glob('*.py')) if m.name != '_modidx.py'}
    here, made = modules(ROOT), modules(copy)
    apart = [f'{m} differs from its notebook: nbdev_export' for m in here if m in made and here[m].read_bytes() != made[m].read_bytes()]
    apart += [f'{m} is missing: nbdev_export' for m in made if m not in here]
    yield report('modules are in step with the notebooks', apart + ([done.stderr] if done.returncode else []))
    yield report('no orphan module', [f'{m} comes from no notebook: remove it' for m in here if m not in made])

    large = [f'nbs/{n.name} is {n.stat().st_size//1000} KB: smaller figures, fewer outputs' for n in notebooks if n.stat().st_size > 300_000]
    place = re.compile(r'"[^"]*(/work/|/root/|/home/\w|/tmp/\w)[^"]*"')
    strange = [f'nbs/{n.name} holds the path of a machine: {m.group(0)[:80]}' for n in notebooks if (m := place.search(n.read_text()))]
    yield report('notebooks are small and name no machine', large + strange)


def notebooks(scratch):
    "Every notebook through nbdev_test: its own process pool, `slow` and `gpu` cells left out."
    names = [n.name for n in sorted((ROOT/'nbs').glob('*.ipynb'))]
    flagged = {f: sum(len(re.findall(rf'"#\|\s*{f}\b', (ROOT/'nbs'/n).read_text())) for n in names) for f in ('slow', 'gpu')}
    print(f'\n{len(names)} notebooks; left out: ' + ', '.join(f'{k} cells marked {f}' for f, k in flagged.items()), flush=True)
    log = scratch/'nbdev_test.txt'
    with log.open('w') as stderr:
        done = call(BIN/'nbdev-test', 'nbs', '--n-workers', WORKERS, '--do-print', '--timing', threads=max(1, CORES//WORKERS), stderr=stderr)
    text = log.read_text()
    print(text, flush=True)
    failed = {n for n in names if re.search(rf'^\t{re.escape(n)}$', text.partition('nbdev Tests Failed')[2], re.M)}
    if done.returncode and not failed: print('failed: nbdev_test itself'); yield False; return
    for name in sorted(failed): print(f'failed: {name}')
    yield from [name not in failed for name in names]


def end_to_end(scratch):
    "The tests of whole commands, in pytest; skipped ones say why."
    xml = scratch/'pytest.xml'
    print(flush=True)
    done = call(sys.executable, '-m', 'pytest', 'tests', '-q', '-rs', '--durations=5', '-p', 'no:cacheprovider', f'--junitxml={xml}', threads=CORES)
    if not xml.exists(): print('failed: pytest itself'); yield False; return
    cases = list(ET.parse(xml).iter('testcase'))
    for case in cases: yield None if case.find('skipped') is not None else case.find('failure') is None and case.find('error') is None
    if done.returncode not in (0, 5) and all(c.find('failure') is None and c.find('error') is None for c in cases): print('failed: pytest itself'); yield False


def main(parts):
    start, results = time.time(), []
    with tempfile.TemporaryDirectory(prefix='cmr_tests_') as scratch:
        os.environ['TMPDIR'] = scratch  # whatever a test leaves behind goes with it
        for part in (checks, notebooks, end_to_end):
            if not parts or part.__name__ in parts or (part is end_to_end and 'pytest' in parts): results += part(Path(scratch))
    passed, failed, skipped = (sum(r is v for r in results) for v in (True, False, None))
    print(f'\n{time.time() - start:.0f} s\n{passed} passed, {failed} failed, {skipped} skipped', flush=True)
    return int(failed > 0 or passed == 0)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
