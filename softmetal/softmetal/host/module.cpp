// The Python face of the software device's host side; mps.py is the one to use.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"

namespace py = pybind11;

void softmetal_register_backend();
std::vector<std::string> softmetal_misuses();
void softmetal_misuse(const std::string& name);

namespace {

using namespace softmetal;

// Runs a call into Python and gives its errors to Metal's caller. The objects are never freed: they may outlive Python.
template <typename Call>
auto in_python(const Call& call) {
  py::gil_scoped_acquire lock;
  try {
    return call();
  } catch (py::error_already_set& error) {
    throw CompileFailure(py::str(error.value()).cast<std::string>());
  }
}

class PythonKernel final : public Kernel {
 public:
  explicit PythonKernel(py::object kernel)
      : kernel_(kernel.release().ptr()),
        pipeline_(reinterpret_cast<const SoftmetalPipeline*>(py::handle(kernel_).attr("address").cast<uint64_t>())) {}
  const SoftmetalPipeline* pipeline() const override { return pipeline_; }
  std::string describe(const SoftmetalError& error) const override {
    return in_python([&] {
      return py::handle(kernel_)
          .attr("describe")(error.kind, error.message, error.offset, error.count)
          .cast<std::string>();
    });
  }

 private:
  PyObject* kernel_;
  const SoftmetalPipeline* pipeline_;
};

class PythonShaders final : public Shaders {
 public:
  explicit PythonShaders(py::object library) : library_(library.release().ptr()) {}
  std::vector<std::string> kernels() const override {
    return in_python([&] { return py::handle(library_).attr("kernels").cast<std::vector<std::string>>(); });
  }
  bool uses_tensor_ops(const std::string& kernel) const override {
    return in_python([&] { return py::handle(library_).attr("uses_tensor_ops")(kernel).cast<bool>(); });
  }
  std::vector<FunctionConstant> constants(const std::string& kernel) const override {
    return in_python([&] {
      std::vector<FunctionConstant> result;
      for (const py::handle& each : py::handle(library_).attr("constants_of")(kernel)) {
        const auto [index, name, type, required] = each.cast<std::tuple<int, std::string, std::string, bool>>();
        result.push_back({index, name, type, required});
      }
      return result;
    });
  }
  std::shared_ptr<Kernel> kernel(const std::string& name, const std::map<int, std::string>& constants) override {
    return in_python([&]() -> std::shared_ptr<Kernel> {
      py::dict values;
      for (const auto& [index, bytes] : constants) {
        values[py::int_(index)] = py::bytes(bytes);
      }
      return std::make_shared<PythonKernel>(py::handle(library_).attr("pipeline")(name, values));
    });
  }

 private:
  PyObject* library_;
};

class PythonCompiler final : public Compiler {
 public:
  PythonCompiler(py::object compile, py::object load)
      : compile_(compile.release().ptr()), load_(load.release().ptr()) {}
  std::shared_ptr<Shaders> compile(
      const std::string& source,
      const std::map<std::string, std::string>& macros,
      int version) override {
    return in_python([&]() -> std::shared_ptr<Shaders> {
      return std::make_shared<PythonShaders>(py::handle(compile_)(source, macros, version));
    });
  }
  std::shared_ptr<Shaders> load(const std::string& data) override {
    return in_python(
        [&]() -> std::shared_ptr<Shaders> { return std::make_shared<PythonShaders>(py::handle(load_)(data)); });
  }

 private:
  PyObject* compile_;
  PyObject* load_;
};

template <typename Function>
Function symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) {
    throw std::runtime_error(dlerror());
  }
  return reinterpret_cast<Function>(found);
}

void configure(py::object compile, py::object load, const std::string& runtime_path) {
  void* library = dlopen(runtime_path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    throw std::runtime_error(dlerror());
  }
  runtime().compiler = std::make_unique<PythonCompiler>(std::move(compile), std::move(load));
  runtime().launch = symbol<decltype(&softmetal_launch)>(library, "softmetal_launch");
  runtime().free_report = symbol<decltype(&softmetal_free_report)>(library, "softmetal_free_report");
  softmetal_register_backend();
}

py::dict constants_of(const LaunchRecord& record) {
  py::dict result;
  for (const auto& [index, bytes] : record.constants) {
    result[py::int_(index)] = py::bytes(bytes);
  }
  return result;
}

py::dict counters_of(const SoftmetalCounters& counters) {
  py::dict result;
#define COUNTER(name) result[#name] = counters.name;
  COUNTER(device_bytes_read)
  COUNTER(device_bytes_written)
  COUNTER(constant_bytes_read)
  COUNTER(threadgroup_bytes_read)
  COUNTER(threadgroup_bytes_written)
  COUNTER(threadgroup_bytes)
  COUNTER(threadgroup_barriers)
  COUNTER(simdgroup_barriers)
  COUNTER(simd_reductions)
  COUNTER(simd_shuffles)
  COUNTER(simdgroup_multiplies)
#undef COUNTER
  return result;
}

py::dict all_logs() {
  const Logs logs = softmetal::logs();
  py::list launches;
  for (const LaunchRecord& record : logs.launches) {
    py::dict launch;
    launch["kernel"] = record.kernel;
    launch["constants"] = constants_of(record);
    launch["threadgroups"] = py::make_tuple(record.threadgroups[0], record.threadgroups[1], record.threadgroups[2]);
    launch["threads"] = py::make_tuple(record.threads[0], record.threads[1], record.threads[2]);
    launch["counters"] = counters_of(record.counters);
    launch["bytes_read"] = record.bytes_read;
    launches.append(launch);
  }
  py::list compiles;
  for (const CompileRecord& record : logs.compiles) {
    py::dict compile;
    compile["source"] = record.source;
    compile["macros"] = record.macros;
    compile["version"] = record.version;
    compile["safe_math"] = record.safe_math;
    compiles.append(compile);
  }
  py::dict result;
  result["errors"] = logs.errors;
  result["launches"] = launches;
  result["compiles"] = compiles;
  result["fallbacks"] = logs.fallbacks;
  result["transfers"] = logs.transfers;
  result["synchronizations"] = logs.synchronizations;
  result["counts"] = logs.counts;
  return result;
}

}  // namespace

PYBIND11_MODULE(softmetal_host, m) {
  m.def("configure", configure);
  m.def("logs", all_logs);
  m.def("errors", [] { return logs().errors; });
  m.def("clear_logs", clear_logs);
  m.def("live_objects", live_objects);
  py::class_<Settings>(m, "Settings")
      .def(py::init([](const Settings& other) { return other; }))
      .def_readwrite("gpu", &Settings::gpu)
      .def_readwrite("macos", &Settings::macos)
      .def_readwrite("corrupted", &Settings::corrupted)
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("idle", &Settings::idle);
  m.def("settings", settings);
  m.def("set", softmetal::set);
  m.def("misuses", softmetal_misuses);
  m.def("misuse", softmetal_misuse, py::call_guard<py::gil_scoped_release>());
}
