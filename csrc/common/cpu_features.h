#pragma once

#include <vector>

namespace adakernels {

// Instruction sets the kernels are compiled for, in ascending order of preference.
enum class Isa { portable, avx2, avx512 };

struct CpuFeature {
  const char* name;
  bool present;  // the processor has it and the operating system saves its registers
};

// The extensions that matter to the kernels; empty where the processor is not an x86.
const std::vector<CpuFeature>& cpu_features();

// The best instruction set that the processor can run, whatever the environment says.
Isa supported_isa();

// supported_isa() capped by the environment variable ADAKERNELS_CPU_ISA, read at the first call.
// Throws std::invalid_argument if the variable names no instruction set.
Isa best_isa();

const char* isa_name(Isa isa);

}  // namespace adakernels
