"""The text for a first run without any download: the prose of the documentation that is already on the machine.

`pydoc_data.topics` (the language reference) and the standard library's docstrings, about 245k tokens; on request
also those of installed packages. Files are read with `ast`, never imported. The text changes with the versions
behind it, so runs compare only at equal corpus digests.
"""

import ast
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from gpt2ds.corpus.prepare import PrepareOptions, Progress, prepare
from gpt2ds.corpus.shards import Corpus, open_corpus, read_manifest
from gpt2ds.errors import UserError

PACKAGES = ("torch", "numpy", "sympy", "networkx")
NAME = "embedded"
EMBEDDED_FOLDER = Path("data/embedded")

_FILTER_VERSION = "1"  # raise it whenever the rules below change, so that a corpus made by the old ones is made anew
_ORIGIN = "documentation on this machine"
_SHORTEST_DOCSTRING = 300
_FEWEST_WORDS = 12
_LEAST_LETTERS = 0.7
_SEPARATOR = "\x1e"  # ASCII's record separator; taken out of the documents themselves
_TEXT_FOLDER = ".embedded"
_PASSED_OVER = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor", "_vendored", "__pycache__"}
# Files that hold docstrings as plain string arguments, for objects made in C++.
_STRING_FILES = {"torch": ("_torch_docs.py", "_tensor_docs.py")}

_NOT_PROSE = re.compile(
    r"^\s*(?:>>>|\.\.\.(?:\s|$)|\.\. |::|:\w[^:]*:(?:\s|$)|[|+]|={3,}|-{3,}|~{3,}|\*{3,}|\w+ "
    r"*::=)"  # doctest, directive, field, table, rule, grammar
)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


def embedded_documents(packages: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(name, prose) of each document, in an order that depends on the files alone; no text comes twice.

    UserError for a package that is not one of PACKAGES or not installed.
    """
    roots = [(name, _package_folder(name)) for name in packages]
    seen: set[str] = set()
    for name, raw in _raw_documents(roots):
        text = prose(raw)
        if text and text not in seen:
            seen.add(text)
            yield name, text


def prepare_embedded(out: Path, packages: Sequence[str] = (), progress: Progress | None = None) -> Corpus:
    """The embedded text as a corpus in `out`, 5 % of it for validation; done at once if it is there from the same
    versions. About 3 s.

    An embedded corpus of other versions in `out` is replaced, any other corpus is not (UserError).
    """
    packages = tuple(name for name in PACKAGES if name in packages) + tuple(
        name for name in packages if name not in PACKAGES
    )
    origin = _origin(packages)
    out = Path(out)
    replace = _replaceable(out)
    if replace and read_manifest(out)["origin"] == origin:
        return open_corpus(out)
    folder = out / _TEXT_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        groups: dict[str, list[str]] = {}
        for name, text in embedded_documents(packages):
            groups.setdefault(name.partition("/")[0], []).append(text)
        files = []
        for group, texts in groups.items():
            file = folder.resolve() / f"{group}.txt"  # absolute, so that corpus.json records the bare name
            content = _SEPARATOR.join(texts).encode()
            file.write_bytes(content)
            # A time that follows from the content, so that `prepare` knows an interrupted or damaged corpus of the same
            # text.
            moment = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
            os.utime(file, ns=(moment, moment))
            files.append(str(file))
        options = PrepareOptions(
            name=NAME,
            separator=_SEPARATOR,
            end_of_text="text",
            validation_fraction=0.05,
            overwrite=replace,
            origin=origin,
        )
        return prepare(files, out, options=options, progress=progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replaceable(out: Path) -> bool:
    """True if `out` holds a whole embedded corpus. UserError if it holds another one, before minutes are spent on
    reading documentation."""
    try:
        name, origin = open_corpus(out).name, read_manifest(out).get("origin", {})
    except UserError:
        return False  # nothing there, or damaged: `prepare` makes it anew
    if name == NAME and str(origin.get("text", "")).startswith(_ORIGIN):
        return True
    raise UserError(f"{out} holds the corpus {name!r}, which the embedded text does not replace: choose another --out")


def prose(text: str) -> str:
    """The running prose of a docstring: whole sentences of at least 12 words and 70 % letters, unwrapped, paragraphs
    by an empty line; or ""."""
    lines = ["" if _NOT_PROSE.match(line) else line for line in text.expandtabs().splitlines()]
    kept = []
    for paragraph in _PARAGRAPH.split("\n".join(lines)):
        words = paragraph.replace(_SEPARATOR, " ").split()
        joined = " ".join(words)
        letters = sum(map(str.isalpha, joined))
        visible = sum(map(len, words))
        if (
            len(words) >= _FEWEST_WORDS
            and letters >= _LEAST_LETTERS * visible
            and joined.endswith((".", "!", "?", ":"))
        ):
            kept.append(joined)
    return "\n\n".join(kept)


def _raw_documents(roots: list[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise UserError(
            "this Python has no standard library sources on disk to take the embedded text from: prepare a "
            "text of your own"
        )
    for name, text in _topics(topics):
        yield f"topics/{name}", text
    yield from _docstrings("stdlib", library, _PASSED_OVER | {"pydoc_data"})
    for name, root in roots:
        yield from _docstrings(name, root, _PASSED_OVER)


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from sorted(ast.literal_eval(statement.value).items())


def _docstrings(group: str, root: Path, passed_over: set[str]) -> Iterator[tuple[str, str]]:
    for relative in sorted(_python_files(root, passed_over), key=lambda path: path.parts):
        tree = _parsed(root / relative)
        if tree is None:
            continue
        strings = relative.as_posix() in _STRING_FILES.get(group, ())
        for number, text in enumerate(_strings_of(tree) if strings else _docstrings_of(tree)):
            if len(text) >= _SHORTEST_DOCSTRING:
                yield f"{group}/{relative.as_posix()}#{number}", text


def _python_files(root: Path, passed_over: set[str]) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in passed_over]
        yield from (Path(parent, name).relative_to(root) for name in names if name.endswith(".py"))


def _parsed(path: Path) -> ast.Module | None:
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return None  # no long docstring: not worth the parsing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            return ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return None


def _docstrings_of(tree: ast.Module) -> Iterator[str]:
    """In the order of the file. Only statements are walked: docstrings stand nowhere else, and expressions are nine
    tenths of a tree."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        for part in ("finalbody", "orelse", "handlers", "body"):
            left += reversed(getattr(node, part, ()))


def _strings_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _package_folder(name: str) -> Path:
    if name not in PACKAGES:
        raise UserError(f"there is no embedded text of {name!r}: choose from {', '.join(PACKAGES)}")
    spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is not installed, so its documentation cannot be read: install it, or leave it out")
    return Path(next(iter(spec.submodule_search_locations)))


def _origin(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        _package_folder(name)
        versions[name] = metadata.version(name)
    return {
        "text": f"{_ORIGIN}, filter {_FILTER_VERSION}",
        "python": platform.python_version(),
        **versions,
    }
