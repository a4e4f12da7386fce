"""What README.md says works: its example runs, its files exist, its commands are installed."""
import re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT/'README.md').read_text()


def test_the_example_runs(place):
    (code,) = re.findall(r'^```python\n(.*?)^```', TEXT, re.M | re.S)
    assert len(code.splitlines()) == 5
    folder = place.folder/'readme'
    folder.mkdir()
    # as a file: loader processes of some systems start by importing it again
    (folder/'example.py').write_text("if __name__ == '__main__':\n" + ''.join(f'    {line}\n' for line in code.splitlines()))
    done = subprocess.run([sys.executable, 'example.py'], cwd=folder, env=place.env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert 'dice' in done.stdout.lower() and (folder/'synthetic'/'synthesis.json').is_file()


def test_files_and_commands_exist():
    for name in re.findall(r'`((?:nbs|docs|tests)/[\w./]+)`', TEXT) + re.findall(r'\]\((docs/[^)]+)\)', TEXT) + ['LICENSE', 'Dockerfile_ssh']:
        assert (ROOT/name).exists(), name
    commands = set(re.findall(r'\bcmr_(?!diffusion)\w+', TEXT))
    assert commands >= {'cmr_demo', 'cmr_train'} and commands <= set(re.findall(r'^\s+(cmr_\w+)=', (ROOT/'settings.ini').read_text(), re.M))
    targets = set(re.findall(r'\bmake (\w+)', TEXT)) & {'setup', 'demo', 'test', 'ui', 'clean'}
    assert all(re.search(rf'^{t}:', (ROOT/'Makefile').read_text(), re.M) for t in targets)
