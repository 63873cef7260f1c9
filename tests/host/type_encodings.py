"""Compares the hand-written declarations in softmetal/host/apple with what public Python packages know of Apple's.

Nothing of those packages is run, and all of them are read as data:

- pyobjc-framework-Metal, Metal/_Metal.*.so: compiled against Apple's headers; the protocols' metadata has the type
  encoding of every method. Metal/_metadata.py: values of enums, layouts of structs, BOOL in methods of classes.
- pyobjc-framework-Cocoa, Foundation/_metadata.py, Foundation/_Foundation.*.so; pyobjc-core, objc/_objc.*.so: the same
  for Foundation, and names of methods that they call.
- tinygrad, tinygrad/runtime/autogen/metal.py: generated from Apple's headers; the methods of Metal's classes.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

STUBS = Path(__file__).resolve().parents[2] / "softmetal" / "softmetal" / "host" / "apple"
PACKAGES = ("pyobjc-framework-Metal==12.2.2", "pyobjc-framework-Cocoa==13.0", "pyobjc-core==13.0", "tinygrad==0.14.0")
OURS = ("MTL", "NS")
HEADERS = ("Foundation/Foundation.h", "Metal/Metal.h")

# Selectors that occur in none of the packages. One that is added here has to be looked up in Apple's documentation.
KNOWN_BY_HAND = {
    "MTLCompileOptions": {"mathFloatingPointFunctions", "mathMode", "preprocessorMacros"}
    | {"setMathFloatingPointFunctions:", "setMathMode:", "setPreprocessorMacros:"},
    "MTLComputePipelineReflection": {"bindings"},
    "NSAutoreleasePool": {"drain"},
    "NSDictionary": {"allKeys", "dictionaryWithObject:forKey:", "objectForKeyedSubscript:"},
    "NSError": {"errorWithDomain:code:userInfo:"},
    "NSMutableDictionary": {"setObject:forKeyedSubscript:"},
    "NSNumber": {f"numberWith{kind}:" for kind in ("Double", "Long", "UnsignedInt", "UnsignedInteger", "UnsignedLong")},
}


@dataclass(frozen=True)
class Method:
    owner: str
    selector: str
    types: tuple[str, ...]  # type encodings: of the result, then of the arguments without self and _cmd


@dataclass
class Declarations:
    """What a set of headers declares."""

    methods: list[Method] = field(default_factory=list)
    enums: dict[str, int] = field(default_factory=dict)
    structs: dict[str, str] = field(default_factory=dict)  # encodings of the fields


@dataclass
class Knowledge:
    """What the packages know. Types of class methods are as coarse as their source."""

    protocol_methods: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    class_methods: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    partial_types: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)  # position in Method.types
    selectors: set[str] = field(default_factory=set)
    enums: dict[str, int] = field(default_factory=dict)
    structs: dict[str, str] = field(default_factory=dict)


# --- Type encodings --------------------------------------------------------------------------------------------------


def split_encoding(encoding: str) -> Iterator[str]:
    """The types in an encoding, without the stack offsets: '@"NSString"16@0:8' gives '@"NSString"', '@', ':'."""
    at = 0
    while at < len(encoding):
        start = at
        while encoding[at] in "rnNoORV^":
            at += 1
        opening = encoding[at]
        at += 1
        if opening in "{([":
            at = _closing(encoding, at - 1) + 1
        elif opening == "@" and encoding[at : at + 1] == '"':
            at = encoding.index('"', at + 1) + 1
        elif opening == "@" and encoding[at : at + 1] == "?":
            at += 1
            if encoding[at : at + 1] == "<":
                at = _closing(encoding, at) + 1
        yield _normal(encoding[start:at])
        while at < len(encoding) and encoding[at].isdigit():
            at += 1


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += text[at] in "{([<"
        depth -= text[at] in "})]>"
        if depth == 0:
            return at
    raise ValueError(f"unbalanced type encoding {text}")


def _normal(encoding: str) -> str:
    """Without a block's signature, a struct's name, the class behind a pointer, and oneway."""
    if encoding.startswith("@?"):
        return "@?"
    encoding = re.sub(r"\{[^={}]*=", "{=", encoding.lstrip("V"))
    return re.sub(r'(\^@)"[^"]*"', r"\1", encoding)


def agrees(ours: str, theirs: str) -> bool:
    """Whether a declared type is what the package says; a bare object or pointer of theirs stands for any."""
    return (
        ours == theirs
        or (theirs == "@" and ours.startswith("@"))
        or (theirs == "^" and (ours.lstrip("rV")[0] in "^*" or ours == "@?"))
        or (theirs == "{" and ours.startswith("{"))
        or (theirs == "Z" and ours == "B")
    )


# --- The declarations, as clang sees them ----------------------------------------------------------------------------


def declarations(zig: Path, stubs: Path = STUBS) -> Declarations:
    """What clang for Apple silicon reads in the headers. The headers of libobjc and libdispatch are zig's."""
    library = zig.parent / "lib"
    command = [zig, "clang", "--target=arm64-apple-macos14.0", "-x", "objective-c", "-fblocks", "-nostdlibinc"]
    command += ["-isystem", library / "include", "-isystem", library / "libc" / "include" / "any-darwin-any"]
    command += [f"-I{stubs}", "-fsyntax-only", "-Xclang", "-ast-dump=json", "-"]
    source = "".join(f"#import <{header}>\n" for header in HEADERS)
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the declarations do not compile:\n{done.stderr}")
    nodes = json.loads(done.stdout)["inner"]
    result = Declarations()
    # The underlying types of enums and the fields of structs, before the methods that use them.
    named: dict[str, str] = {}
    records: dict[str, dict] = {}
    for node in nodes:
        if node["kind"] == "EnumDecl":
            _read_enum(node, named, result.enums)
        elif node["kind"] == "RecordDecl":
            records[node["id"]] = node
        elif node["kind"] == "TypedefDecl" and node["name"].startswith(OURS):
            record = records.get(node["inner"][0].get("decl", {}).get("id"))
            fields = [child["type"] for child in (record or {}).get("inner", []) if child["kind"] == "FieldDecl"]
            if fields:
                encoding = "{=" + "".join(_encode(type_, named) for type_ in fields) + "}"
                named[node["name"]] = named[record.get("name", "")] = result.structs[node["name"]] = encoding
    for node in nodes:
        ours = node.get("name", "").startswith(OURS) and node["name"] != "NSObject"
        if ours and node["kind"] in ("ObjCInterfaceDecl", "ObjCProtocolDecl"):
            result.methods += _methods(node, named)
    return result


def _read_enum(node: dict, named: dict[str, str], values: dict[str, int]) -> None:
    if "name" in node:
        named[node["name"]] = _encode(node["fixedUnderlyingType"], named) if "fixedUnderlyingType" in node else "I"
    for child in node.get("inner", []):
        if child["kind"] == "EnumConstantDecl" and child["name"].startswith(OURS):
            values[child["name"]] = int(_find_value(child))


def _find_value(node: dict) -> str:
    return node["value"] if "value" in node else next(_find_value(child) for child in node["inner"])


def _methods(node: dict, named: dict[str, str]) -> Iterator[Method]:
    for child in node.get("inner", []):
        if child["kind"] == "ObjCMethodDecl":
            parameters = [inner["type"] for inner in child.get("inner", []) if inner["kind"] == "ParmVarDecl"]
            types = tuple(_encode(type_, named) for type_ in [child["returnType"], *parameters])
            yield Method(node["name"], child["name"], types)


SCALARS = {"void": "v", "bool": "B", "char": "c", "int": "i", "unsigned int": "I", "float": "f", "double": "d"}
SCALARS |= {"long": "q", "unsigned long": "Q", "long long": "q", "unsigned long long": "Q"}
SCALARS |= {"SEL": ":", "Class": "#", "instancetype": "@", "id": "@"}
GENERIC = ("ObjectType", "KeyType")


def _encode(type_: dict, named: dict[str, str]) -> str:
    """The encoding that clang for Apple silicon gives a type."""
    qualified = type_.get("desugaredQualType", type_["qualType"])
    text = re.sub(r"\b(_Nonnull|_Nullable|__strong|__autoreleasing|oneway|enum|struct)\b", "", qualified)
    return _encode_text(re.sub(r"\s+", " ", text).strip(), named)


def _encode_text(text: str, named: dict[str, str]) -> str:
    constant = text.startswith("const ")
    text = text.removeprefix("const ").strip()
    if "(^)" in text:
        return "@?"
    if text in SCALARS or text in named:
        return SCALARS.get(text) or named[text]
    if text.startswith("id<") and text.endswith(">"):
        return f'@"{text[2:].replace(" ", "")}"'
    if text.startswith(GENERIC):
        return "@" if not text.endswith("*") else ("r^@" if constant else "^@")
    if not text.endswith("*"):
        raise ValueError(f"no encoding for {text}")
    pointee = text.removesuffix("*").strip()
    constant = constant or pointee.endswith("const")
    pointee = pointee.removesuffix("const").strip()
    if pointee == "char":
        return "r*" if constant else "*"
    if pointee in SCALARS or pointee.endswith("*") or pointee.startswith(("id<", *GENERIC)):
        return ("r^" if constant else "^") + _normal("^" + _encode_text(pointee, named))[1:].split('"')[0]
    if pointee.endswith("NSZone"):
        return "^{=}"
    base, _, protocols = pointee.partition("<")
    # Type arguments are no part of an encoding, protocols are.
    return f'@"{base.strip()}<{protocols}"' if base.strip() == "NSObject" and protocols else f'@"{base.strip()}"'


# --- Protocols in a Mach-O file --------------------------------------------------------------------------------------


class Image:
    """The part for Apple silicon of a Mach-O file, as far as metadata of Objective-C needs."""

    def __init__(self, path: Path) -> None:
        self._data = self._slice(path.read_bytes())
        self._segments: list[tuple[int, int, int]] = []  # address, size, offset in the file
        self.sections: dict[str, tuple[int, int]] = {}  # address, size
        command_count = struct.unpack_from("<I", self._data, 16)[0]
        at = 32
        for _ in range(command_count):
            command, size = struct.unpack_from("<II", self._data, at)
            if command == 0x80000034:
                raise ValueError(f"{path} has chained fixups: its pointers need decoding")
            if command == 0x19:
                self._read_segment(at)
            at += size

    @staticmethod
    def _slice(data: bytes) -> bytes:
        magic, count = struct.unpack_from(">II", data)
        if magic != 0xCAFEBABE:
            return data
        for i in range(count):
            cpu, _, offset, size, _ = struct.unpack_from(">IIIII", data, 8 + 20 * i)
            if cpu == 0x0100000C:
                return data[offset : offset + size]
        raise ValueError("no code for Apple silicon")

    def _read_segment(self, at: int) -> None:
        address, _, offset, size = struct.unpack_from("<QQQQ", self._data, at + 24)
        self._segments.append((address, size, offset))
        for i in range(struct.unpack_from("<I", self._data, at + 64)[0]):
            name, _, section, length = struct.unpack_from("<16s16sQQ", self._data, at + 72 + 80 * i)
            self.sections[name.rstrip(b"\0").decode()] = (section, length)

    def _offset(self, address: int) -> int:
        for start, size, offset in self._segments:
            if start <= address < start + size:
                return address - start + offset
        raise ValueError(f"address {address:#x} is in no segment")

    def unpack(self, layout: str, address: int) -> tuple:
        return struct.unpack_from("<" + layout, self._data, self._offset(address))

    def string(self, address: int) -> str:
        start = self._offset(address)
        return self._data[start : self._data.index(b"\0", start)].decode()

    def strings(self, section: str) -> set[str]:
        address, size = self.sections.get(section, (0, 0))
        start = self._offset(address) if size else 0
        return {text.decode() for text in self._data[start : start + size].split(b"\0") if text}

    def protocol_methods(self) -> Iterator[Method]:
        start, size = self.sections["__objc_protolist"]
        for slot in range(start, start + size, 8):
            (protocol,) = self.unpack("Q", slot)
            _, name, _, *lists, _, length, _ = self.unpack("8QII", protocol)
            # The types with class names follow in one table for the lists of required and optional methods.
            extended = self.unpack("Q", protocol + 72)[0] if length > 72 else 0
            methods = [entry for table in lists if table for entry in self._method_list(table)]
            for i, (selector, types) in enumerate(methods):
                if extended:
                    types = self.string(self.unpack("Q", extended + 8 * i)[0])
                result, _, _, *arguments = split_encoding(types)
                yield Method(self.string(name), selector, (result, *arguments))

    def _method_list(self, table: int) -> Iterator[tuple[str, str]]:
        flags, count = self.unpack("II", table)
        for i in range(count):
            if flags & 0x80000000:  # offsets relative to themselves; the name's leads to a pointer
                entry = table + 8 + 12 * i
                name, types = self.unpack("ii", entry)
                yield self.string(self.unpack("Q", entry + name)[0]), self.string(entry + 4 + types)
            else:
                name, types = self.unpack("QQ", table + 8 + 24 * i)
                yield self.string(name), self.string(types)


# --- What the packages know ------------------------------------------------------------------------------------------


def knowledge(unpacked: Path) -> Knowledge:
    """From a folder that the wheels of PACKAGES were unpacked into."""
    known = Knowledge()
    for pattern in ("Metal/_Metal.*.so", "Foundation/_Foundation.*.so", "objc/_objc.*.so"):
        (path,) = unpacked.glob(pattern)
        image = Image(path)
        known.selectors |= image.strings("__objc_methname")
        for method in image.protocol_methods():
            known.protocol_methods[method.owner, method.selector] = method.types
    for framework in ("Metal", "Foundation"):
        _read_pyobjc_metadata(unpacked / framework / "_metadata.py", known)
    _read_tinygrad_bindings(unpacked / "tinygrad" / "runtime" / "autogen" / "metal.py", known)
    known.selectors |= {selector for _, selector in known.class_methods}
    return known


def _read_pyobjc_metadata(path: Path, known: Knowledge) -> None:
    text = path.read_text()
    for name, value in re.findall(r"\$(\w+)@(-?\d+)(?=\$|\")", text):
        known.enums[name] = int(value)
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name == "objc.createStructType":
            encoding = next(split_encoding(ast.literal_eval(call.args[1]).decode()))
            known.structs[ast.literal_eval(call.args[0]).rpartition(".")[2]] = encoding
        elif name == "r":
            _read_registered_method(call, known)


def _read_registered_method(call: ast.Call, known: Knowledge) -> None:
    """r(class, selector, {"retval": {"type": ...}, "arguments": {2 and above: {"type": ...}}})"""
    owner, selector = (ast.literal_eval(argument).decode() for argument in call.args[:2])
    details = call.args[2]
    known.selectors.add(selector)
    types: dict[int, str] = {}
    for key, value in zip(details.keys, details.values, strict=True):
        if ast.literal_eval(key) == "retval":
            positions = [(0, value)]
        elif ast.literal_eval(key) == "arguments":
            positions = [(ast.literal_eval(k) - 1, v) for k, v in zip(value.keys, value.values, strict=True)]
        else:
            continue
        for position, properties in positions:
            for k, v in zip(properties.keys, properties.values, strict=True):
                if ast.literal_eval(k) == "type" and isinstance(v, ast.Constant) and isinstance(v.value, bytes):
                    types[position] = next(split_encoding(v.value.decode()))
    known.partial_types[owner, selector] = types


CTYPES = {"c_uint64": "Q", "c_int64": "q", "c_uint32": "I", "c_int32": "i", "c_bool": "B", "c_int": "i", "c_float": "f"}
CTYPES |= {"c_void_p": "^", "c_double": "d", "c_uint16": "S", "c_char_p": "^"}


def _read_tinygrad_bindings(path: Path, known: Knowledge) -> None:
    tree = ast.parse(path.read_text())
    meanings = {"instancetype": "@", "None": "v", "objc.id_": "@"}
    meanings |= {f"ctypes.{name}": encoding for name, encoding in CTYPES.items()}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            meanings[node.name] = f'@"{node.name}"' if ast.unparse(node.bases[0]) == "objc.Spec" else "{"
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
            meanings[node.target.id] = _binding_type(node.value, meanings)
    meanings["BOOL"] = "B"  # an int there
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Attribute) and target.attr in ("_methods_", "_classmethods_"):
            for entry in node.value.elts:
                selector = ast.literal_eval(entry.elts[0])
                types = [entry.elts[1], *entry.elts[2].elts]
                known.class_methods[target.value.id, selector] = tuple(_binding_type(t, meanings) for t in types)


def _binding_type(node: ast.expr, meanings: dict[str, str]) -> str:
    text = ast.literal_eval(node) if isinstance(node, ast.Constant) and node.value else ast.unparse(node)
    encoding = meanings.get(text, "^")
    # What the generator takes for a class may be a protocol.
    return "@" if encoding.startswith("@") else encoding


# --- The comparison --------------------------------------------------------------------------------------------------


@dataclass
class Report:
    problems: list[str]
    compared: int
    names_only: list[str]  # the packages know the selector, but not its types


def compare(declared: Declarations, known: Knowledge) -> Report:
    report = Report([], 0, [])
    for name, value in declared.enums.items():
        if name.startswith("MTL"):
            report.compared += 1
            if known.enums.get(name) != value:
                report.problems.append(f"{name} is {known.enums.get(name)}, not {value}")
    for name, fields in declared.structs.items():
        if name in known.structs:
            report.compared += 1
            if known.structs[name] != fields:
                report.problems.append(f"struct {name} is {known.structs[name]}, not {fields}")
    for method in declared.methods:
        _compare_method(method, known, report)
    return report


def _compare_method(method: Method, known: Knowledge, report: Report) -> None:
    name = f"[{method.owner} {method.selector}]"
    key = (method.owner, method.selector)
    expected = known.protocol_methods.get(key) or known.class_methods.get(key)
    positions = dict(enumerate(expected)) if expected else {}
    positions |= known.partial_types.get(key, {})
    for position, theirs in positions.items():
        ours = method.types[position] if position < len(method.types) else "nothing"
        if not agrees(ours, theirs):
            what = "result" if position == 0 else f"argument {position}"
            report.problems.append(f"{name}: the {what} is {theirs}, not {ours}")
    if expected:
        report.compared += 1
    elif method.selector in known.selectors:
        report.names_only.append(name)
    elif method.selector not in KNOWN_BY_HAND.get(method.owner, ()):
        report.problems.append(f"{name}: no package knows this selector")
