// Everything that Python can call: the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include "../cpu/dispatch.h"
#include "../cpu/pool.h"
#include "bindings.h"

namespace py = pybind11;
using fastdistil::cpu::PooledMemory;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdistil's compiled kernels";
  m.def("isa", &fastdistil::cpu::isa, "the instruction set that the CPU kernels use here");
  m.def("isas", &fastdistil::cpu::isas, "the instruction sets that this processor can run, the best first");
  m.def("use_isa", &fastdistil::cpu::use_isa, py::arg("name"), "use another of isas(), for tests and benchmarks");
  py::class_<PooledMemory>(m, "PooledMemory", py::buffer_protocol(), "bytes whose memory the next one uses again")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](PooledMemory& x) {
        return py::buffer_info(x.data(), 1, py::format_descriptor<uint8_t>::format(),
                               static_cast<py::ssize_t>(x.size()));
      });
  m.def("pool_available", &fastdistil::cpu::pool_available, "whether memory is kept on this system");
  m.def("pool_held", &fastdistil::cpu::pool_held, "bytes that are kept and not in use");
  m.def("pool_release", &fastdistil::cpu::pool_release, "gives the kept memory back to the system");
  fastdistil::define_contracts(m);
  fastdistil::define_logit(m);
  fastdistil::define_cross_entropy(m);
  fastdistil::define_row_moments(m);
  fastdistil::define_acceptance(m);
  fastdistil::define_topk(m);
  fastdistil::define_hidden(m);
  fastdistil::define_attention(m);
  fastdistil::define_sparse(m);
#if defined(FD_CUDA)
  m.attr("cuda_arches") = FD_CUDA;
#else
  m.attr("cuda_arches") = "";
#endif
}
