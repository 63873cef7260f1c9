"""Rewrites preprocessed Metal Shading Language into clang's "C++ for OpenCL".

The two languages share real address spaces; what differs is rewritten token by token, line by line, so that the
compiler's messages and debug information still name the shader's own lines:

- threadgroup variables become references into the runtime's threadgroup memory;
- function constants become variables of the runtime, set by each launch;
- explicit instantiations with attributes are recorded and dropped, kernels become plain functions, and an entry point
  is generated for the one kernel that is compiled;
- member functions get or lose the `thread` qualifier where the languages disagree on the object's address space;
- `float4(...)`, `half(x)` and `static_cast` become calls of the shim's functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

TOKEN = re.compile(
    r"""(?P<marker>^\#[^\n]*\n)|(?P<space>\s+)|(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
    r"""|(?P<word>[A-Za-z_]\w*)|(?P<number>\.?\d(?:[\w.]|(?<=[eEpP])[+-])*)|(?P<sign>::|->|[\s\S])""",
    re.MULTILINE,
)
# Explicit instantiations of kernels, up to the end.
INSTANCES = re.compile(
    r"""\n(namespace\s+[\w:]+\s*\{)?(\s*\btemplate\s*\[\[host_name\("[^"]*"\)\]\]\s*\[\[kernel\]\]"""
    r"""\s*decltype\([^;{}\#]*;)+\s*(?(1)\}\s*)\Z"""
)
REAL = re.compile(r"(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+|0[xX][\dA-Fa-f.]+[pP][+-]?\d+")
FP_PRAGMA = re.compile(r"#\s*pragma\s+METAL\s+fp\b")
LATE_PRAGMA = "this pragma does not hold for what stands before it: program-scope ones stand before any include"
MARKER = re.compile(r'#(?:line)? (\d+) "((?:\\.|[^"\\])*)"')

# The codes of __softmetal_builtin in runtime.cpp.
BUILTINS = {
    "thread_position_in_grid": 0,
    "threadgroup_position_in_grid": 1,
    "thread_position_in_threadgroup": 2,
    "thread_index_in_threadgroup": 3,
    "thread_index_in_simdgroup": 4,
    "simdgroup_index_in_threadgroup": 5,
    "threads_per_threadgroup": 6,
    "threadgroups_per_grid": 7,
    "threads_per_simdgroup": 8,
    "thread_execution_width": 8,
    "simdgroups_per_threadgroup": 9,
    "threads_per_grid": 10,
    "dispatch_threads_per_threadgroup": 11,
    "quadgroup_index_in_threadgroup": 12,
    "thread_index_in_quadgroup": 13,
    "quadgroups_per_threadgroup": 14,
    "dispatch_simdgroups_per_threadgroup": 15,
}
# Names that OpenCL takes for itself. The shim defines MSL's atomic types under the new name.
RENAMED = {
    *("local", "global", "generic", "pipe", "read_only", "write_only", "read_write", "event_t"),
    *("atomic_int", "atomic_uint", "atomic_float", "atomic_bool", "atomic_ulong"),
}
# What MSL does not have and clang would accept.
FORBIDDEN = {
    *("double", "goto", "virtual", "try", "catch", "throw", "new", "delete"),
    *("dynamic_cast", "typeid", "thread_local"),
}
SCALARS = ("char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "float", "half", "bfloat")
VECTORS = {f"{scalar}{size}" for scalar in SCALARS for size in (2, 3, 4)}
OPENING = {"(": ")", "[": "]", "{": "}"}
CLOSING = set(OPENING.values())
ALWAYS_INLINE = "inline __attribute__((__always_inline__))"
# Function constants and constants derived from them; runtime.cpp has as many.
MAX_CONSTANTS = 256
MAX_THREADS = "max_total_threads_per_threadgroup"
# How far the rewriter looks beyond the source: a loop that looks further does not find what it looks for.
MARGIN = 64


class RewriteError(Exception):
    """The source is not the MSL that the device runs; the message starts with file and line."""


@dataclass
class Token:
    text: str
    kind: str
    file: str = ""
    line: int = 0
    shim: bool = False
    position: int = 0  # among all tokens
    spaced: bool = False  # something stands between this token and the one before
    output: str | None = None  # replaces text


@dataclass
class Parameter:
    """A kernel's argument: kind is "buffer", "threadgroup" or "position"; index is the slot or the position's code."""

    kind: str
    index: int
    is_const: bool = False
    condition: str = ""  # the function constant that the argument depends on


@dataclass
class Constant:
    """A program-scope constant whose value a launch sets or computes: a function constant, or one derived from some."""

    name: str
    kind: str  # its type
    slot: int  # in the runtime
    qualified: str = ""  # the name with its namespaces
    index: int = -1  # -1: derived
    inputs: list[int] = field(default_factory=list)  # slots that a derived one is computed from
    is_optional: bool = False  # a derived one asks whether its inputs are defined
    derive: str = ""  # the function that computes it


@dataclass
class Kernel:
    """A function marked as kernel and the expression that names one instance of it."""

    name: str
    instance: str
    parameters: list[Parameter]
    max_threads: str = ""  # per threadgroup: an expression, or nothing where the shader does not say


@dataclass
class Program:
    text: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    functions: dict[str, Kernel] = field(default_factory=dict)  # those that kernels are instances of
    takes_functions: bool = False  # templates do, as arguments


def split_instances(text: str) -> tuple[str, str]:
    """A source in two: all before the explicit instantiations that it ends with, in one namespace or in none; these."""
    found = INSTANCES.search(text)
    return (text[: found.start()], found.group()) if found else (text, "")


def add_instances(program: Program, instances: str, shim_directory: str) -> Program:
    """The program with preprocessed explicit instantiations behind it.

    Raises RewriteError, also where the program has to be rewritten with them.
    """
    if program.takes_functions:
        raise RewriteError("the instantiations decide which functions become types")
    rewriter = _Rewriter(instances, shim_directory)
    rewriter.functions = program.functions
    added = rewriter.run().kernels
    if added.keys() & program.kernels.keys():
        raise RewriteError(f"two kernels have the names {added.keys() & program.kernels.keys()}")
    return replace(program, kernels=program.kernels | added)


def rewrite(preprocessed: str, shim_directory: str, unroll: bool = False) -> Program:
    """Returns the program for clang. Raises RewriteError.

    unroll: keep what the shader says of unrolling loops; the software device only compiles longer for it.
    """
    return _Rewriter(preprocessed, shim_directory, unroll).run()


def entry_point(program: Program, name: str, symbol: str) -> str:
    """The C functions through which the runtime calls one kernel, computes its constants and asks for its limit.

    A buffer's address is asked for where the compiled kernel uses it: clang drops the other calls.
    """
    kernel = program.kernels[name]
    derived = "".join(f"{constant.derive}(); " for constant in program.constants if constant.derive)
    arguments = []
    for position, parameter in enumerate(kernel.parameters):
        kind = f"S::argument<{position}>"
        if parameter.kind == "position":
            arguments.append(f"__softmetal_position<{kind}>::get({parameter.index})")
        else:
            address = f"__softmetal_{parameter.kind}_argument({parameter.index})"
            if parameter.condition:
                address = f"({parameter.condition}) ? {address} : 0ul"
            arguments.append(f"__softmetal_pointer<{kind}>::get({address})")
    # The arguments of a template are names of the namespace in which it was instantiated.
    namespace = kernel.instance.split("<")[0].rpartition("::")[0]
    scope = f"using namespace {namespace}; " if namespace else ""
    return (
        '\n# 1 "<entry point>"\n'
        f'extern "C" __attribute__((no_sanitize("thread"))) void {symbol}_derive(void) {{ {derived}}}\n'
        f'extern "C" uint {symbol}_max_threads(void) {{ {scope}return {kernel.max_threads or 1024}; }}\n'
        # As the kernel, this is checked: it would not become part of a function that is not.
        f'extern "C" void {symbol}(void) {{\n'
        f"  {scope}using S = __softmetal_signature<decltype({kernel.instance})>;\n"
        f"  {kernel.instance}({', '.join(arguments)});\n"
        "}\n"
    )


class _Rewriter:
    def __init__(self, text: str, shim_directory: str, unroll: bool = False) -> None:
        self.all_tokens = self._tokenize(text, shim_directory, unroll)
        # Significant tokens of the user's; the shim is written for clang as it is.
        self.tokens = [t for t in self.all_tokens if t.kind not in ("space", "marker") and not t.shim]
        self.place = 0  # the token that was looked at last
        with self._understood():
            self._collect_names()

    def _collect_names(self) -> None:
        self.program = Program("")
        self.functions: dict[str, Kernel] = {}
        self.instances: list[tuple[str, str, Token]] = []
        self.constants: dict[str, Constant] = {}
        self.pairs = self._match_brackets()
        self.function_names = {
            token.text
            for i, token in enumerate(self.tokens)
            if token.kind == "word" and self._text(i + 1) == "(" and self._text(self.pairs[i + 1] + 1) == "{"
        }
        self.vectors = set(VECTORS)
        self.type_parameters = {
            self._text(i + 1)
            for i, token in enumerate(self.tokens)
            if token.text in ("typename", "class")
            and self._text(i - 1) in ("<", ",")
            and self._text(i + 2) in (",", ">", "=")
        }
        self.variable_count = 0

    def run(self) -> Program:
        with self._understood():
            self._rewrite()
        return self.program

    def _rewrite(self) -> None:
        for pragma in self._late_pragmas():
            raise self._error(pragma, LATE_PRAGMA)
        self._check_words()
        self._collect_vector_names()
        self._replace_function_parameters()
        self._scan_scopes()
        self._scan_statements()
        for host_name, instance, token in self.instances:
            function = self.functions.get(instance.split("<")[0].split("::")[-1].strip())
            if function is None:
                raise self._error(token, f"'{host_name}' instantiates '{instance}', which is not a kernel")
            if instance.split("<")[0].strip() != function.instance:
                raise self._error(token, f"explicit instantiation of '{function.instance}' outside of its namespace")
            self._add_kernel(host_name, instance, function, token)
        self.program.functions = self.functions
        self.program.text = "".join(t.text if t.output is None else t.output for t in self.all_tokens)

    # --- Tokens ---

    @staticmethod
    def _is_unrolling(pragma: str) -> bool:
        return re.match(r"#\s*pragma\s+(unroll|nounroll|clang\s+loop)\b", pragma) is not None

    @classmethod
    def _tokenize(cls, text: str, shim_directory: str, unroll: bool) -> list[Token]:
        tokens = []
        file, line = "", 1
        for match in TOKEN.finditer(text):
            token = Token(match.group(), match.lastgroup, file, line, file.startswith(shim_directory))
            token.position = len(tokens)
            token.spaced = bool(tokens) and tokens[-1].kind in ("space", "marker")
            tokens.append(token)
            marker = MARKER.match(token.text) if token.kind == "marker" else None
            if token.kind == "marker" and not unroll and cls._is_unrolling(token.text):
                token.output = "\n"
            if marker:
                line, file = int(marker[1]), marker[2]
            else:
                line += token.text.count("\n")
        return tokens

    def _text(self, index: int) -> str:
        """The text of a token; nothing where there is none, a few places before the first and behind the last."""
        if 0 <= index < len(self.tokens):
            self.place = index
            return self.tokens[index].text
        if not -MARGIN < index < len(self.tokens) + MARGIN:
            raise IndexError("the source ends too early")
        return ""

    def _join(self, begin: int, end: int) -> str:
        return "".join(" " * t.spaced + t.text for t in self.tokens[begin:end]).strip()

    def _written(self, begin: int, end: int) -> str:
        """As _join, with what was replaced."""
        tokens = self.tokens[begin:end]
        return "".join(" " * t.spaced + (t.text if t.output is None else t.output) for t in tokens).strip()

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Whatever fails in here fails because of the source: what it expects to find is not there."""
        try:
            yield
        except RewriteError:
            raise
        except Exception as error:
            reason = f"cannot read this ({type(error).__name__}: {error})"
            token = self.tokens[self.place] if self.tokens else Token("", "", "<source>", 1)
            raise self._error(token, reason) from error

    def _error(self, token: Token, message: str) -> RewriteError:
        return RewriteError(f"{token.file}:{token.line}: error: {message}")

    def _match_brackets(self) -> dict[int, int]:
        """The partner of every bracket, both ways."""
        pairs: dict[int, int] = {}
        open_ones: list[int] = []
        for i, token in enumerate(self.tokens):
            if token.text in OPENING:
                open_ones.append(i)
            elif token.text in CLOSING:
                if not open_ones or OPENING[self.tokens[open_ones[-1]].text] != token.text:
                    raise self._error(token, f"'{token.text}' is not opened")
                pairs[i] = open_ones.pop()
                pairs[pairs[i]] = i
        if open_ones:
            raise self._error(self.tokens[open_ones[-1]], f"'{self._text(open_ones[-1])}' is not closed")
        return pairs

    def _closing(self, index: int) -> int:
        """The token that closes the bracket at index."""
        return self.pairs[index]

    def _opening(self, index: int) -> int:
        """The token that opens the bracket closed at index."""
        return self.pairs[index]

    def _closing_angle(self, index: int) -> int:
        """The '>' of the template argument list opened at index, or -1."""
        depth, i = 0, index
        while i < len(self.tokens):
            text = self._text(i)
            if text in OPENING:
                i = self._closing(i)
            elif text in (";", "}", ")"):
                return -1
            depth += (text == "<") - (text == ">")
            if depth == 0:
                return i
            i += 1
        return -1

    def _replace(self, begin: int, end: int, text: str) -> None:
        """Puts text in the place of tokens begin..end-1 and of the space between them, keeping the line breaks."""
        breaks = ""
        for token in self.all_tokens[self.tokens[begin].position : self.tokens[end - 1].position + 1]:
            if token.kind in ("space", "marker"):
                breaks += token.text if token.kind == "marker" else "\n" * token.text.count("\n")
            token.output = ""
        self.tokens[begin].output = text + ("\n" + breaks if "#" in breaks else breaks)

    # --- Pragmas ---

    def _late_pragmas(self) -> Iterator[Token]:
        """Program-scope pragmas on arithmetic behind a header of the library or anything that is compiled."""
        depth = 0  # of braces that open no namespace
        openings: list[bool] = []
        behind_library = False
        previous: Token | None = None
        places = {token.position: i for i, token in enumerate(self.tokens)}
        for token in self.all_tokens:
            if token.kind == "marker" and FP_PRAGMA.match(token.text):
                if depth == 0 and (behind_library or previous is not None):
                    yield token
            elif token.kind == "marker":
                behind_library |= token.shim and not token.file.endswith("/softmetal/macros.h")
            elif token.position in places:
                previous = token
                if token.text == "{":
                    openings.append(self._namespace(places[token.position]) is None)
                    depth += openings[-1]
                elif token.text == "}" and openings:
                    depth -= openings.pop()

    # --- Words ---

    def _check_words(self) -> None:
        for i, token in enumerate(self.tokens):
            if token.text in FORBIDDEN and self._text(i - 1) not in (".", "->", "="):
                raise self._error(token, f"MSL has no '{token.text}'")
            if token.text in RENAMED:
                token.output = token.text + "_"
            if token.kind == "number" and REAL.fullmatch(token.text):
                token.output = token.text + "f"  # a real literal is a float
            elif token.kind == "number" and token.text.endswith("bf") and not token.text.startswith("0x"):
                token.output = f"__softmetal_cast<bfloat>({token.text[:-2]}f)"

    def _collect_vector_names(self) -> None:
        for i, token in enumerate(self.tokens):
            if token.text == "using" and self._text(i + 2) == "=":
                end = i + 3
                while self._text(end) != ";":
                    end += 1
                words = [self._text(k) for k in range(i + 3, end) if self._text(k) not in ("metal", "::")]
                if words[:2] == ["vec", "<"] or (len(words) == 1 and words[0] in self.vectors):
                    self.vectors.add(self._text(i + 1))
            if token.text == "typedef" and self._text(i + 1) == "vec" and self._text(i + 2) == "<":
                self.vectors.add(self._text(self._closing_angle(i + 2) + 1))

    # --- Functions as template arguments: clang does not find templates among them, so they become types ---

    def _replace_function_parameters(self) -> None:
        parameters: set[str] = set()
        templates: set[str] = set()
        for i, token in enumerate(self.tokens):
            if token.text == "template" and self._text(i + 1) == "<":
                names = self._function_parameters(i + 1)
                parameters |= names
                if names:
                    templates.add(self._declared_template(self._closing_angle(i + 1) + 1))
        if not parameters:
            return
        self.program.takes_functions = True
        functions: set[str] = set()
        for i, token in enumerate(self.tokens):
            if token.text in parameters and self._text(i + 1) == "(" and token.output is None:
                token.output = f"{token.text}::call"
            elif token.text in templates and self._text(i + 1) == "<":
                functions |= self._function_arguments(i + 1, parameters)
        for i, token in enumerate(self.tokens):
            if token.text in functions and self._text(i + 1) == "(":
                body = self._closing(i + 1) + 1
                if self._text(body) == "{":
                    functions.discard(token.text)
                    head = f"template <class... A> static {ALWAYS_INLINE} auto call(A&&... a)"
                    wrapper = f"struct __softmetal_function_{token.text} {{ {head} {{ return {token.text}(a...); }} }};"
                    self.tokens[self._closing(body)].output = "} " + wrapper

    def _function_parameters(self, opening: int) -> set[str]:
        """Turns `R (*name)(A...)` in a template's head into `typename name`."""
        close = self._closing_angle(opening)
        names: set[str] = set()
        begin, k = opening + 1, opening + 1
        while k < close:
            text = self._text(k)
            if text == "(" and self._text(k + 1) == "*" and self._text(k + 3) == ")" and self._text(k + 4) == "(":
                names.add(self._text(k + 2))
                end = self._closing(k + 4)
                self._replace(begin, end + 1, f"typename {self._text(k + 2)}")
                self.tokens[k + 2].output = self.tokens[k + 2].output or ""
                k = end
            elif text == ",":
                begin = k + 1
            elif text in OPENING:
                k = self._closing(k)
            k += 1
        return names

    def _declared_template(self, begin: int) -> str:
        """The name of the function that a template's head stands before."""
        while self._text(begin) not in ("(", ";", "{", "") or self._text(begin - 1) in ("]", "decltype"):
            begin = self._closing(begin) + 1 if self._text(begin) in OPENING else begin + 1
        return self._text(begin - 1)

    def _function_arguments(self, opening: int, parameters: set[str]) -> set[str]:
        close = self._closing_angle(opening)
        names = set()
        for k in range(opening + 1, max(close, opening)):
            token = self.tokens[k]
            alone = self._text(k - 1) in ("<", ",") and self._text(k + 1) in (",", ">")
            if alone and token.text in self.function_names and token.text not in parameters:
                token.output = f"__softmetal_function_{token.text}"
                names.add(token.text)
        return names

    # --- Scopes: member functions and their address space ---

    def _scan_scopes(self) -> None:
        """Follows the braces. An MSL member function without a qualifier takes a `thread` object."""
        scopes: list[tuple[str, str]] = []
        start, i = 0, 0
        while i < len(self.tokens):
            text = self._text(i)
            if text in ("(", "["):
                i = self._closing(i)
            elif text == "{":
                scope = self._scope(start, i)
                if scopes and scopes[-1][0] == "class" and scope[0] == "other":
                    self._qualify(start, i, scopes[-1][1])
                scopes.append(scope)
                start = i + 1
            elif text == "}":
                if scopes:
                    scopes.pop()
                start = i + 1
            elif text == ";":
                start = i + 1
            elif text == "__private" and self._text(i - 1) in (")", "const", "noexcept"):
                class_name = next((name for kind, name in reversed(scopes) if kind == "class"), "")
                if self._drops_qualifier(i, class_name):
                    self.tokens[i].output = ""
            i += 1

    def _scope(self, start: int, brace: int) -> tuple[str, str]:
        words = [self._text(i) for i in range(start, brace)]
        if "namespace" in words:
            return "namespace", words[-1]
        if words[:1] == ["template"]:
            close = self._closing_angle(start + 1)
            words = words[close + 1 - start :] if close >= 0 else words
        if words[:1] and words[0] in ("struct", "class", "union") and "(" not in [w for w in words if w != "alignas"]:
            return "class", words[1] if len(words) > 1 else ""
        return "other", ""

    def _function_name(self, closing_parenthesis: int) -> int:
        return self._opening(closing_parenthesis) - 1

    def _drops_qualifier(self, qualifier: int, class_name: str) -> bool:
        """clang's temporaries have no address space, so what is called on them must take any."""
        close = qualifier - 1
        while self._text(close) != ")":
            close -= 1
        name = self._function_name(close)
        if self._text(name) == class_name:
            return True
        if self._text(name) == ")" and self._text(name - 2) == "operator":
            return True
        recent = [self._text(i) for i in range(max(0, name - 7), name)]
        if "operator" not in recent:
            return False
        after = self._text(name - len(recent) + recent.index("operator") + 1)
        return re.match(r"\w", after) is not None

    def _qualify(self, start: int, brace: int, class_name: str) -> None:
        close = brace - 1
        if self._text(close) == "const":
            close -= 1
        if self._text(close) != ")":
            return
        name = self._function_name(close)
        header = [self._text(i) for i in range(start, name)]
        if not re.match(r"[A-Za-z_]", self._text(name)) or self._text(name) in (class_name, "__attribute__"):
            return
        if {"static", "operator", "friend"} & set(header) or self._text(name - 1) in (",", "~"):
            return
        if class_name in (self._text(i) for i in range(start, name)) and ":" in header:
            return  # a constructor's initializer list
        self.tokens[brace].output = " __private {"

    # --- Statements ---

    def _scan_statements(self) -> None:
        namespaces: list[str | None] = []
        i = 0
        while i < len(self.tokens):
            text = self._text(i)
            previous = self._text(i - 1)
            if text == "{":
                namespaces.append(self._namespace(i))
            elif text == "}" and namespaces:
                namespaces.pop()
            elif text == "__constant":
                i = self._constant(i, namespaces)
            elif text == "__private":
                self._constant_reference(i)
            elif text == "__local" and previous in (";", "{", "}", ")", ""):
                i = self._threadgroup_variable(i)
            elif text == "template" and self._text(i + 1) == "[" and self._text(i + 2) == "[":
                i = self._instantiation(i, namespaces)
            elif text in ("kernel", "[") and self._is_kernel(i):
                i = self._kernel(i, namespaces)
            elif text == "is_function_constant_defined" and self._text(i + 1) == "(":
                i = self._is_defined(i)
            elif text in self.vectors and namespaces and namespaces[-1] is None and self._is_initialized(i):
                self.tokens[i + 2].output = f" = __softmetal_make<{text}>("
            else:
                self._construction(i)
            i += 1

    def _namespace(self, brace: int) -> str | None:
        """The name of the namespace that a brace opens, "" for one without a name; None: it opens something else."""
        begin = brace
        while self._text(begin - 1) == "::" or (begin and self.tokens[begin - 1].kind == "word"):
            begin -= 1
            if self._text(begin) == "namespace":
                return self._join(begin + 1, brace)
        return "" if self.tokens[brace - 1].kind == "string" and self._text(brace - 2) == "extern" else None

    @staticmethod
    def _qualified(namespaces: list[str | None], name: str) -> str:
        return "::".join(n for n in [*namespaces, name] if n)

    def _construction(self, i: int) -> None:
        text, previous = self._text(i), self._text(i - 1)
        if text == "(" and self._text(i + 2) == ")" and self._is_cast(i):
            self.tokens[i].output, self.tokens[i + 2].output = "__softmetal_as<", ">{} ->* "
            return
        if text == "=" and self._text(i + 1) == "{" and self._is_vector_declarator(i - 1):
            close = self._closing(i + 1)
            if close > i + 2:
                self.tokens[i + 1].output = f"__softmetal_fill<{self._declared_vector(i - 1)}>("
                self.tokens[close].output = ")"
            return
        if previous in ("operator", ".", "->", "struct", "class", "using"):
            return
        if text == "static_cast":
            close = self._closing_angle(i + 1)
            if not {"*", "&"} & {self._text(k) for k in range(i + 1, close)}:
                self.tokens[i].output = "__softmetal_cast"
        elif text == "vec" and self._text(i + 1) == "<":
            close = self._closing_angle(i + 1)
            if close > 0 and self._text(close + 1) == "(" and self._text(close + 2) != ")":
                self.tokens[i].output = "__softmetal_make<metal::vec"
                self.tokens[close].output = ">>"
                if previous == "::" and self._text(i - 2) == "metal":
                    self.tokens[i - 1].output = self.tokens[i - 2].output = ""
        elif self._text(i + 1) == "(" and self._text(i + 2) not in (")", "*", "&"):
            if text in self.vectors or text in self.type_parameters:
                self.tokens[i].output = f"__softmetal_make<{text}>"
            elif text in ("half", "bfloat"):
                self.tokens[i].output = f"__softmetal_cast<{text}>"

    def _constant_reference(self, i: int) -> None:
        """`const thread T& x` as a parameter: clang's temporaries have no address space, so it takes a value."""
        begin = i
        while self._text(begin - 1) in ("const", "typename") or self.tokens[begin - 1].kind == "word":
            begin -= 1
        end = i
        while self.tokens[end].kind == "word" or self._text(end) in ("::", "<"):
            end = self._closing_angle(end) + 1 if self._text(end) == "<" else end + 1
            if end <= i:
                return
        words = {self._text(k) for k in range(begin, end)}
        if (
            "const" in words
            and self._text(begin - 1) in ("(", ",")
            and self._text(end) == "&"
            and self.tokens[end + 1].kind == "word"
            and self._text(end + 2) in (",", ")")
        ):
            self.tokens[i].output = self.tokens[end].output = ""

    def _is_initialized(self, i: int) -> bool:
        """True for `float2 name(a, b);`, which is no declaration of a function."""
        if self.tokens[i + 1].kind != "word" or self._text(i + 2) != "(" or self._text(i - 1) in ("->", "."):
            return False
        first, close = self._text(i + 3), self._closing(i + 2)
        is_type = first in self.vectors | self.type_parameters | {*SCALARS, "const", "void"}
        is_declaration = (is_type and self._text(i + 4) != "(") or first.startswith("__") or first == ")"
        return self._text(close + 1) in (";", ",") and not is_declaration

    def _is_cast(self, i: int) -> bool:
        """True for `(name)` before an operand, where name is a vector or a template's type parameter."""
        before, after = self.tokens[i - 1], self.tokens[i + 3] if i + 3 < len(self.tokens) else None
        if self._text(i + 1) not in self.vectors | self.type_parameters or after is None:
            return False
        if before.text in (")", "]", ">") or (before.kind == "word" and before.text not in ("return", "else", "case")):
            return False
        return after.kind in ("word", "number") or after.text in ("(", "-", "+", "~", "!", "*", "&")

    def _declared_vector(self, name: int) -> str:
        """The vector type of the declaration that a declarator is part of, or nothing."""
        begin = name
        while self._text(begin - 1) not in (";", "{", ")", "(", ""):
            if self._text(begin - 1) == "}":
                if self._text(self._opening(begin - 1) - 1) != "=":
                    break
                begin = self._opening(begin - 1)
            else:
                begin = self._opening(begin - 1) if self._text(begin - 1) == "]" else begin - 1
        while self._text(begin) in ("const", "constexpr", "static", "__private"):
            begin += 1
        return self._text(begin) if self._text(begin) in self.vectors else ""

    def _is_vector_declarator(self, name: int) -> bool:
        return self.tokens[name].kind == "word" and self._declared_vector(name) != ""

    def _constant(self, i: int, namespaces: list[str | None]) -> int:
        end = i
        while self._text(end) not in (";", "=", "(", ")", "{", ",", "") and not (
            self._text(end) == "[" and self._text(end + 1) == "["
        ):
            end += 1
        if self._text(end) == "[" and self._text(end + 2) == "function_constant":
            return self._function_constant(i, end, namespaces)
        if self._text(end) in ("=", "{", "(") and None not in namespaces and self._depends_on_launch(end):
            return self._derived_constant(i, end, namespaces)
        if self._text(i - 1) not in (")", "const", "noexcept") and self._text(i + 1) != "const":
            self.tokens[i].output = "const __constant"
        return i

    def _add_constant(self, name: int, begin: int, index: int = -1) -> Constant:
        """The constant named by a token, whose type begins at another."""
        words = [self._text(k) for k in range(begin, name)]
        kind = " ".join(w for w in words if w not in ("const", "constexpr", "static", "__constant"))
        constant = Constant(self._text(name), kind, len(self.program.constants), index=index)
        if constant.slot >= MAX_CONSTANTS:
            raise self._error(self.tokens[name], f"more than {MAX_CONSTANTS} function constants")
        self.constants[constant.name] = constant
        self.program.constants.append(constant)
        return constant

    @staticmethod
    def _declaration(constant: Constant) -> str:
        return f'extern const __constant {constant.kind} {constant.name} __asm__("softmetal_slot_{constant.slot}")'

    def _function_constant(self, i: int, attribute: int, namespaces: list[str | None]) -> int:
        close = self._closing(attribute)
        open_index = attribute + 3
        expression = self._join(open_index + 1, self._closing(open_index))
        if not re.fullmatch(r"[\d+\-*() ]+", expression):
            raise self._error(self.tokens[i], f"the index '{expression}' of a function constant is not a number")
        constant = self._add_constant(attribute - 1, i + 1, eval(expression, {"__builtins__": {}}))
        constant.qualified = self._qualified(namespaces, constant.name)
        flag = f'extern const __constant bool __defined_{constant.name} __asm__("softmetal_defined_{constant.slot}")'
        begin = i
        while self._text(begin - 1) in ("const", "static"):
            begin -= 1
        self._replace(begin, close + 1, f"{flag}; {self._declaration(constant)}")
        return close

    def _is_defined(self, i: int) -> int:
        close = self._closing(i + 1)
        name = self._text(close - 1)
        if name not in self.constants or self.constants[name].index < 0:
            raise self._error(self.tokens[i], f"'{name}' is not a function constant")
        self._replace(i, close + 1, f"({self._join(i + 2, close - 1)}__defined_{name})")
        return close

    def _end_of_statement(self, i: int) -> int:
        while self._text(i) not in (";", ""):
            i = self._closing(i) + 1 if self._text(i) in OPENING else i + 1
        return i

    def _depends_on_launch(self, begin: int) -> bool:
        return any(self._text(k) in self.constants for k in range(begin, self._end_of_statement(begin)))

    def _derived_constant(self, i: int, initializer: int, namespaces: list[str | None]) -> int:
        """A constant computed from function constants, once for each launch."""
        end = self._end_of_statement(initializer)
        words = {self._text(k) for k in range(initializer, end)}
        inputs = [constant for constant in self.program.constants if constant.name in words]
        for k in range(initializer, end):
            if self._text(k) == "is_function_constant_defined":
                self._is_defined(k)
            else:
                self._construction(k)
        expression = self._written(initializer, end)
        begin = i
        while self._text(begin - 1) in ("const", "static", "constexpr"):
            begin -= 1
        constant = self._add_constant(initializer - 1, i + 1)
        constant.inputs = [c.slot for c in inputs]
        constant.is_optional = "is_function_constant_defined" in words
        function = f"__softmetal_derive_{constant.slot}"
        constant.derive = self._qualified(namespaces, function)
        # The inputs come by number, so that a kernel refers only to the constants that it uses itself.
        lines = [f"const {c.kind} {c.name} = __softmetal_constant<{c.kind}>({c.slot});" for c in inputs]
        if constant.is_optional:
            flags = (c for c in inputs if c.index >= 0)
            lines += [f"const bool __defined_{c.name} = __softmetal_constant_is_defined({c.slot});" for c in flags]
        name = constant.name
        lines.append(f"const {constant.kind} {name}{expression};")
        lines.append(f"__softmetal_set_constant({constant.slot}, (ulong)&{name}, sizeof({name}));")
        body = " ".join(lines)
        self._replace(begin, end, f"{self._declaration(constant)}; static void {function}(void) {{ {body} }}")
        return end

    def _threadgroup_variable(self, i: int) -> int:
        end = i + 1
        while self._text(end) not in (";", "(", "*", "&", "=", "{", ""):
            end = self._closing(end) + 1 if self._text(end) == "[" else end + 1
        if self._text(end) != ";":
            return i
        first = i + 1
        declarators, depth = [[]], 0
        for k in range(first, end):
            text = self._text(k)
            depth += (text in "<[") - (text in ">]") if len(text) == 1 else 0
            if text == "," and depth == 0:
                declarators.append([])
            else:
                declarators[-1].append(k)
        kind, output = "", ""
        for number, declarator in enumerate(declarators):
            name = self._declared_name(declarator)
            if number == 0:
                kind = self._written(declarator[0], name)
            dimensions = self._join(name + 1, declarator[-1] + 1)
            self.variable_count += 1
            pointer = f"(__local {kind}(*){dimensions})" if dimensions else f"(__local {kind}*)"
            reference = f"(&{self._text(name)}){dimensions}" if dimensions else f"&{self._text(name)}"
            call = f"__softmetal_threadgroup_variable({self.variable_count}, sizeof({kind}{dimensions}))"
            output += f"__local {kind} {reference} = *{pointer}{call}; "
        self._replace(i, end + 1, output)
        return end

    def _declared_name(self, declarator: list[int]) -> int:
        depth = 0
        for k in declarator:
            depth += (self._text(k) == "<") - (self._text(k) == ">")
            following = self._text(k + 1)
            if depth == 0 and self.tokens[k].kind == "word" and following in ("[", ",", ";"):
                return k
        raise self._error(self.tokens[declarator[0]], "cannot read this threadgroup variable")

    # --- Kernels ---

    def _is_kernel(self, i: int) -> bool:
        if self._text(i) == "kernel":
            return self._text(i - 1) != "[" and self._text(i + 1) != "."
        return self._text(i + 1) == "[" and self._text(i + 2) == "kernel"

    def _attributes(self, i: int) -> tuple[int, str | None]:
        """Skips [[...]] from i on; returns the next token and the host_name."""
        host_name = None
        while self._text(i) == "[" and self._text(i + 1) == "[":
            close = self._closing(i)
            if self._text(i + 2) == "host_name":
                host_name = "".join(self._text(k).strip('"') for k in range(i + 4, close - 2))
            i = close + 1
        return i, host_name

    def _instantiation(self, i: int, namespaces: list[str | None]) -> int:
        begin, host_name = self._attributes(i + 1)
        if self._text(begin) == "kernel":
            begin, later_name = self._attributes(begin + 1)
            host_name = host_name or later_name
        end = begin
        while self._text(end) not in (";", "{", ""):
            end += 1
        if host_name is None or self._text(end) != ";":
            return i
        if self._text(begin) == "decltype":
            instance = self._written(begin + 2, self._closing(begin + 1))
        else:
            name_end = begin + 1
            while self._text(name_end) not in ("(", ";"):
                close = self._closing_angle(name_end) if self._text(name_end) == "<" else -1
                name_end = max(close, name_end) + 1
            instance = self._written(begin + 1, name_end)
        self.instances.append((host_name, self._qualified(namespaces, instance), self.tokens[i]))
        self._replace(i, end + 1, "")
        return end

    def _kernel(self, i: int, namespaces: list[str | None]) -> int:
        begin = i
        host_name = None
        while self._text(begin - 1) == "]" and self._text(begin - 2) == "]":
            begin = self._opening(begin - 1)
            host_name = self._attributes(begin)[1] or host_name
        after, later_name = self._attributes(i + 1 if self._text(i) == "kernel" else i)
        host_name = host_name or later_name
        if self._text(after) == "kernel":
            after, later_name = self._attributes(after + 1)
            host_name = host_name or later_name
        attributes = [self._text(k) for k in range(begin, after)]
        max_threads = ""
        is_template = self._text(begin - 1) == ">"
        if MAX_THREADS in attributes:
            opening = begin + attributes.index(MAX_THREADS) + 1
            expression = range(opening + 1, self._closing(opening))
            if not {self._text(k) for k in expression} & self._template_words(begin if is_template else 0):
                max_threads = self._join(expression.start, expression.stop)
        self._replace(begin, after, "static")
        if self._text(after) == "inline":
            after += 1
        if self._text(after) != "void":
            raise self._error(self.tokens[i], "a kernel returns void")
        name = self._text(after + 1)
        if self._text(after + 2) != "(":
            raise self._error(self.tokens[i], "cannot read this kernel's declaration")
        parameters = self._parameters(after + 2)
        kernel = Kernel(name, self._qualified(namespaces, name), parameters, max_threads)
        self.functions[name] = kernel
        if not is_template:
            self._add_kernel(host_name or name, kernel.instance, kernel, self.tokens[i])
        return after + 1

    def _template_words(self, end: int) -> set[str]:
        """The words of the template head that ends before a token; nothing where that is the first one."""
        begin = end
        while begin > 0 and self._text(begin) != "template":
            begin -= 1
        return {token.text for token in self.tokens[begin:end] if token.kind == "word"}

    def _add_kernel(self, host_name: str, instance: str, function: Kernel, token: Token) -> None:
        known = self.program.kernels.get(host_name)
        if known and known.instance != instance:
            raise self._error(token, f"two kernels have the name '{host_name}'")
        self.program.kernels[host_name] = Kernel(host_name, instance, function.parameters, function.max_threads)

    def _parameters(self, opening: int) -> list[Parameter]:
        groups: list[list[int]] = [[]]
        angle = 0
        k, end = opening + 1, self._closing(opening)
        while k < end:
            text = self._text(k)
            angle += (text == "<") - (text == ">")
            if text == "," and angle == 0:
                groups.append([])
            else:
                last = self._closing(k) if text in OPENING else k
                groups[-1].extend(range(k, last + 1))
                k = last
            k += 1
        parameters: list[Parameter] = []
        following = {"buffer": 0, "threadgroup": 0}
        for group in filter(None, groups):
            parameters.append(self._parameter(group, following))
        return parameters

    def _parameter(self, group: list[int], following: dict[str, int]) -> Parameter:
        words = [self._text(k) for k in group]
        position = next((w for w in words if w in BUILTINS), None)
        condition = ""
        if "function_constant" in words:
            name = words[words.index(")", words.index("function_constant")) - 1]
            if name not in self.constants:
                raise self._error(self.tokens[group[0]], f"'{name}' is not a function constant")
            condition = self.constants[name].qualified
        if position:
            return Parameter("position", BUILTINS[position])
        kind = "threadgroup" if "__local" in words else "buffer"
        if not {"__local", "__global", "__constant"} & set(words):
            raise self._error(self.tokens[group[0]], f"the kernel argument '{' '.join(words)}' is not supported")
        # `[[threadgroup(0)]]`: the preprocessor has replaced the word as everywhere.
        attribute = "__local" if kind == "threadgroup" else "buffer"
        index = following[kind]
        for k, word in enumerate(words):
            if word == attribute and words[k + 1 : k + 2] == ["("]:
                expression = " ".join(words[k + 2 : words.index(")", k)])
                if not re.fullmatch(r"[\d+\-* ]+", expression):
                    raise self._error(self.tokens[group[0]], f"the index '{expression}' is not a number")
                index = eval(expression, {"__builtins__": {}})
        following[kind] = index + 1
        pointer = min((words.index(s) for s in "*&" if s in words), default=len(words))
        is_const = bool({"const", "__constant"} & set(words[:pointer]))
        return Parameter(kind, index, is_const, condition)
