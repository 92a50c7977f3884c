// What the emulated kernels' module offers beside the kernels: the schedule, and what was counted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation.h"

namespace py = pybind11;
namespace emulation = fusedres::cuda::emulation;

#if defined(FUSEDRES_BIND_CUDA)
namespace fusedres {
void bind_cuda(py::module_& m);
}
#endif

// build.py gives the name
PYBIND11_MODULE(FUSEDRES_MODULE, m) {
  m.def("seed", &emulation::seed, py::arg("value"));
  m.def("preempt", &emulation::preempt, py::arg("on"));
  m.def(
      "watch",
      [](const std::string& name, std::uintptr_t address, std::size_t bytes) {
        emulation::watch(name, reinterpret_cast<const void*>(address), bytes);
      },
      py::arg("name"), py::arg("address"), py::arg("nbytes"));
  m.def("unwatch_all", &emulation::unwatch_all);
  m.def("reset", &emulation::reset);
  m.def("traffic", [] {
    py::dict all;
    for (const auto& [name, traffic] : emulation::traffic()) {
      all[name.c_str()] =
          py::dict(py::arg("read") = traffic.read, py::arg("distinct_read") = traffic.distinct_read,
                   py::arg("written") = traffic.written,
                   py::arg("distinct_written") = traffic.distinct_written);
    }
    return all;
  });
  m.def("launches", [] {
    py::list all;
    for (const auto& [grid, block, shared_bytes] : emulation::launches()) {
      all.append(py::dict(py::arg("grid") = py::make_tuple(grid.x, grid.y, grid.z),
                          py::arg("block") = py::make_tuple(block.x, block.y, block.z),
                          py::arg("shared_bytes") = shared_bytes));
    }
    return all;
  });
  m.def("count_banks", &emulation::count_banks, py::arg("on"));
  m.def("banks", [] {
    py::dict all;
    for (const auto& [address, banks] : emulation::banks()) {
      all[py::int_(address)] =
          py::dict(py::arg("accesses") = banks.accesses, py::arg("conflicts") = banks.conflicts);
    }
    return all;
  });
#if defined(FUSEDRES_BIND_CUDA)
  fusedres::bind_cuda(m);
#endif
}
