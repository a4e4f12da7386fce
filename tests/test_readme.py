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
    indented = ''.join(f'    {line}\n' for line in code.splitlines())
    (folder/'example.py').write_text(f"if __name__ == '__main__':\n{indented}")
    call = dict(cwd=folder, env=place.env, capture_output=True, text=True, timeout=600)
    done = subprocess.run([sys.executable, 'example.py'], **call)
    assert done.returncode == 0, done.stderr
    assert 'dice' in done.stdout.lower() and (folder/'synthetic'/'synthesis.json').is_file()


def test_files_and_commands_exist():
    quoted = re.findall(r'`((?:nbs|docs|tests)/[\w./]+)`', TEXT)
    linked = re.findall(r'\]\(((?:nbs|docs)/[^)]+)\)', TEXT)
    for name in quoted + linked + ['LICENSE', 'Dockerfile_ssh']: assert (ROOT/name).exists(), name
    commands = set(re.findall(r'\bcmr_(?!diffusion)\w+', TEXT))
    installed = set(re.findall(r'^\s+(cmr_\w+)=', (ROOT/'settings.ini').read_text(), re.M))
    assert {'cmr_demo', 'cmr_train'} <= commands <= installed
    targets = set(re.findall(r'\bmake (\w+)', TEXT)) & {'setup', 'demo', 'test', 'ui', 'clean'}
    assert all(re.search(rf'^{t}:', (ROOT/'Makefile').read_text(), re.M) for t in targets)
