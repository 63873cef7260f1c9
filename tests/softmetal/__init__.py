"""A software Metal device: compiles Metal Shading Language on Linux, runs it on the CPU and checks what it does.

library = softmetal.compile(source_or_path)
report = library.launch("name", buffers=[x, y, np.int32(n)], threadgroups=(4, 1, 1), threads_per_threadgroup=(64, 1, 1))
assert not report.errors
"""

from .device import CompileError, Library, Pipeline, Report, compile, runtime_path

__all__ = ["CompileError", "Library", "Pipeline", "Report", "compile", "runtime_path"]
