"""The notes that stand beside arguments and fields, as tables of the page of a module.

The package writes a note as a comment beside its argument (fastcore calls these docments), which `help()` cannot show.
`notes_of` finds the notes in the source of a function or class. `ArgumentNotes` is an extension of griffe, which
mkdocstrings uses: it hands them on as if the docstring had them, and puts a function with `@patch` into its class."""
import ast, io, re, tokenize

try: import griffe
except ImportError: griffe = None  # the tools of the site are not installed; `notes_of` works without them


def comments_of(code):
    "The comments of a source text: line number -> (text, whether the comment stands alone on its line)."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT: continue
        alone = not token.line[:token.start[1]].strip()
        found[token.start[0]] = (token.string.lstrip('# ').strip(), alone)
    return found


def note_between(comments, first, last):
    "The comments beside and below something that begins in line `first`, up to the line before the next thing."
    return ' '.join(comments[line][0] for line in range(first, last + 1) if line in comments)


def arguments_of(node):
    "The arguments of a function in the order of the source, each a node of `ast`."
    a = node.args
    named = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return sorted((arg for arg in named if arg), key=lambda arg: (arg.lineno, arg.col_offset))


def notes_of_function(node, comments):
    "Argument -> note, with the note on what the function returns under `return`."
    arguments, body = arguments_of(node), node.body[0].lineno - 1
    result, lines = {}, [arg.lineno for arg in arguments]
    own = [line for line in lines if lines.count(line) == 1 and line != node.lineno]
    closing = node.returns.end_lineno if node.returns else body
    for arg in arguments:
        if arg.lineno not in own: continue
        after = min([line for line in lines if line > arg.lineno] + [closing])
        note = note_between(comments, arg.lineno, max(arg.lineno, after - 1))
        if note: result[arg.arg] = note
    if node.returns and closing not in own and closing in comments: result['return'] = comments[closing][0]
    return result


def notes_of_class(node, comments):
    "Field -> note, of the fields that are declared in the body of a class."
    fields = [n for n in node.body if isinstance(n, (ast.AnnAssign, ast.Assign))]
    result = {}
    for field in fields:
        target = field.target if isinstance(field, ast.AnnAssign) else field.targets[0]
        beside, alone = comments.get(field.end_lineno, ('', True))
        if isinstance(target, ast.Name) and beside and not alone: result[target.id] = beside
    return result


def notes_of(node, comments):
    "The notes of a function or of a class."
    return (notes_of_class if isinstance(node, ast.ClassDef) else notes_of_function)(node, comments)


def patched_class(node):
    "The name of the class that fastcore's `@patch` puts a function into, or None."
    names = [ast.unparse(d).split('(')[0] for d in getattr(node, 'decorator_list', [])]
    first = arguments_of(node)[:1] if 'patch' in names else []
    return ast.unparse(first[0].annotation) if first and first[0].annotation else None


def is_setter(node):
    "Whether a method sets a property, which is an attribute to its users."
    return any(ast.unparse(d).endswith('.setter') for d in node.decorator_list)


def public_functions(code):
    "The functions and methods of a module that its users may call: (name, node), `Class.method` for methods."
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            owner = patched_class(node)
            if not node.name.startswith('_') and not (owner or '').startswith('_'):
                yield f'{owner}.{node.name}' if owner else node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not is_setter(n)]
            yield from ((f'{node.name}.{m.name}', m) for m in methods if m.name == '__init__' or m.name[0] != '_')


if griffe:
    class ArgumentNotes(griffe.Extension):
        "Gives griffe the notes beside arguments and fields."

        def __init__(self):
            super().__init__()
            self.comments = {}  # source text -> its comments

        def notes(self, node, agent):
            "The notes of a node of the module that is being read."
            if agent.code not in self.comments: self.comments = {agent.code: comments_of(agent.code)}
            return notes_of(node, self.comments[agent.code])

        def on_function_instance(self, *, node, func, agent, **kwargs):
            "A function was read: keep its notes, and move it into its class."
            if isinstance(node, ast.AST): func.extra['notes'] = self.notes(node, agent)
            owner = patched_class(node)
            if owner is None: return
            func.decorators = [d for d in func.decorators if not str(d.value).startswith('patch')]
            module = agent.current
            if owner not in module.members or func.name not in module.members: return
            del module.members[func.name]
            module.members[owner].set_member(func.name, func)

        def on_class_instance(self, *, node, cls, agent, **kwargs):
            "A class was read: keep the notes of its fields."
            cls.extra['notes'] = self.notes(node, agent)

        def on_attribute_instance(self, *, node, attr, agent, **kwargs):
            "A constant or field was read: what stands beside it is its note."
            if attr.docstring or not isinstance(node, (ast.Assign, ast.AnnAssign)): return
            if attr.parent.is_class: attr.parent.extra.setdefault('own', []).append(attr.name)
            if agent.code not in self.comments: self.comments = {agent.code: comments_of(agent.code)}
            note, alone = self.comments[agent.code].get(node.end_lineno, ('', True))
            if note and not alone and not attr.parent.is_class:
                attr.docstring = griffe.Docstring(plain(note), parent=attr, parser='google')

        def on_package(self, *, pkg, loader, **kwargs):
            "All is read: write the notes into the docstrings."
            for obj in walk(pkg):
                for told in obj.docstring.parsed if obj.docstring else []: show_all(told)
                if obj.is_function: add_arguments(obj)
                if obj.is_class: add_fields(obj)

    def walk(obj):
        "An object and all that it has, without what is imported from elsewhere."
        yield obj
        for member in list(obj.members.values()):
            if not member.is_alias: yield from walk(member)

    def sections_of(obj):
        "The sections of an object's docstring, which is made where it has none."
        if obj.docstring is None: obj.docstring = griffe.Docstring('', parent=obj, parser='google')
        return obj.docstring.parsed

    def section(sections, kind, make):
        "The first section of a kind, which is added before the section on errors where there is none."
        for found in sections:
            if found.kind is kind: return found
        new = make([])
        late = (griffe.DocstringSectionKind.raises, griffe.DocstringSectionKind.examples)
        place = next((i for i, s in enumerate(sections) if s.kind in late), len(sections))
        sections.insert(place, new)
        return new

    def no_tags(text, special='(<)'):
        "A text in which `<name>`, unless it is between backquotes, is no tag."
        parts = text.split('`')
        parts[::2] = [re.sub(special, lambda m: '&lt;' if m[0] == '<' else '\\' + m[0], part) for part in parts[::2]]
        return '`'.join(parts)

    def plain(note):
        "A note as Markdown that shows it as it stands, but for what is between backquotes."
        return no_tags(note, r'([*<\[$_])')

    def show_all(told):
        "Let a section of a docstring show `<name>`, which a browser would take for a tag."
        if told.kind is griffe.DocstringSectionKind.text: told.value = no_tags(told.value)
        elif isinstance(told.value, list):
            for row in told.value:
                if hasattr(row, 'description'): row.description = no_tags(row.description)

    def split_names(section, types):
        "One row per argument where a docstring describes several at once, as `p_mean, p_std: ...`."
        rows = []
        for row in section.value:
            for name in row.name.split(', '):
                annotation, default = types.get(name.lstrip('*'), (row.annotation, row.value))
                rows.append(type(row)(name, annotation=annotation, description=row.description, value=default))
        section.value[:] = rows

    def add_arguments(func):
        "Write the notes beside the arguments of a function into its docstring."
        notes, sections = func.extra.get('notes', {}), sections_of(func)
        types = {p.name: (p.annotation, p.default) for p in func.parameters}
        wanted = [p for p in func.parameters if p.name not in ('self', 'cls')]
        if wanted:
            kind = griffe.DocstringSectionKind.parameters
            rows = section(sections, kind, griffe.DocstringSectionParameters)
            split_names(rows, types)
            told = {row.name.lstrip('*') for row in rows.value}
            for p in wanted:
                if p.name in told: continue
                default = None if p.kind.value.startswith('variadic') else p.default
                rows.value.append(griffe.DocstringParameter(
                    p.name, annotation=p.annotation, description=plain(notes.get(p.name, '')), value=default))
        if 'return' in notes and not any(s.kind is griffe.DocstringSectionKind.returns for s in sections):
            row = griffe.DocstringReturn('', annotation=func.returns, description=plain(notes['return']))
            section(sections, griffe.DocstringSectionKind.returns, griffe.DocstringSectionReturns).value.append(row)

    def add_fields(cls):
        "Write the notes beside the fields of a class into its docstring."
        notes, sections = cls.extra.get('notes', {}), sections_of(cls)
        kind = griffe.DocstringSectionKind
        types = {n: (m.annotation, m.value) for n, m in cls.members.items() if not m.is_alias and m.is_attribute}
        for s in sections:
            if s.kind in (kind.parameters, kind.attributes): split_names(s, types)
        told = {row.name for s in sections if s.kind in (kind.parameters, kind.attributes) for row in s.value}
        rows = []
        for name, note in notes.items():
            if name in told or name.startswith('_') or name not in types: continue
            annotation, value = types[name]
            rows.append(griffe.DocstringAttribute(name, annotation=annotation, description=plain(note), value=value))
        if rows: section(sections, kind.attributes, griffe.DocstringSectionAttributes).value.extend(rows)
