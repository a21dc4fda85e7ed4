// Build information and CPU features, readable without torch.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "common/cpu_features.h"

namespace py = pybind11;

namespace {

py::tuple split(const std::string& words) {
  py::list result;
  std::istringstream stream(words);
  for (std::string word; stream >> word;) {
    result.append(word);
  }
  return py::tuple(result);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = ADAKERNELS_COMPILER;
  info["torch"] = ADAKERNELS_TORCH_VERSION;
  info["cpu_isas"] = split(ADAKERNELS_CPU_ISAS);
  info["cuda_archs"] = split(ADAKERNELS_CUDA_ARCHS);
  return info;
}

py::dict cpu_features() {
  py::dict features;
  for (const adakernels::CpuFeature& feature : adakernels::cpu_features()) {
    features[feature.name] = feature.present;
  }
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU features; does not need torch.";
  m.def("build_info", &build_info, "Compiler, torch version built against, CPU ISAs and CUDA archs built.");
  m.def("cpu_features", &cpu_features, "CPU extension name -> whether processor and system support it.");
  m.def(
      "supported_isa", [] { return adakernels::isa_name(adakernels::supported_isa()); },
      "Best instruction set this processor can run.");
  m.def(
      "best_isa", [] { return adakernels::isa_name(adakernels::best_isa()); },
      "Instruction set the kernels use: supported_isa() capped by ADAKERNELS_CPU_ISA.");
}
