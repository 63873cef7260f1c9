"""What Apple's compiler rejects or warns about, and the compiler of this device would take: rules on tokens.

The rules are those of the Metal Shading Language Specification that can be told from the tokens of a preprocessed
shader. They know no types, so they are silent where a name could be anything.

Advice is about what every compiler takes, and some of them, or some users' devices, make something bad of: helpers that
become calls, kernels whose registers allow fewer threads than the host launches, arithmetic that is fast where it is to
be exact, arguments that are to be bound although a function constant says that they are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .rewrite import BUILTINS, CLOSING, FP_PRAGMA, LATE_PRAGMA, MAX_THREADS, RewriteError, Token, _Rewriter

SPACES = {"__global", "__constant", "__local", "__private", "object_data", "ray_data"}
# Words that a declaration may begin with besides its type.
SPECIFIERS = {
    *("const", "constexpr", "static", "inline", "volatile", "extern", "unsigned", "signed", "typename", "coherent"),
}
NO_TYPES = {
    *("return", "else", "case", "goto", "using", "typedef", "template", "operator", "delete", "new", "throw", "sizeof"),
    *("friend", "public", "private", "protected", "static_assert", "namespace", "struct", "class", "union", "enum"),
    *("if", "for", "while", "do", "switch", "break", "continue", "default", "kernel", "and", "or", "not", "auto"),
    "extern",
}
WORDS = {
    *("double", "goto", "virtual", "try", "catch", "throw", "new", "delete"),
    *("dynamic_cast", "typeid", "thread_local", "asm", "wchar_t"),
}
MAX_BUFFERS = 31


@dataclass(frozen=True)
class Finding:
    """One place where a rule is broken. level: "error", "warning" (the compiler goes on) or "note" (worth a look)."""

    rule: str
    level: str
    place: str  # file:line
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.level}: {self.message} [{self.rule}]"


@dataclass
class _Scope:
    kind: str  # namespace, class, enum, kernel, function, block, initializer
    name: str = ""


def lint(preprocessed: str, shim_directory: str, version: int, advice: bool = False) -> list[Finding]:
    """All findings, in the order of the source. version: 310 for language version 3.1, and so on."""
    try:
        return _Linter(preprocessed, shim_directory, version, advice).run()
    except RewriteError as error:
        place, _, message = str(error).partition(": error: ")
        return [Finding("syntax", "error", place, message)]


class _Linter(_Rewriter):
    def __init__(self, text: str, shim_directory: str, version: int, advice: bool) -> None:
        super().__init__(text, shim_directory)
        self.version = version
        self.advice = advice
        self.findings: list[Finding] = []
        self.kernels: dict[str, int] = {}
        self.wide_structs: set[str] = set()  # with a member of type size_t or ptrdiff_t
        self.host_names: set[str] = set()
        self.function_constants = {
            self._text(i - 3) for i, token in enumerate(self.tokens) if token.text == "function_constant"
        }

    def run(self) -> list[Finding]:
        with self._understood():
            self._lint_pragmas()
            self._lint_words()
            self._lint_casts()
            self._lint_scopes()
            self._lint_getters()
        return sorted(set(self.findings), key=lambda f: (f.place.rsplit(":", 1)[0], int(f.place.rsplit(":", 1)[1])))

    def _add(self, rule: str, index: int, message: str, level: str = "error") -> None:
        self._add_at(rule, self.tokens[index], message, level)

    def _add_at(self, rule: str, token: Token, message: str, level: str) -> None:
        self.findings.append(Finding(rule, level, f"{token.file}:{token.line}", message))

    def _advise(self, rule: str, index: int, message: str) -> None:
        if self.advice:
            self._add(rule, index, message, "warning")

    # --- Anywhere ---

    def _lint_pragmas(self) -> None:
        for pragma in self._late_pragmas():
            self._add_at("fp-pragma", pragma, LATE_PRAGMA, "error")
        is_safe = any(FP_PRAGMA.match(token.text) and "math_mode(safe)" in token.text for token in self.all_tokens)
        if self.version >= 320 and not is_safe and self.tokens:
            self._advise("safe-math", 0, "no '#pragma METAL fp math_mode(safe)': NaN and infinity may be anything")

    def _lint_getters(self) -> None:
        """`getter<decltype(a)>` of a cooperative tensor: the type of a local variable carries `thread`."""
        aliases: set[str] = set()
        for i, token in enumerate(self.tokens):
            if token.text == "typedef" and self._is_type_of_variable(i + 1):
                aliases.add(self._text(self._closing(i + 2) + 1))
            elif token.text == "using" and self._text(i + 2) == "=" and self._is_type_of_variable(i + 3):
                aliases.add(self._text(i + 1))
            elif token.text.endswith("cooperative_tensor") and self._text(i + 1) == "<":
                self._lint_getter(i + 1, aliases)

    def _is_type_of_variable(self, i: int) -> bool:
        return self._text(i) == "decltype" and self._text(i + 3) == ")" and self.tokens[i + 2].kind == "word"

    def _lint_getter(self, opening: int, aliases: set[str]) -> None:
        for k in range(opening + 1, self._closing_angle(opening)):
            is_argument = self._text(k - 1) in ("<", ",") and self._text(k - 2) != "remove_addrspace_t"
            if is_argument and (self._is_type_of_variable(k) or self._text(k) in aliases):
                message = "the type of a variable carries its address space, which this template does not take"
                self._add("decltype-local", k, message)

    def _lint_words(self) -> None:
        for i, token in enumerate(self.tokens):
            text, previous, following = token.text, self._text(i - 1), self._text(i + 1)
            if text in WORDS and previous not in (".", "->", "=", "operator"):
                self._add("no-such-word", i, f"MSL has no '{text}'")
            elif text == "long" and following == "long":
                self._add("no-such-word", i, "MSL has no 'long long'")
            elif text == "std" and following == "::":
                self._add("std", i, "MSL has no namespace std")
            elif text == "vec" and following == "<":
                self._lint_vector(i)
            elif text == "[" and following != "[" and previous in ("=", "(", ",", "return", "{", ";", "}"):
                self._lint_lambda(i)
            elif text == "host_name" and following == "(":
                self._lint_host_name(i)
            elif self.version < 400:
                self._lint_cpp17(i)

    def _lint_vector(self, i: int) -> None:
        close = self._closing_angle(i + 1)
        size = self._text(close - 1) if close > 0 and self._text(close - 2) == "," else ""
        if size.isdigit() and int(size) > 4:
            self._add("vector-size", i, f"a vector of {size} components is undocumented", "warning")

    def _lint_lambda(self, i: int) -> None:
        after = self._text(self._closing(i) + 1)
        if self._text(i - 1) != "]" and after in ("(", "{") and self.version < 320:
            self._add("lambda", i, "lambdas begin with language version 3.2")

    def _lint_host_name(self, i: int) -> None:
        words = [self._text(k) for k in range(i + 2, self._closing(i + 1))]
        name = "".join(word.strip('"') for word in words)
        if name in self.host_names:
            self._add("host-name", i, f"two functions have the host name '{name}'")
        self.host_names.add(name)

    def _lint_cpp17(self, i: int) -> None:
        text, following = self._text(i), self._text(i + 1)
        what = ""
        if text == "if" and following == "constexpr":
            what = "if constexpr"
        elif text == "auto" and following == "[":
            what = "structured bindings"
        elif text == "namespace" and self._text(i + 2) == "::" and self._text(i + 3) not in (";", "="):
            end = i + 3
            while self._text(end + 1) == "::":
                end += 2
            what = "nested namespaces" if self._text(end + 1) == "{" and self._text(i - 1) != "using" else ""
        elif text == "static_assert" and not self._has_message(i + 1):
            what = "static_assert without a message"
        elif text == "." and [self._text(i + k) for k in (-1, 1, 2)] == ["(", ".", "."]:
            what = "" if self._text(i - 2) == "catch" else "a fold expression"
        if what:
            self._add("cpp17", i, f"{what}: C++17, before language version 4.0 an extension", "warning")
        if text == "auto" and self._text(i - 1) in ("<", ",") and self._is_template_head(i):
            self._add("cpp17", i, "template parameters of type auto begin with language version 4.0")

    def _has_message(self, opening: int) -> bool:
        close = self._closing(opening)
        return self.tokens[close - 1].kind == "string" or (
            self._text(close - 1) == "," and self.tokens[close - 2].kind == "string"
        )

    def _is_template_head(self, i: int) -> bool:
        while self._text(i) not in ("<", ";", "{", "}", ""):
            i -= 1
        return self._text(i) == "<" and self._text(i - 1) == "template"

    def _lint_casts(self) -> None:
        """`(float*)p` and `f<float*>`: no expression looks like that."""
        for i in range(1, len(self.tokens)):
            if self._text(i) not in (")", ">", ",") or self._text(i - 1) not in "*&":
                continue
            begin = i - 1
            while self._text(begin - 1) in ("*", "&", "const"):
                begin -= 1
            end = begin
            while self.tokens[begin - 1].kind == "word" or self._text(begin - 1) == "::":
                begin -= 1
            words = {self._text(k) for k in range(begin, end)}
            opener = self._text(begin - 1)
            if begin == end or words & (SPACES | NO_TYPES) or (opener, self._text(i)) not in (("(", ")"), ("<", ">")):
                continue
            if opener == "(" and self.tokens[begin - 2].kind == "word" and self._text(begin - 2) not in ("return",):
                continue  # a parameter list
            self._add("address-space", i - 1, f"'{self._join(begin, i)}' names no address space")

    # --- By scope ---

    def _lint_scopes(self) -> None:
        scopes: list[_Scope] = [_Scope("namespace")]
        start, i = 0, 0
        while i < len(self.tokens):
            text = self._text(i)
            if text in ("(", "["):
                if scopes[-1].kind in ("function", "kernel", "block"):
                    self._lint_body_token(i, scopes)
                    if text == "(" and self._text(i - 1) == "for":
                        self._lint_local(i + 1, self._end_of_statement(i + 1), scopes)
                i = self._closing(i) if scopes[-1].kind in ("namespace", "class") else i
            elif text == "{":
                scopes.append(self._open(start, i, scopes[-1]))
                if scopes[-1].kind == "initializer":
                    scopes.pop()
                    i = self._closing(i)
                else:
                    start = i + 1
            elif text == "}":
                scopes.pop()
                start = i + 1
            elif text == ";":
                self._lint_statement(start, i, scopes)
                start = i + 1
            elif text == ":" and self._text(i - 1) in ("public", "private", "protected"):
                start = i + 1
            else:
                self._lint_body_token(i, scopes)
            i += 1

    def _header(self, start: int, end: int) -> tuple[int, bool]:
        """Skips template heads and attributes; returns where the declaration begins, and whether it is a kernel."""
        is_kernel = False
        while start < end:
            text = self._text(start)
            if text == "template" and self._text(start + 1) == "<":
                close = self._closing_angle(start + 1)
                if close < 0:
                    break
                start = close + 1
            elif text == "[" and self._text(start + 1) == "[":
                close = self._closing(start)
                is_kernel |= "kernel" in (self._text(k) for k in range(start, close))
                start = close + 1
            elif text == "kernel":
                is_kernel = True
                start += 1
            else:
                break
        return start, is_kernel

    def _open(self, start: int, brace: int, parent: _Scope) -> _Scope:
        begin, is_kernel = self._header(start, brace)
        if self._namespace(brace) is not None:
            return _Scope("namespace")
        words = [self._text(k) for k in range(begin, brace)]
        if parent.kind not in ("namespace", "class"):
            is_class = words[:1] and words[0] in ("struct", "class", "union")
            is_value = self._text(brace - 1) in ("=", "(", ",", "return", "{") or parent.kind == "initializer"
            return _Scope("class" if is_class else "initializer" if is_value else "block", parent.name)
        if "enum" in words[:2]:
            return _Scope("enum")
        if words[:1] and words[0] in ("struct", "class", "union", "typedef") and "(" not in words:
            name = words[1] if len(words) > 1 else ""
            return _Scope("class", name)
        opening = self._parameter_list(begin, brace)
        if opening < 0:
            return _Scope("initializer")
        self._lint_function(begin, opening, is_kernel)
        self._lint_body(start, begin, opening, brace, is_kernel)
        return _Scope("kernel" if is_kernel else "function", self._text(opening - 1))

    def _parameter_list(self, begin: int, end: int) -> int:
        """The '(' of a function's parameters in a declaration, or -1."""
        k = begin
        while k < end:
            text = self._text(k)
            if text == "=":
                return -1
            if text == "<":
                k = max(self._closing_angle(k), k)
            elif text == "[":
                k = self._closing(k)
            elif text == "(":
                is_operator = self._text(k - 1) == "operator"
                if is_operator:
                    return k + 2
                if self._text(k - 1) not in ("alignas", "__attribute__", "decltype", "__asm__"):
                    return k
                k = self._closing(k)
            elif text == "operator":
                k += 1
                while self._text(k + 1) != "(":
                    k += 1
            k += 1
        return -1

    def _groups(self, opening: int) -> Iterator[tuple[int, int]]:
        """Begin and end of each parameter."""
        begin, k, close = opening + 1, opening + 1, self._closing(opening)
        while k < close:
            text = self._text(k)
            if text == "<":
                k = max(self._closing_angle(k), k)
            elif text in ("(", "[", "{"):
                k = self._closing(k)
            elif text == ",":
                yield begin, k
                begin = k + 1
            k += 1
        if begin < close:
            yield begin, close

    def _lint_function(self, begin: int, opening: int, is_kernel: bool) -> None:
        name = self._text(opening - 1)
        if name == "main":
            self._add("main", opening - 1, "no function is named main")
        buffers: set[str] = set()
        for first, end in self._groups(opening):
            default = next((k for k in range(first, end) if self._text(k) == "="), end)
            self._lint_pointer(first, default)
            if is_kernel:
                self._lint_argument(first, end, buffers)
        self._lint_pointer(begin, opening - 1)
        if is_kernel:
            self.kernels[name] = opening - 1
            if self._text(begin) != "void" and "void" not in (self._text(k) for k in range(begin, opening)):
                self._add("kernel-type", begin, f"kernel '{name}' does not return void")

    def _lint_body(self, start: int, begin: int, opening: int, brace: int, is_kernel: bool) -> None:
        """Of a function that is defined: `start` begins its attributes, `brace` its body."""
        words = {self._text(k) for k in range(start, opening)}
        name = self._text(opening - 1)
        if not is_kernel:
            if not words & {"__always_inline__", "always_inline", "constexpr"}:
                self._advise("always-inline", begin, f"'{name}' is not always inlined (METAL_FUNC)")
            return
        if MAX_THREADS not in words:
            self._advise("max-threads", begin, f"kernel '{name}' does not say how many threads run it ({MAX_THREADS})")
        for first, end in self._groups(opening):
            if "function_constant" not in (self._text(k) for k in range(first, end)):
                self._lint_optional(first, end, brace)

    def _lint_optional(self, first: int, end: int, brace: int) -> None:
        """An argument that is used where a function constant is true, and nowhere else."""
        attribute = next((k for k in range(first, end) if self._text(k) == "["), end)
        name = self._text(attribute - 1)
        flags = {constant for constant in self.function_constants if constant != name}
        uses = [k for k in range(brace, self._closing(brace)) if self._text(k) == name and self._text(k - 1) != "."]
        if uses and all(self._is_guarded(k, brace, flags) for k in uses):
            self._advise("optional-argument", first, f"'{name}' is used if a function constant is true: say which")

    def _is_guarded(self, use: int, brace: int, flags: set[str]) -> bool:
        """True behind `flag ?` in the statement, or in a block that `if (flag)` begins."""
        k = use
        in_statement = True
        while k > brace:
            k -= 1
            text = self._text(k)
            in_statement &= text not in (";", "}")
            if text in CLOSING:
                k = self._opening(k)
            elif text == "?" and in_statement and self._text(k - 1) in flags:
                return True
            elif text == "{" and self._text(k - 1) == ")":
                condition = self._opening(k - 1)
                if self._text(condition - 1) == "if" and condition + 2 == k - 1 and self._text(condition + 1) in flags:
                    return True
        return False

    def _lint_pointer(self, begin: int, end: int) -> None:
        """A parameter, member or result with a pointer or reference needs an address space."""
        places = self._outside_brackets(begin, end)
        words = [self._text(k) for k in places]
        if (words[:1] and words[0] in NO_TYPES - {"auto", "struct"}) or "(" in words or "operator" in words:
            return
        depth = 0
        for k in places:
            depth += (self._text(k) == "<") - (self._text(k) == ">")
            if self._text(k) in ("*", "&") and depth == 0:
                if not SPACES & set(words) and "auto" not in words:
                    self._add("address-space", k, f"'{self._join(begin, end)}' names no address space")
                return

    def _outside_brackets(self, begin: int, end: int) -> list[int]:
        places, k = [], begin
        while k < end:
            if self._text(k) == "[":
                k = self._closing(k)
            else:
                places.append(k)
            k += 1
        return places

    def _lint_argument(self, begin: int, end: int, buffers: set[str]) -> None:
        words = [self._text(k) for k in range(begin, end)]
        if {"size_t", "ptrdiff_t"} & set(words) or self.wide_structs & set(words):
            self._add("size-in-argument", begin, "size_t and ptrdiff_t are barred from kernel arguments", "warning")
        for attribute in ("buffer", "__local"):
            for k, word in enumerate(words):
                if word == attribute and words[k - 1] == "[" and words[k + 1 : k + 2] == ["("]:
                    index = words[k + 2]
                    if f"{attribute}{index}" in buffers:
                        self._add("argument-index", begin, f"two arguments have the index {index}")
                    if index.isdigit() and int(index) >= MAX_BUFFERS:
                        self._add("argument-index", begin, f"the index {index} is not below {MAX_BUFFERS}")
                    buffers.add(f"{attribute}{index}")
        position = next((word for word in words if word in BUILTINS), "")
        if position and words[0] not in ("uint", "ushort", "uint2", "uint3", "ushort2", "ushort3", "const", "unsigned"):
            self._add("position-type", begin, f"[[{position}]] is a ushort, uint or a vector of them, not {words[0]}")

    def _lint_statement(self, start: int, end: int, scopes: list[_Scope]) -> None:
        begin, _ = self._header(start, end)
        kind = scopes[-1].kind
        words = [self._text(k) for k in range(begin, end)]
        if not words or (words[0] in NO_TYPES and words[0] != "auto"):
            return
        if kind in ("function", "kernel", "block"):
            self._lint_local(begin, end, scopes)
            return
        if kind not in ("namespace", "class") or words[0] == "}":
            return
        opening = self._parameter_list(begin, end)
        if opening > 0 and "decltype" not in words[:1]:
            if start == begin or self._text(start + 1) != "[":  # not an explicit instantiation
                self._lint_function(begin, opening, False)
            return
        value = next((k for k in range(begin, end) if self._text(k) in ("=", "{")), end)
        if kind == "class":
            self._lint_pointer(begin, value)
            if {"size_t", "ptrdiff_t"} & set(words) and "static" not in words and "__private" not in words:
                self.wide_structs.add(scopes[-1].name)
        is_variable = kind == "namespace" or "static" in words
        if is_variable and "__constant" not in words and self._declares(begin, value):
            what = "a static member" if kind == "class" else "a program-scope variable"
            self._add("constant", begin, f"{what} lives in the constant address space")

    def _declares(self, begin: int, end: int) -> bool:
        """True for a type and a name."""
        places = [k for k in self._outside_brackets(begin, end) if self._text(k) not in SPECIFIERS]
        return len(places) >= 2 and self.tokens[places[0]].kind == self.tokens[places[-1]].kind == "word"

    def _lint_local(self, begin: int, end: int, scopes: list[_Scope]) -> None:
        k = begin
        while self._text(k) in SPECIFIERS:
            k += 1
        if self.tokens[k].kind != "word" or self._text(k) in NO_TYPES | SPACES | {"this"}:
            if self._text(begin) == "__local" or "__local" in (self._text(j) for j in range(begin, k + 1)):
                self._lint_threadgroup_variable(begin, end, scopes)
            return
        while self._text(k + 1) == "::":
            k += 2
        if self._text(k + 1) == "<":
            k = max(self._closing_angle(k + 1) - 1, k)
            k += 1
        after = k + 1
        stars = after
        while self._text(stars) in ("*", "&", "const"):
            stars += 1
        if self._text(after) in ("*", "&") and self.tokens[stars].kind == "word":
            is_logical = self._text(after) == "&" and self._text(after + 1) == "&"
            if self._text(stars + 1) in ("=", ";", ",", ":", "[") and not is_logical:
                words = {self._text(j) for j in range(begin, stars)}
                if not words & SPACES:
                    self._add("address-space", after, f"'{self._join(begin, stars + 1)}' names no address space")

    def _lint_threadgroup_variable(self, begin: int, end: int, scopes: list[_Scope]) -> None:
        value = next((k for k in self._outside_brackets(begin, end) if self._text(k) in ("=", "(")), end)
        is_pointer = {"*", "&"} & {self._text(k) for k in range(begin, value)}
        owner = next((s.kind for s in reversed(scopes) if s.kind in ("kernel", "function")), "")
        if not is_pointer and owner == "function":
            self._add("threadgroup-variable", begin, "threadgroup variables are declared in kernels")
        elif not is_pointer and value < end and self._text(value) == "=":
            self._add("threadgroup-variable", begin, "threadgroup variables have no initializer")

    def _lint_body_token(self, i: int, scopes: list[_Scope]) -> None:
        text = self._text(i)
        if self.tokens[i].kind != "word" or self._text(i + 1) not in ("(", "<"):
            return
        previous = self.tokens[i - 1]
        if previous.text in (".", "->", "::") or (previous.kind == "word" and previous.text != "return"):
            return
        owner = next((s for s in reversed(scopes) if s.kind in ("kernel", "function")), None)
        if owner is None:
            return
        if text in self.kernels:
            self._add("kernel-call", i, f"a function calls the kernel '{text}'")
        elif text == owner.name and self._text(i + 1) == "(":
            self._add("recursion", i, f"'{text}' calls a function of its own name", "note")
