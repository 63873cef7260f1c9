"""A software Metal device: compiles Metal Shading Language on Linux, runs it on the CPU and checks what it does.

library = softmetal.compile(source_or_path)
report = library.launch("name", buffers=[x, y, np.int32(n)], threadgroups=(4, 1, 1), threads_per_threadgroup=(64, 1, 1))
assert not report.errors

library.prepare(names) compiles many kernels at once; library.pipeline(name) serves a host that launches on its own
memory (msl/runtime.h); lint(source_or_path) finds what Apple's compiler would reject and this one does not.
"""

from .device import CompileError, Finding, Library, Pipeline, Report, compile, lint, runtime_path

__all__ = ["CompileError", "Finding", "Library", "Pipeline", "Report", "compile", "lint", "runtime_path"]
