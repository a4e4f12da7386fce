"""The messages that a user can meet, found in the code: `python docs/messages.py` writes docs/messages.md.

`python docs/messages.py record FILE` notes which of them the tests have provoked (tests/recording says how FILE comes).

An error is what `CMRError` and its kinds, `refuse` and `WrongValue` are given, a warning what the log is given. What
differs from case to case is written as `…`. `messages()` is also what tests/test_messages.py compares with what the
tests provoke."""
import ast, re, sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ERRORS = ('CMRError', 'BadData', 'WrongValue', 'MissingExtra', 'BatchTooLarge', 'refuse')
GAP = '…'


@dataclass(frozen=True)
class Message:
    "One message of the package."
    module: str  # such as 'grid/cache.py'
    line: int  # of the call, its first
    last: int  # and its last
    function: str  # where it stands
    kind: str  # 'error', 'warning', or 'finding': of one file of a cohort
    text: str  # with gaps

    @property
    def name(self) -> str:
        "A name that stays the same when lines move."
        return f'{self.module}: {self.text}'


def template(node, names):
    "The text of an expression, with a gap for what is not known before the program runs."
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr): return ''.join(template(part, names) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, names) + template(node.right, names)
    if isinstance(node, ast.FormattedValue): return template(node.value, {}) if is_text(node.value) else GAP
    if isinstance(node, ast.Name) and node.id in names: return template(names[node.id], {})
    return GAP


def is_text(node): return isinstance(node, ast.Constant) and isinstance(node.value, str)


def texts(function):
    "Names that a function gives to texts: name -> expression."
    return {target.id: node.value for node in ast.walk(function) if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)
            and isinstance(node.value, (ast.JoinedStr, ast.Constant, ast.BinOp))}


def called(node):
    "What a call calls: 'CMRError', 'logger.warning'."
    if isinstance(node.func, ast.Name): return node.func.id
    return f'{getattr(node.func.value, "id", "")}.{node.func.attr}' if isinstance(node.func, ast.Attribute) else ''


def worded(node, names):
    "The whole text of a message."
    parts = [template(argument, names) for argument in node.args]
    what = called(node)
    if what == 'refuse': text = f'{parts[0]}: {parts[1]}' + (f'; {parts[2]}' if len(parts) > 2 else '')
    elif what == 'WrongValue': text = f'{parts[0]} {GAP}: {parts[2]}' if len(parts) > 2 else GAP
    elif what.startswith('logger.'): text = re.sub(r'%[.\d]*[sdgfir]', GAP, parts[0]).replace('%%', '%')
    else: text = parts[0] if parts else GAP
    return re.sub(f'{GAP}[{GAP} ]*{GAP}', GAP, ' '.join(text.split()))


def messages():
    "All messages of the package, in the order of its files."
    found = []
    for path in sorted((ROOT/'cmr_diffusion').rglob('*.py')):
        if path.name == '_modidx.py': continue
        module, tree = path.relative_to(ROOT/'cmr_diffusion').as_posix(), ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or called(node) not in (*ERRORS, 'logger.warning'): continue
            around = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
            function = max(around, key=lambda f: f.lineno, default=None)
            text = worded(node, texts(function) if function else {})
            kind = {'logger.warning': 'warning', 'BadData': 'finding'}.get(called(node), 'error')
            name = function.name if function else ''
            found.append(Message(module, node.lineno, node.end_lineno, name, kind, text))
    return sorted(found, key=lambda m: (m.module, m.line))


def says_something(text): return len(re.sub(r'[^A-Za-z]', '', text)) > 4


def page():
    "docs/messages.md."
    known, parts = messages(), {}
    for m in known:
        if not says_something(m.text): continue  # the message of another function, passed on
        parts.setdefault(m.module, {}).setdefault((m.kind, m.text), m)
    count = sum(len(part) for part in parts.values())
    lines = ['# Messages', '', f'The {count} messages of the commands and of the functions that they call, as they are '
             'in the code. Search this page for a part of the line that you met that holds no name or number of '
             'yours; `…` stands for what differs from case to case. Most lines begin with the file or the option that '
             'they are about, and end with what to do. An **error** ends a command with exit code 2 and replaces no '
             'finished result; after a **warning**, the command goes on. A '
             '**finding** is about one file of a cohort: `cmr_check` lists it, and the slice is left out.', '',
             'This page is made from the code: `python docs/messages.py`.', '']
    for module, part in parts.items():
        name = module.removesuffix('.py').replace('/', '.')
        lines += [f'## {name}', '', '| | message | what to do |', '|---|---|---|']
        for (kind, text), _ in part.items():
            what, _, advice = text.replace('|', '\\|').partition('; ')
            lines.append(f'| {kind} | {what} | {advice} |')
        lines.append('')
    return '\n'.join(lines)


PROVOKED, WAITING = ROOT/'tests'/'messages_provoked.txt', ROOT/'tests'/'messages_unprovoked.txt'


def names_in(path):
    "The names in a list, without the reason behind them."
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return [line.partition('\t')[0] for line in lines if line and not line.startswith('#')]


def names():
    "The names of all messages of a wording of their own."
    return {m.name for m in messages() if says_something(m.text)}


def record(path):
    "Take what the tests have met into the list of provoked messages, and out of the other one."
    places = {tuple(line.rsplit(':', 1)) for line in Path(path).read_text().splitlines()}
    met = {(module, int(line)) for module, line in places}
    new = {m.name for m in messages() if any((m.module, n) in met for n in range(m.line, m.last + 1))}
    provoked = sorted((new | set(names_in(PROVOKED))) & names())
    PROVOKED.write_text('\n'.join(provoked) + '\n', encoding='utf-8')
    lines = WAITING.read_text(encoding='utf-8').splitlines() if WAITING.exists() else []
    kept = [line for line in lines if line.startswith('#') or line.partition('\t')[0] in names() - set(provoked)]
    WAITING.write_text('\n'.join(kept) + '\n', encoding='utf-8')
    print(f'{len(provoked)} of {len(names())} messages are provoked, {len(names_in(WAITING))} are listed with a reason')


if sys.argv[1:2] == ['record'] and __name__ == '__main__': record(sys.argv[2])
elif __name__ == '__main__': (ROOT/'docs'/'messages.md').write_text(page(), encoding='utf-8')
